"""Where a run comes from: what it began with, run before run, down to shard sets and code commits.

    python -m jobs.lineage runs/mine                 the folder of a run
    python -m jobs.lineage RUN                       MLflow's id of a run, or its name
    python -m jobs.lineage models:/shapes@champion   the run that made a model version

Asks the server of MLFLOW_TRACKING_URI; without it, for the folder of a run, the database beside that folder.
"""

import argparse
import os

from jobs.command import user_errors
from pipeline.config import ConfigError
from pipeline.tracking.client import RunLookupError, connect, find_run, find_run_by_key
from pipeline.tracking.lineage import lineage, lineage_tree
from pipeline.tracking.settings import TrackingSettings
from pipeline.training.run_dir import key_of


@user_errors()
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="folder of a run, its id or name in MLflow, or models:/NAME@ALIAS")
    wanted = parser.parse_args(argv).run.rstrip("/")
    print(_drawn(wanted))


def _drawn(wanted: str) -> str:
    key = None if wanted.startswith("models:") else key_of(wanted)
    if key is None and not os.environ.get("MLFLOW_TRACKING_URI"):
        raise ConfigError(f"{wanted} is not the folder of a run: for a run's id or name set MLFLOW_TRACKING_URI")
    settings = TrackingSettings.resolve(os.path.dirname(wanted) or ".", experiment="", run_name="")
    client = connect(settings.uri)
    run = find_run_by_key(client, key) if key else find_run(client, wanted)
    if run is None:
        raise RunLookupError(f"{wanted}: {settings.shown_uri} does not know this run")
    return lineage_tree(lineage(client, run.info.run_id))


if __name__ == "__main__":
    main()
