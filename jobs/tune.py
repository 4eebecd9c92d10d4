"""Search settings with Ray Tune, and report which differences exceed the noise.

    dfine tune configs/sweeps/fdr_golsd.yaml --set data.train=/shards/mine/train data.val=/shards/mine/val
    ... --set trials=12 schedule.epochs=20      values of the sweep, or of the experiment that it varies
    ... --dry-run                               check the file, print the plan, and end
    dfine tune --promote runs/fdr_golsd         write the best confirmed point as an experiment, and register its model

Every trial is a training run of its own. The same command again continues an interrupted sweep: finished trials stay, and
interrupted ones resume at their last checkpoint. Ctrl-C ends it cleanly.
"""

import argparse
from typing import TYPE_CHECKING

from jobs.command import (
    add_cluster,
    add_set,
    add_verify_data,
    announce,
    command_parser,
    location,
    parsed,
    recipe,
    user_errors,
)

if TYPE_CHECKING:
    from pipeline.tuning.sweep import Sweep


@user_errors()
def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    args = parsed(parser(), argv)
    if args.promote:
        announce("tune", f"--promote {args.promote}: reading the trials …")
        from pipeline.tuning.promote import promote

        print(promote(args.promote, args.registered_model_name))
        return

    # 1. Check the sweep, its experiment and every candidate value, which takes no PyTorch and no Ray.
    from pipeline.config import ConfigError
    from pipeline.config_files import parse_overrides
    from pipeline.tuning.load import load_sweep

    if args.sweep is None:
        raise ConfigError("name a sweep file, see configs/sweeps/")
    overrides = parse_overrides(args.set)
    if args.cluster is not None:
        overrides["cluster"] = str(args.cluster.absolute())
    sweep = load_sweep(args.sweep, overrides)
    print(plan(sweep), flush=True)

    # 2. Run the trials.
    if not args.dry_run:
        announce("tune", f"{args.sweep}: starting Ray …")
        from pipeline.tuning.driver import run_sweep

        print(run_sweep(sweep, verify_data=args.verify_data).summary())


def plan(sweep: "Sweep") -> str:
    """Trials of the sweep in words."""
    from pipeline.tuning.sweep import evaluations_per_trial, rungs
    from pipeline.wording import plural

    total = evaluations_per_trial(sweep)
    halts = rungs(sweep, total) if total else ()
    budget = f"{sweep.trials} points" if sweep.trials else f"{sweep.hours:g} hours" if sweep.hours else "the whole grid"
    stops = f", bad ones stopped after evaluation {', '.join(map(str, halts))} of {total}" if halts else ""
    return (
        f"sweep {sweep.name}: {budget} of {', '.join(sweep.space)}, {plural(sweep.seeds_per_point, 'seed')} each{stops};\n"
        f"then {sweep.replicates} replicates of the default and the top {sweep.confirm.top} points with {sweep.confirm.seeds}"
        f" fresh seeds each, at full length"
    )


def parser() -> argparse.ArgumentParser:
    """Parser of the arguments."""
    arguments = command_parser("tune", __doc__)
    arguments.add_argument("sweep", type=recipe, nargs="?", help="YAML file, see configs/sweeps/")
    add_cluster(arguments)
    add_set(arguments, help="values that replace those of the sweep or its experiment")
    arguments.add_argument("--dry-run", action="store_true", help="check the file, print the plan, and end")
    add_verify_data(arguments)
    arguments.add_argument("--promote", type=location, metavar="FOLDER", help="folder of a finished sweep")
    arguments.add_argument(
        "--registered-model-name", metavar="NAME", help="with --promote: register the model version under this name"
    )
    return arguments


if __name__ == "__main__":
    main()
