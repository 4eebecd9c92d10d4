"""Train one experiment on Ray.

    python -m jobs.train configs/coco/dfine_s.yaml
    python -m jobs.train configs/small_data.yaml --set data.train=/shards/mine/train data.val=/shards/mine/val
    ray job submit --working-dir . -- python -m jobs.train configs/coco/dfine_s.yaml --cluster configs/clusters/one_node.yaml

The same command again continues a run that was interrupted, at the step of its last checkpoint. --dry-run only shows what
would be done.
"""

import argparse
import sys
from pathlib import Path

from pipeline.config import ConfigError, load_cluster, load_experiment, parse_override
from pipeline.data.manifest import ManifestError
from pipeline.training.checkpoint import CheckpointError
from pipeline.training.launch import launch
from pipeline.training.preview import preview


def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    try:
        overrides = dict(parse_override(text) for text in args.set) | ({"name": args.name} if args.name else {})
        experiment = load_experiment(args.experiment, overrides)
        cluster = load_cluster(args.cluster)
        if args.dry_run:
            print(preview(experiment, cluster))
            return
        outcome = launch(experiment, cluster, resume=args.resume, allow_changes=args.allow_changes)
    except (ConfigError, ManifestError, CheckpointError) as error:
        sys.exit(f"{error}")
    print(outcome.summary())


def parser() -> argparse.ArgumentParser:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("experiment", type=Path, help="YAML file, see configs/")
    arguments.add_argument("--cluster", type=Path, help="YAML file, see configs/clusters/")
    arguments.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="replace values of the experiment")
    arguments.add_argument("--name", help="of the run; the experiment file's name unless given")
    arguments.add_argument(
        "--resume", metavar="CHECKPOINT", help="checkpoint of another run, to be continued by this one"
    )
    arguments.add_argument(
        "--allow-changes", action="store_true", help="continue a run although its experiment has changed"
    )
    arguments.add_argument("--dry-run", action="store_true", help="print what would be done, and end")
    return arguments


if __name__ == "__main__":
    main()
