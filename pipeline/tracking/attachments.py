"""Files that are made after a run: put among its artifacts, with their numbers, and marked on the model version."""

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import Metric, RunTag

from pipeline.errors import UserError
from pipeline.tracking.asking import asking
from pipeline.tracking.names import MAX_TAG, mlflow_key, mlflow_value
from pipeline.tracking.outbox import milliseconds

RUN, MODEL = "runs:/", "models:/"
LOGGED_MODEL = "m-"  # how MLflow's ids of logged models begin


@dataclass(frozen=True)
class Target:
    """A run, and the model version that was meant, if it was one."""

    run_id: str
    name: str | None = None
    version: str | None = None

    def __str__(self) -> str:
        return f"run {self.run_id}" + (f" and {self.name}, version {self.version}" if self.version else "")


class AttachError(UserError, ValueError):
    """There is nothing to attach to."""


def find_target(source: str) -> Target:
    """
    Args:
        source: `runs:/RUN_ID`, `models:/NAME/VERSION`, `models:/NAME@ALIAS` or `models:/m-MODEL_ID`; what follows a run's
            id does not matter.

    Raises:
        AttachError: no server is named, or it knows of no such thing.
    """
    if not source.startswith((RUN, MODEL)):
        raise AttachError(
            f"{source}: name a run (runs:/RUN_ID) or a model version (models:/NAME/VERSION, models:/NAME@ALIAS)"
        )
    with asking(source, AttachError):
        return _find(source, _client(source))


def attach(
    target: Target,
    files: Sequence[Path],
    *,
    tags: Mapping[str, str],
    metrics: Mapping[str, float],
    folder: str,
) -> None:
    """Log to the run, and set the tags on the model version too. Doing it again replaces what was there.

    Args:
        files: files and folders, each put under its own name into `folder` of the run's artifacts.

    Raises:
        AttachError: the server does not take it.
    """
    client = _client(str(target))
    with asking(str(target), AttachError):
        for path in files:
            if path.is_dir():
                client.log_artifacts(target.run_id, str(path), f"{folder}/{path.name}")
            else:
                client.log_artifact(target.run_id, str(path), folder)
        now = milliseconds(time.time())
        client.log_batch(
            target.run_id,
            metrics=[Metric(mlflow_key(name), value, now, 0) for name, value in metrics.items()],
            tags=[RunTag(mlflow_key(name), mlflow_value(value, MAX_TAG)) for name, value in tags.items()],
        )
        if target.name and target.version:
            for name, value in tags.items():
                client.set_model_version_tag(
                    target.name, target.version, mlflow_key(name), mlflow_value(value, MAX_TAG)
                )


def _client(source: str) -> MlflowClient:
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    if not uri:
        raise AttachError(f"{source}: set MLFLOW_TRACKING_URI to the server or database that knows it")
    return MlflowClient(uri, registry_uri=uri)


def _find(source: str, client: MlflowClient) -> Target:
    if source.startswith(RUN):
        return Target(client.get_run(source.removeprefix(RUN).split("/")[0]).info.run_id)
    named = source.removeprefix(MODEL)
    if named.startswith(LOGGED_MODEL):
        run_id = client.get_logged_model(named.split("/")[0]).source_run_id
        if not run_id:
            raise AttachError(f"{source}: was logged without a run")
        return Target(run_id)
    if "@" in named:
        found = client.get_model_version_by_alias(*named.split("@", 1))
    elif "/" in named:
        found = client.get_model_version(*named.split("/", 1))
    else:
        raise AttachError(f"{source}: which version? Write {source}/1 or {source}@ALIAS")
    if not found.run_id:
        raise AttachError(f"{source}: this version belongs to no run")
    return Target(found.run_id, found.name, str(found.version))
