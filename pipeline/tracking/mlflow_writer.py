"""Events to MLflow. Sending the same event twice changes nothing: that is what makes retrying safe.

A metric is stored once per name and step. What the server has up to a step is not sent again; and a request that it
took although its answer was lost, it recognises: it keeps one row per (name, step, timestamp, value).
"""

import getpass
import json
import math
import posixpath
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import requests
from mlflow import MlflowClient
from mlflow.entities import (
    Dataset,
    DatasetInput,
    Experiment,
    InputTag,
    LoggedModel,
    LoggedModelInput,
    LoggedModelOutput,
    Metric,
    Param,
    RunTag,
    ViewType,
)
from mlflow.exceptions import MlflowException
from mlflow.models import Model
from mlflow.utils import mlflow_tags

from pipeline.tracking.event_log import Event
from pipeline.tracking.lineage import parent_model
from pipeline.tracking.names import MAX_PARAM, MAX_TAG, RUN_KEY, mlflow_key, mlflow_value
from pipeline.tracking.settings import TrackingSettings

MODEL_KEY = "dfine.model_key"  # tag: finds a logged model again, as `RUN_KEY` a run
# The UI then opens with training runs and their charts, not with traces of language models.
EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}

# Limits of MLflow for one request.
METRICS_PER_BATCH = 1000
PARAMS_PER_BATCH = 100
DIGEST_LENGTH = 36

T = TypeVar("T")

REFUSALS = {"INVALID_PARAMETER_VALUE", "BAD_REQUEST", "MALFORMED_REQUEST", "RESOURCE_ALREADY_EXISTS"}
REFUSED_STATUS = {400, 413}  # of an upload: bad request, too large


