"""The MLflow server of a run, by what a user has at hand: its folder, id or name."""

import os

from pipeline.config import ConfigError
from pipeline.mlflow_access import TRACKING_URI
from pipeline.tracking.settings import TrackingSettings


def tracking_of(run: str) -> tuple[TrackingSettings, str | None]:
    """Server of a run, and its key if `run` is its folder; without MLFLOW_TRACKING_URI, the database beside that folder.

    Args:
        run: folder, id, name or model URI.

    Raises:
        ConfigError: it is not the folder of a run, and no server is named.
    """
    key = None
    if os.path.isdir(run) or "://" in run:
        from pipeline.training.run_dir import key_of  # it imports PyTorch

        key = key_of(run)
    if key is None and not os.environ.get(TRACKING_URI):
        raise ConfigError(f"{run} is not the folder of a run: for a run's id or name set MLFLOW_TRACKING_URI")
    return TrackingSettings.resolve(os.path.dirname(run) or ".", experiment="", run_name=""), key
