"""Client of an MLflow server: runs and models by name, key or URI, what they hold, and files attached to them.

    client = connect("sqlite:////runs/mlflow.db")
    run = find_run(client, "fine-tuned")
    champion = resolve(client, "models:/shapes@champion")

Errors are reported in one line, without the password that the server's URI may hold.
"""

import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import UserError
from pipeline.mlflow_access import (
    MODEL_SCHEME,
    RUN_SCHEME,
    TRACKING_URI,
    import_mlflow,
    is_mlflow_uri,
)
from pipeline.redaction import redact
from pipeline.tracking.database import ensure_database
from pipeline.tracking.settings import (
    MAX_TAG,
    RUN_KEY,
    TrackingSettings,
    mlflow_key,
    mlflow_value,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

LOGGED_MODEL = "m-"  # first characters of MLflow's ids of logged models
VERSION, DIGEST = "version.", "digest."  # first characters of tags
COMMIT, PARENT_RUN = "mlflow.source.git.commit", "mlflow.parentRunId"  # tags that MLflow's UI reads
_RUN_ID = re.compile(r"[0-9a-f]{32}")


class RunLookupError(UserError, ValueError):
    """MLflow does not know what was asked for, knows several, or cannot be reached."""


def connect(tracking_uri: str) -> "MlflowClient":
    """Client of a server or database, for runs and registered models alike; a missing SQLite database is created.

    Raises:
        TrackingError: the database is damaged.
    """
    import_mlflow()
    from mlflow import MlflowClient

    ensure_database(tracking_uri)
    return MlflowClient(tracking_uri, registry_uri=tracking_uri)


@contextmanager
def mlflow_errors(subject: str) -> Iterator[None]:
    """Turn errors of MLflow into a `RunLookupError` that names the subject and hides passwords."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        raise RunLookupError(f"{subject}: {redact(error.message)}") from None


# URIs


@dataclass(frozen=True)
class ResolvedUri:
    """The run and the model that a `runs:/` or `models:/` URI leads to now; an alias may move later."""

    run_id: str | None  # None: a model without a run
    name: str | None = None  # registered model, where the URI means a version of one
    version: str | None = None
    model_id: str | None = None  # logged model
    run_name: str = field(default="", compare=False)

    def __str__(self) -> str:
        return f"run {self.run_id}" + (f" and {self.name}, version {self.version}" if self.version else "")

    def as_parent(self) -> dict[str, str]:
        """Known facts as plain text, for the tags `parent.*` of a run that starts from these weights."""
        model_version = f"{self.name}/{self.version}" if self.version else None
        facts = {
            "run_id": self.run_id,
            "run": self.run_name,
            "model_id": self.model_id,
            "model_version": model_version,
        }
        return {key: value for key, value in facts.items() if value}


def resolve(client: "MlflowClient", uri: str) -> ResolvedUri:
    """Look up a URI.

    Args:
        uri: `runs:/RUN_ID`, `models:/NAME/VERSION`, `models:/NAME@ALIAS` or `models:/m-MODEL_ID`. A path behind a run's id or
            a model's id is ignored.

    Raises:
        RunLookupError: the URI has none of these forms, or the server does not know it.
    """
    if not is_mlflow_uri(uri):
        raise RunLookupError(
            f"{uri}: name a run (runs:/RUN_ID) or a model version (models:/NAME/VERSION, models:/NAME@ALIAS)"
        )
    with mlflow_errors(uri):
        if uri.startswith(RUN_SCHEME):
            run = client.get_run(uri.removeprefix(RUN_SCHEME).split("/")[0])
            return ResolvedUri(run.info.run_id, model_id=logged_model_id(run), run_name=run.info.run_name or "")
        model = uri.removeprefix(MODEL_SCHEME)
        if model.startswith(LOGGED_MODEL):
            model_id = model.split("/")[0]
            return ResolvedUri(client.get_logged_model(model_id).source_run_id or None, model_id=model_id)
        if "@" in model:
            version = client.get_model_version_by_alias(*model.split("@", 1))
        elif "/" in model:
            version = client.get_model_version(*model.split("/", 1))
        else:
            raise RunLookupError(f"{uri}: which version? Write {uri}/1 or {uri}@ALIAS")
    return ResolvedUri(
        version.run_id or None, version.name, str(version.version), model_id=getattr(version, "model_id", None) or None
    )


def logged_model_id(run: "Run") -> str | None:
    """Id of the last model that a run has logged."""
    outputs = run.outputs.model_outputs if run.outputs else []
    return outputs[-1].model_id if outputs else None


# Runs


def find_run(client: "MlflowClient", named: str) -> "Run":
    """Find one run.

    Args:
        named: id or name of the run, `runs:/RUN_ID`, or the `models:/` URI of a model that it made.

    Raises:
        RunLookupError: there is none, or there are several of that name.
    """
    server = redact(client.tracking_uri)
    with mlflow_errors(f"{named} at {server}"):
        if is_mlflow_uri(named):
            run_id = resolve(client, named).run_id
            if run_id is None:
                raise RunLookupError(f"{named}: this model belongs to no run")
            return client.get_run(run_id)
        if _RUN_ID.fullmatch(named):
            return client.get_run(named)
        runs = search_runs(client, f"attributes.run_name = '{quoted(named)}'")
        if len(runs) == 1:
            return client.get_run(runs[0].info.run_id)  # a search leaves out a part of the inputs
        ids = ", ".join(run.info.run_id for run in runs[:5])
        raise RunLookupError(
            f"{named}: {len(runs)} runs of {server} are so called"
            + (f": give one of the ids {ids}" if runs else ": give a run's folder, id or name")
        )


def find_run_by_key(
    client: "MlflowClient", run_key: str, *, experiment_ids: Sequence[str] | None = None, deleted: bool = False
) -> "Run | None":
    """Run with the given `RUN_KEY`, which the run's folder and its checkpoints hold too.

    Of several it is the oldest: a request to create a run may take effect after its timeout.

    Args:
        experiment_ids: of the experiments to search; all of them if None.
        deleted: find deleted runs too.
    """
    runs = search_runs(
        client, f"tags.`{RUN_KEY}` = '{quoted(run_key)}'", experiment_ids=experiment_ids, deleted=deleted
    )
    oldest = min(runs, key=lambda run: (run.info.start_time, run.info.run_id), default=None)
    return client.get_run(oldest.info.run_id) if oldest is not None else None


def search_runs(
    client: "MlflowClient", condition: str, *, experiment_ids: Sequence[str] | None = None, deleted: bool = False
) -> "list[Run]":
    """All runs that meet a condition in MLflow's search language; exceptions are MLflow's own."""
    from mlflow.entities import ViewType

    if experiment_ids is None:
        experiment_ids = [experiment.experiment_id for experiment in client.search_experiments(view_type=ViewType.ALL)]
    runs: list[Run] = []
    token: str | None = None
    while experiment_ids:
        view = ViewType.ALL if deleted else ViewType.ACTIVE_ONLY
        page = client.search_runs(list(experiment_ids), condition, run_view_type=view, page_token=token)
        runs += page
        token = page.token
        if not token:
            break
    return runs


def quoted(text: str) -> str:
    """
    Raises:
        RunLookupError: the search language cannot hold this text.
    """
    if "'" in text or "\\" in text:
        raise RunLookupError(f"{text!r} is no run: names with quotes cannot be searched for, give the id")
    return text


def find_tracked_run(settings: TrackingSettings, named: str, run_key: str | None) -> "tuple[MlflowClient, Run]":
    """Find a run by its key, else by id, name or URI; returns the client of its server too.

    Raises:
        RunLookupError: the server cannot be reached, or does not know the run.
    """
    client = connect(settings.uri)
    found = find_run_by_key(client, run_key) if run_key else find_run(client, named)
    if found is None:
        raise RunLookupError(f"{named}: {settings.shown_uri} does not know this run")
    return client, found


def metric_histories(client: "MlflowClient", run_id: str, names: Sequence[str]) -> dict[str, list[tuple[int, float]]]:
    """(step, value) of every report of some metrics, by step; of a step that was repeated the last value.

    Raises:
        RunLookupError: the server cannot be reached.
    """
    histories = {}
    for name in names:
        with mlflow_errors(f"{name} of run {run_id}"):
            rows = sorted(client.get_metric_history(run_id, name), key=lambda row: (row.step, row.timestamp))
        histories[name] = sorted({row.step: row.value for row in rows}.items())
    return histories


# Files attached to a run after its end


def find_target(uri: str) -> ResolvedUri:
    """Run to attach files to, at the server that MLFLOW_TRACKING_URI names; see `resolve`.

    Raises:
        RunLookupError: no server is named, or it knows of no such run.
    """
    target = resolve(named_server(uri), uri)
    if target.run_id is None:
        raise RunLookupError(f"{uri}: this model belongs to no run")
    return target


def attach(
    target: ResolvedUri,
    files: Sequence[Path],
    *,
    tags: Mapping[str, str],
    metrics: Mapping[str, float],
    folder: str,
    client: "MlflowClient | None" = None,
) -> None:
    """Log files, tags and metrics to a run, and set the tags on the model version too. A second time replaces the first.

    Args:
        target: from `find_target`.
        files: files and folders, each stored under its own name in `folder` of the run's artifacts.
        client: of the server that has the run; None: the one that MLFLOW_TRACKING_URI names.

    Raises:
        RunLookupError: the server does not accept it.
    """
    from mlflow.entities import Metric, RunTag

    client, run_id = client or named_server(str(target)), target.run_id
    assert run_id is not None
    now = round(time.time() * 1000)
    marks = {mlflow_key(name): mlflow_value(value, MAX_TAG) for name, value in tags.items()}
    with mlflow_errors(str(target)):
        for path in files:
            if path.is_dir():
                client.log_artifacts(run_id, str(path), f"{folder}/{path.name}")
            else:
                client.log_artifact(run_id, str(path), folder)
        client.log_batch(
            run_id,
            metrics=[Metric(mlflow_key(name), value, now, 0) for name, value in metrics.items()],
            tags=[RunTag(name, value) for name, value in marks.items()],
        )
        if target.name and target.version:
            for name, value in marks.items():
                client.set_model_version_tag(target.name, target.version, name, value)


def named_server(subject: str) -> "MlflowClient":
    """Client of the server that MLFLOW_TRACKING_URI names.

    Raises:
        RunLookupError: it names none.
    """
    uri = os.environ.get(TRACKING_URI)
    if not uri:
        raise RunLookupError(f"{subject}: set {TRACKING_URI} to the server or database that knows it")
    return connect(uri)
