"""Train one experiment on Ray.

    python -m jobs.train configs/coco/dfine_s.yaml
    python -m jobs.train configs/small_data.yaml --set data.train=/shards/mine/train data.val=/shards/mine/val
    ray job submit --working-dir . -- python -m jobs.train configs/coco/dfine_s.yaml --cluster configs/clusters/one_node.yaml \\
        --set storage=$PWD/runs data.train=$PWD/shards/coco/train2017 data.val=$PWD/shards/coco/val2017

The same command again continues a run that was interrupted, at the step of its last checkpoint. --dry-run only shows what
would be done.
"""

import argparse
from pathlib import Path

from jobs.command import add_set, location, user_errors
from pipeline.config_files import load_cluster, load_experiment, parse_overrides
from pipeline.training.dry_run import preview
from pipeline.training.launch import launch


@user_errors()
def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    overrides = parse_overrides(args.set) | ({"name": args.name} if args.name else {})
    experiment = load_experiment(args.experiment, overrides)
    cluster = load_cluster(args.cluster)
    if args.dry_run:
        print(preview(experiment, cluster))
        return
    outcome = launch(experiment, cluster, resume=args.resume, allow_changes=args.allow_changes)
    print(outcome.summary())


def parser() -> argparse.ArgumentParser:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("experiment", type=Path, help="YAML file, see configs/")
    arguments.add_argument("--cluster", type=Path, help="YAML file, see configs/clusters/")
    add_set(arguments, help="replace values of the experiment")
    arguments.add_argument("--name", help="of the run; the experiment file's name unless given")
    arguments.add_argument(
        "--resume", type=location, metavar="CHECKPOINT", help="checkpoint of another run, to be continued by this one"
    )
    arguments.add_argument(
        "--allow-changes", action="store_true", help="continue a run although its experiment has changed"
    )
    arguments.add_argument("--dry-run", action="store_true", help="print what would be done, and end")
    return arguments


if __name__ == "__main__":
    main()
