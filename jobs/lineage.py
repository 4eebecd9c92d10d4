"""Print the origin of a run: run by run, down to shard sets and code commits.

    dfine lineage runs/mine                 the folder of a run
    dfine lineage RUN                       the id of a run in MLflow, or its name
    dfine lineage models:/shapes@champion   the run that produced a model version

Reads the server of MLFLOW_TRACKING_URI; without it, for the folder of a run, the database beside that folder.
"""

import argparse

from jobs.command import announce, command_parser, parsed, user_errors


@user_errors()
def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    args = parsed(parser(), argv)
    print(origin_of(args.run.rstrip("/")))


def origin_of(run: str) -> str:
    """Origin of a run as a tree.

    Args:
        run: folder, id, name or model URI.
    """
    from pipeline.training.tracked_run import tracking_of

    settings, key = tracking_of(run)
    announce("lineage", f"{run}: reading {settings.shown_uri} …")
    from pipeline.tracking.client import find_tracked_run
    from pipeline.tracking.lineage import lineage, lineage_tree

    client, found = find_tracked_run(settings, run, key)
    return lineage_tree(lineage(client, found.info.run_id))


def parser() -> argparse.ArgumentParser:
    """Parser of the arguments."""
    arguments = command_parser("lineage", __doc__)
    arguments.add_argument("run", help="folder of a run, its id or name in MLflow, or models:/NAME@ALIAS")
    return arguments


if __name__ == "__main__":
    main()
