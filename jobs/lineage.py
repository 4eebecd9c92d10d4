"""Print the origin of a run: run by run, down to shard sets and code commits.

    dfine lineage runs/mine                 the folder of a run
    dfine lineage RUN                       the id of a run in MLflow, or its name
    dfine lineage models:/shapes@champion   the run that produced a model version

Reads the server of MLFLOW_TRACKING_URI; without it, for the folder of a run, the database beside that folder.
"""

import argparse
import os

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
    # 1. A folder has its key into MLflow; anything else needs a server.
    from pipeline.config import ConfigError
    from pipeline.tracking.settings import TrackingSettings

    key = None
    if os.path.isdir(run) or "://" in run:
        from pipeline.training.run_dir import key_of

        key = key_of(run)
    if key is None and not os.environ.get("MLFLOW_TRACKING_URI"):
        raise ConfigError(f"{run} is not the folder of a run: for a run's id or name set MLFLOW_TRACKING_URI")
    settings = TrackingSettings.resolve(os.path.dirname(run) or ".", experiment="", run_name="")

    # 2. Follow the run's origins in MLflow.
    announce("lineage", f"{run}: reading {settings.shown_uri} …")
    from pipeline.tracking.client import RunLookupError, connect, find_run, find_run_by_key
    from pipeline.tracking.lineage import lineage, lineage_tree

    client = connect(settings.uri)
    found = find_run_by_key(client, key) if key else find_run(client, run)
    if found is None:
        raise RunLookupError(f"{run}: {settings.shown_uri} does not know this run")
    return lineage_tree(lineage(client, found.info.run_id))


def parser() -> argparse.ArgumentParser:
    """Parser of the arguments."""
    arguments = command_parser("lineage", __doc__)
    arguments.add_argument("run", help="folder of a run, its id or name in MLflow, or models:/NAME@ALIAS")
    return arguments


if __name__ == "__main__":
    main()
