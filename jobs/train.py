"""Train one experiment: in this process on a machine without GPUs, else on Ray.

    dfine train configs/coco/dfine_s.yaml
    dfine train configs/small_data.yaml --set data.train=/shards/mine/train data.val=/shards/mine/val
    ray job submit --working-dir . -- python -m jobs.train configs/coco/dfine_s.yaml --cluster configs/clusters/one_node.yaml \\
        --set storage=$PWD/runs data.train=$PWD/shards/coco/train2017 data.val=$PWD/shards/coco/val2017

With --cluster, one worker trains on Ray too. The same command again resumes an interrupted run at its last checkpoint.
--dry-run prints schedule, parameter groups, memory and hours, and ends. A file under configs/ is also found by its name there,
coco/dfine_s.yaml, from any folder.
"""

import argparse

from jobs.command import (
    add_cluster,
    add_set,
    add_verify_data,
    announce,
    command_parser,
    location,
    parsed,
    profile,
    recipe,
    user_errors,
)


@user_errors()
def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    args = parsed(parser(), argv)

    # 1. Check the user's files.
    from pipeline.config import Cluster
    from pipeline.config_files import load_cluster, load_experiment, parse_overrides

    overrides = parse_overrides(args.set) | ({"name": args.name} if args.name else {})
    experiment = load_experiment(args.experiment, overrides)
    cluster = load_cluster(args.cluster) if args.cluster else None

    # 2. Check that there is data; still without PyTorch and Ray.
    from pipeline.training.context import resolve_data

    resolve_data(experiment.data)
    announce("train", f"{args.experiment}: {'planning' if args.dry_run else 'starting'} …")

    # 3. Train, or show the plan.
    if args.dry_run:
        from pipeline.training.dry_run import preview

        print(preview(experiment, cluster or Cluster()))
        return
    from pipeline.training.launch import launch

    result = launch(
        experiment,
        cluster,
        resume=args.resume,
        allow_changes=args.allow_changes,
        profile_steps=args.profile,
        verify_data=args.verify_data,
    )
    print(result.summary())


def parser() -> argparse.ArgumentParser:
    """Parser of the arguments."""
    arguments = command_parser("train", __doc__)
    arguments.add_argument("experiment", type=recipe, help="YAML file, see configs/")
    add_cluster(arguments)
    add_set(arguments, help="values that replace those of the experiment")
    arguments.add_argument("--name", help="name of the run; default: the name of the experiment's file")
    arguments.add_argument(
        "--resume", type=location, metavar="CHECKPOINT", help="checkpoint of another run, which this run continues"
    )
    arguments.add_argument(
        "--allow-changes", action="store_true", help="continue a run although its experiment has changed"
    )
    arguments.add_argument("--dry-run", action="store_true", help="print the plan, and end")
    add_verify_data(arguments)
    arguments.add_argument(
        "--profile",
        type=profile,
        default=0,
        metavar="steps=N",
        help="record N steps of rank 0 with PyTorch's profiler, in profile/trace-rank-0.json of the run",
    )
    return arguments


if __name__ == "__main__":
    main()
