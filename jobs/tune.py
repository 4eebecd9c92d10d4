"""Search settings on Ray Tune, and say what of it is more than chance.

    python -m jobs.tune configs/sweeps/fdr_golsd.yaml --set data.train=/shards/mine/train data.val=/shards/mine/val
    ... --set trials=12 schedule.epochs=20                  values of the sweep, or of the experiment that it varies
    ... --check                                             only check the file, and say what it would do
    python -m jobs.tune --promote runs/fdr_golsd            the best confirmed point as an experiment, its model registered

Every trial is a training of its own. The same command again goes on with a sweep that was interrupted: what is finished stays,
what was running continues from its checkpoint. Ctrl-C leaves everything whole.
"""

import argparse
from pathlib import Path

from jobs.command import add_set, location, user_errors
from pipeline.config import ConfigError
from pipeline.config_files import parse_overrides
from pipeline.tuning.driver import run_sweep
from pipeline.tuning.load import load_sweep
from pipeline.tuning.promote import promote
from pipeline.tuning.sweep import Sweep, evaluations_per_trial, rungs


@user_errors()
def main(argv: list[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    if args.promote:
        print(promote(args.promote, args.registered_model_name))
        return
    if args.sweep is None:
        raise ConfigError("name a sweep file, see configs/sweeps/")
    overrides = parse_overrides(args.set)
    if args.cluster is not None:
        overrides["cluster"] = str(args.cluster.absolute())
    sweep = load_sweep(args.sweep, overrides)
    print(plan(sweep), flush=True)
    if not args.check:
        print(run_sweep(sweep).summary())


def plan(sweep: Sweep) -> str:
    """What the sweep would do, for people."""
    total = evaluations_per_trial(sweep)
    halts = rungs(sweep, total) if total else ()
    budget = f"{sweep.trials} points" if sweep.trials else f"{sweep.hours:g} hours" if sweep.hours else "the whole grid"
    stops = f", bad ones stopped after evaluation {', '.join(map(str, halts))} of {total}" if halts else ""
    return (
        f"sweep {sweep.name}: {budget} of {', '.join(sweep.space)}, {sweep.seeds_per_point} seed(s) each{stops};\n"
        f"then {sweep.replicates} replicates of the default and the top {sweep.confirm.top} points with {sweep.confirm.seeds}"
        f" fresh seeds each, at full length"
    )


def _parser() -> argparse.ArgumentParser:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("sweep", type=Path, nargs="?", help="YAML file, see configs/sweeps/")
    arguments.add_argument("--cluster", type=Path, help="YAML file, see configs/clusters/")
    add_set(arguments, help="replace values")
    arguments.add_argument("--check", action="store_true", help="check the file, and end")
    arguments.add_argument("--promote", type=location, metavar="FOLDER", help="of a finished sweep")
    arguments.add_argument("--registered-model-name", metavar="NAME", help="with --promote: name of the model version")
    return arguments


if __name__ == "__main__":
    main()