class Delivery:
    """One run on one server. Every method may raise, and may then be called again.

    Args:
        files: folder that paths in events are relative to.
        started_at: of the run, in milliseconds.
    """

    def __init__(self, settings: TrackingSettings, run_key: str, started_at: int, files: Path) -> None:
        self._settings, self._run_key, self._started_at, self._files = settings, run_key, started_at, files
        self._client = MlflowClient(settings.uri, registry_uri=settings.uri)
        self._run_id = ""
        self._experiment_id = ""
        self._last_steps: dict[str, int] | None = None  # per metric, on the server; None: ask

    def open_run(self, known_id: str | None) -> str:
        """The run's id: the known one, else that of the run with our key, else of a new run."""
        if not self._run_id:
            if known_id is not None:
                self._experiment_id = self._client.get_run(known_id).info.experiment_id
            else:
                self._experiment_id = self._open_experiment().experiment_id
                known_id = self._find_run() or self._create_run()
            self._run_id = known_id
        return self._run_id

    def send(self, events: Sequence[Event]) -> None:
        """Several events of metrics, or one of another kind."""
        kind = events[0].get("kind")
        try:
            match kind:
                case "metrics":
                    self._send_metrics(events)
                case "begin":
                    self._begin(events[0])
                case "tags":
                    self._set_tags(events[0]["tags"])
                case "running":
                    self._client.update_run(self._run_id, status="RUNNING")
                case "finish":
                    self._client.set_terminated(self._run_id, events[0]["status"], events[0]["time"])
                case "artifact":
                    self._send_artifact(events[0])
                case "model":
                    self._send_model(events[0])
                case _:
                    raise ValueError(f"an event of unknown kind {kind!r}")
        except Exception:
            self._last_steps = None  # some of it may have arrived
            raise

    def is_refusal(self, error: Exception) -> bool:
        """Whether the same event would fail again however often it is sent."""
        if isinstance(error, MlflowException):
            return error.error_code in REFUSALS
        if isinstance(error, requests.HTTPError):
            return error.response is not None and error.response.status_code in REFUSED_STATUS
        if isinstance(error, requests.RequestException):
            return False
        return isinstance(error, ValueError | TypeError | KeyError | FileNotFoundError)

    def _open_experiment(self) -> Experiment:
        name = self._settings.experiment
        experiment = self._client.get_experiment_by_name(name)
        if experiment is None:
            try:
                created = self._client.create_experiment(
                    name, artifact_location=self._settings.artifact_location, tags=EXPERIMENT_TAGS
                )
                return self._client.get_experiment(created)
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
                experiment = self._client.get_experiment_by_name(name)  # another process was faster
        if experiment is None or experiment.lifecycle_stage != "active":
            raise ValueError(f"the experiment {name!r} was deleted on the server: restore it there")
        return experiment

    def _find_run(self) -> str | None:
        found = self._client.search_runs(
            [self._experiment_id], f"tags.`{RUN_KEY}` = '{self._run_key}'", run_view_type=ViewType.ALL
        )
        # Two only if a request to create took effect after its time-out; then the first one keeps the record.
        return min(found, key=lambda run: (run.info.start_time, run.info.run_id)).info.run_id if found else None

    def _create_run(self) -> str:
        tags = {RUN_KEY: self._run_key, mlflow_tags.MLFLOW_USER: _user()}
        if self._settings.parent_run_id:
            tags[mlflow_tags.MLFLOW_PARENT_RUN_ID] = self._settings.parent_run_id
        run = self._client.create_run(self._experiment_id, self._started_at, tags, self._settings.run_name)
        return run.info.run_id

    def _begin(self, event: Event) -> None:
        self._set_tags(event["tags"])
        params = {mlflow_key(key): mlflow_value(value, MAX_PARAM) for key, value in event["params"].items()}
        for batch in _batches([Param(key, value) for key, value in params.items()], PARAMS_PER_BATCH):
            self._client.log_batch(self._run_id, params=batch)
        if event["datasets"]:
            self._client.log_inputs(self._run_id, datasets=[_dataset_input(dataset) for dataset in event["datasets"]])
        if model_id := parent_model(self._client, event.get("parent", {})):
            self._client.log_inputs(self._run_id, models=[LoggedModelInput(model_id)])

    def _set_tags(self, tags: dict[str, str]) -> None:
        entities = [RunTag(mlflow_key(key), mlflow_value(value, MAX_TAG)) for key, value in tags.items()]
        for batch in _batches(entities, PARAMS_PER_BATCH):
            self._client.log_batch(self._run_id, tags=batch)

    def _send_metrics(self, events: Sequence[Event]) -> None:
        if self._last_steps is None:
            # The server's newest value of a metric is the one of the highest step; only the proto says which step.
            newest = self._client.get_run(self._run_id).data.to_proto().metrics
            self._last_steps = {metric.key: metric.step for metric in newest}
        fresh = []
        for event in events:
            for name, value in event["values"].items():
                key, step = mlflow_key(name), event["step"]
                if step > self._last_steps.get(key, -1):
                    self._last_steps[key] = step
                    fresh.append(Metric(key, _storable(value), event["time"], step))
        for batch in _batches(fresh, METRICS_PER_BATCH):
            self._client.log_batch(self._run_id, metrics=batch)

    def _send_artifact(self, event: Event) -> None:
        path = self._files / event["file"]
        if path.is_dir():
            self._client.log_artifacts(self._run_id, str(path), posixpath.join(event["folder"] or "", path.name))
        else:
            self._client.log_artifact(self._run_id, str(path), event["folder"])
        if event.get("shown_as") == "image":
            self._client.set_tag(self._run_id, mlflow_tags.MLFLOW_LOGGED_IMAGES, True)
        elif event.get("shown_as") == "table":
            table = {"path": posixpath.join(event["folder"] or "", path.name), "type": "table"}
            tag = mlflow_tags.MLFLOW_LOGGED_ARTIFACTS
            listed = json.loads(self._client.get_run(self._run_id).data.tags.get(tag, "[]"))
            if table not in listed:
                self._client.set_tag(self._run_id, tag, json.dumps([*listed, table]))

    def _send_model(self, event: Event) -> None:
        """Upload a saved model, tie it to the run and its metrics, and register it. Each step only if not yet done."""
        model = self._find_model(event) or self._client.create_logged_model(
            self._experiment_id, event["name"], self._run_id, {MODEL_KEY: event["key"]}, model_type="detector"
        )
        if model.status != "READY":
            folder = self._files / event["file"]
            description = Model.load(folder)
            description.model_id = description.model_uuid = model.model_id
            description.run_id, description.artifact_path = self._run_id, model.artifact_location
            description.save(folder / "MLmodel")
            self._client.log_model_artifacts(model.model_id, str(folder))
            self._send_model_metrics(model, event)
            outputs = self._client.get_run(self._run_id).outputs
            if model.model_id not in [output.model_id for output in (outputs.model_outputs if outputs else [])]:
                self._client.log_outputs(self._run_id, [LoggedModelOutput(model.model_id, event["step"])])
            self._client.finalize_logged_model(model.model_id, "READY")
        if event["registered_model_name"]:
            version = self._register(event["registered_model_name"], model)
            if event["alias"]:
                self._client.set_registered_model_alias(event["registered_model_name"], event["alias"], version)

    def _find_model(self, event: Event) -> LoggedModel | None:
        found = self._client.search_logged_models([self._experiment_id], f"tags.`{MODEL_KEY}` = '{event['key']}'")
        return found[0] if found else None

    def _send_model_metrics(self, model: LoggedModel, event: Event) -> None:
        """A model's metric is also one of its run; where the run has it at this step, that very row is named."""
        if model.metrics:
            return
        metrics = []
        for name, value in event["metrics"].items():
            key, step = mlflow_key(name), event["step"]
            rows = [row for row in self._client.get_metric_history(self._run_id, key) if row.step == step]
            value, time = (rows[0].value, rows[0].timestamp) if rows else (_storable(value), event["time"])
            metrics.append(Metric(key, value, time, step, model_id=model.model_id))
        for batch in _batches(metrics, METRICS_PER_BATCH):
            self._client.log_batch(self._run_id, metrics=batch)
        self._last_steps = None

    def _register(self, name: str, model: LoggedModel) -> str:
        """The version of the registered model `name` that is this model; made if there is none."""
        try:
            self._client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        source = model.artifact_location  # `models:/m-...` MLflow would look up at the process's default server
        for version in self._client.search_model_versions(f"name = '{name}' AND run_id = '{self._run_id}'"):
            if version.source == source:
                return str(version.version)
        version = self._client.create_model_version(
            name, source, self._run_id, model_id=model.model_id, await_creation_for=0
        )
        return str(version.version)


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # in a container that runs under a number without a name
        return "unknown"


def _storable(value: float) -> float:
    """MLflow keeps NaN as such, but writes the largest float for an infinity, which flattens every chart it is in."""
    return value if math.isfinite(value) else math.nan


def _dataset_input(dataset: dict[str, str]) -> DatasetInput:
    """Lineage only: nothing of the data is read."""
    uri = mlflow_value(dataset["uri"], MAX_PARAM)
    scheme = uri.split("://")[0] if "://" in uri else "local"
    return DatasetInput(
        Dataset(
            name=dataset["name"],
            digest=dataset["digest"].removeprefix("sha256:")[:DIGEST_LENGTH],
            source_type={"gs": "gcs", "file": "local", "https": "http"}.get(scheme, scheme),
            source=json.dumps({"uri": uri}),
        ),
        [InputTag(mlflow_tags.MLFLOW_DATASET_CONTEXT, dataset["context"])],
    )


def _batches(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    return (items[start : start + size] for start in range(0, len(items), size))
