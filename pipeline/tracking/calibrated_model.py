"""Calibration in MLflow: its files and tags at the run of the detector, and the file in the logged model, where it is read."""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dfine_core.checkpoints.folder import CHECKPOINTS, METADATA, LoadError, read_metadata
from dfine_core.uncertainty.detector_calibration import FILE
from pipeline import storage
from pipeline.open_detector import STORED
from pipeline.tracking.client import (
    ResolvedUri,
    attach,
    connect,
    find_run_by_key,
    find_target,
    logged_model_id,
    mlflow_errors,
    named_server,
)
from pipeline.tracking.settings import MAX_TAG, TrackingError, TrackingSettings, mlflow_value

if TYPE_CHECKING:
    from mlflow import MlflowClient

FOLDER = "calibration"  # of the run's artifacts
MODEL_ARTIFACTS = "artifacts"  # folder of a logged model that holds weights and description
PREFIX = "dfine.calibration"  # of the tags


@dataclass(frozen=True, eq=False)
class CalibrationTarget:
    """Run and logged model that a calibration belongs to."""

    client: "MlflowClient"
    found: ResolvedUri


def named_target(uri: str) -> CalibrationTarget:
    """Target by a `runs:/` or `models:/` URI.

    Raises:
        RunLookupError: no server is named, or it knows of no such run.
    """
    return CalibrationTarget(named_server(uri), find_target(uri))


def target_of_checkpoint(folder: str) -> CalibrationTarget | None:
    """Target of a run's checkpoint: the run that its metadata names, at MLFLOW_TRACKING_URI or in the database beside the run.

    None if it is no checkpoint, was not tracked, or is not there.
    """
    run, inside, _ = folder.rpartition(f"/{CHECKPOINTS}/")
    if not inside or not storage.exists(storage.join(folder, METADATA)):
        return None
    try:
        key = read_metadata(folder, STORED).get("tracking_key")
        settings = TrackingSettings.resolve(run.rpartition("/")[0], experiment="any", run_name="any")
    except (LoadError, TrackingError):
        return None
    if not key or (settings.uri.startswith("sqlite:") and not Path(settings.uri.split(":///", 1)[1]).exists()):
        return None
    client = connect(settings.uri)
    with mlflow_errors(settings.shown_uri):
        found = find_run_by_key(client, key)
    if found is None:
        return None
    return CalibrationTarget(client, ResolvedUri(found.info.run_id, model_id=logged_model_id(found)))


def log_calibration(
    target: CalibrationTarget, files: Mapping[str, bytes], tags: Mapping[str, str], metrics: Mapping[str, float]
) -> None:
    """Log the files of a calibration. The logged model gets `calibration.json`, so that whoever opens it reads it.

    Args:
        files: content by name.

    Raises:
        RunLookupError: the server does not accept it.
    """
    named = {f"{PREFIX}.{name}": value for name, value in tags.items()}
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder, name) for name in files]
        for path in paths:
            path.write_bytes(files[path.name])
        attach(target.found, paths, tags=named, metrics=metrics, folder=FOLDER, client=target.client)
        if target.found.model_id is None:
            return
        with mlflow_errors(str(target.found)):
            target.client.log_model_artifact(target.found.model_id, str(Path(folder, FILE)), MODEL_ARTIFACTS)
            marks = {name: mlflow_value(value, MAX_TAG) for name, value in named.items()}
            target.client.set_logged_model_tags(target.found.model_id, marks)
