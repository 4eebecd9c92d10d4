"""The MLflow server of a run, by what a user has at hand: its folder, id or name."""

import os
from pathlib import Path

from pipeline.config import ConfigError
from pipeline.mlflow_access import TRACKING_URI
from pipeline.tracking.delivery import has_outbox, settings_of
from pipeline.tracking.settings import TrackingSettings

SQLITE = "sqlite:///"


def tracking_of(run: str) -> tuple[TrackingSettings, str | None]:
    """Server of a run, and its key if `run` is its folder.

    The folder's own note says where it was tracked. Without one, on another machine for example, MLFLOW_TRACKING_URI decides,
    else the database beside the folder.

    Args:
        run: folder, id, name or model URI.

    Raises:
        ConfigError: it is not the folder of a run, and no server is named.
        TrackingError: the run was tracked at a server whose password only MLFLOW_TRACKING_URI can give.
    """
    key = None
    if os.path.isdir(run) or "://" in run:
        from pipeline.training.run_dir import key_of, outbox_folder  # it imports PyTorch

        key = key_of(run)
        if key is not None and has_outbox(outbox := outbox_folder(run, key)):
            noted = settings_of(outbox)
            if (
                not noted.uri.startswith(SQLITE) or Path(noted.uri.removeprefix(SQLITE)).exists()
            ):  # else the folder has moved
                return noted, key
    if key is None and not os.environ.get(TRACKING_URI):
        raise ConfigError(f"{run} is not the folder of a run: for a run's id or name set MLFLOW_TRACKING_URI")
    return TrackingSettings.resolve(os.path.dirname(run) or ".", experiment="", run_name=""), key
