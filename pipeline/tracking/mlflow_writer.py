"""Writer of events to MLflow. Sending the same event twice changes nothing, which makes retries safe.

A metric is stored once per name and step. Steps that the server already has are not sent again. If the response to a request
was lost, repeating the request adds nothing: the server keeps one row per (name, step, timestamp, value).
"""

import getpass
import json
import math
import posixpath
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import requests
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
)
from mlflow.exceptions import MlflowException
from mlflow.models import Model
from mlflow.utils import mlflow_tags

from pipeline.tracking.client import connect, find_run_by_key
from pipeline.tracking.lineage import parent_model
from pipeline.tracking.model_registry import register_model
from pipeline.tracking.outbox import Event
from pipeline.tracking.settings import MAX_PARAM, MAX_TAG, RUN_KEY, TrackingSettings, mlflow_key, mlflow_value

MODEL_KEY = "dfine.model_key"  # tag: finds a logged model again, like `RUN_KEY` a run
# The UI then opens with training runs and their charts, not with traces of language models.
EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}

# MLflow's limits for one request.
METRICS_PER_BATCH = 1000
PARAMS_PER_BATCH = 100
DIGEST_LENGTH = 36

T = TypeVar("T")

REFUSALS = {"INVALID_PARAMETER_VALUE", "BAD_REQUEST", "MALFORMED_REQUEST", "RESOURCE_ALREADY_EXISTS"}
REFUSED_STATUS = {400, 413}  # HTTP: bad request, too large


class MlflowWriter:
    """One run on one server. Every method may raise, and may then be called again.

    Args:
        started_at: start of the run, in milliseconds since 1970.
        content_of: path of an event's content, checked.
    """

    def __init__(
        self, settings: TrackingSettings, *, run_key: str, started_at: int, content_of: Callable[[Event], Path]
    ) -> None:
        self._settings, self._run_key, self._started_at, self._content_of = settings, run_key, started_at, content_of
        self._client = connect(settings.uri)
        self._run_id = ""
        self._experiment_id = ""
        self._last_steps: dict[str, int] | None = None  # by metric, on the server; None: not known

    def open_run(self, known_id: str | None) -> str:
        """Return the run's id: the known one, else that of the run with our key, else that of a new run."""
        if not self._run_id:
            if known_id is not None:
                self._experiment_id = self._client.get_run(known_id).info.experiment_id
            else:
                self._experiment_id = self._open_experiment().experiment_id
                known_id = self._find_run() or self._create_run()
            self._run_id = known_id
        return self._run_id

    def send(self, events: Sequence[Event]) -> None:
        """Send several events of metrics, or one event of another kind."""
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
            self._last_steps = None  # part of the request may have taken effect
            raise

    def is_refusal(self, error: Exception) -> bool:
        """Return whether the server has refused the event itself, so that every retry would fail."""
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
                experiment = self._client.get_experiment_by_name(name)  # another process has created it meanwhile
        if experiment is None or experiment.lifecycle_stage != "active":
            raise ValueError(f"the experiment {name!r} was deleted on the server: restore it there")
        return experiment

    def _find_run(self) -> str | None:
        run = find_run_by_key(self._client, self._run_key, experiment_ids=[self._experiment_id], deleted=True)
        return run.info.run_id if run is not None else None

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

    def read_last_steps(self) -> dict[str, int]:
        """Read the newest step of every metric from the server; `send` does so when it does not know them."""
        # The server's newest value of a metric is the one with the highest step; only the proto holds that step.
        newest = self._client.get_run(self._run_id).data.to_proto().metrics
        self._last_steps = {metric.key: metric.step for metric in newest}
        return self._last_steps

    def _send_metrics(self, events: Sequence[Event]) -> None:
        last_steps = self._last_steps if self._last_steps is not None else self.read_last_steps()
        fresh = []
        for event in events:
            for name, value in event["values"].items():
                key, step = mlflow_key(name), event["step"]
                if step > last_steps.get(key, -1):
                    last_steps[key] = step
                    fresh.append(Metric(key, _storable(value), event["time"], step))
        for batch in _batches(fresh, METRICS_PER_BATCH):
            self._client.log_batch(self._run_id, metrics=batch)

    def _send_artifact(self, event: Event) -> None:
        path = self._content_of(event)
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
        """Upload a saved model, link it to the run and its metrics, and register it. Steps that are already done are skipped."""
        model = self._find_model(event) or self._client.create_logged_model(
            self._experiment_id, event["name"], self._run_id, {MODEL_KEY: event["key"]}, model_type="detector"
        )
        if model.status != "READY":
            folder = self._content_of(event)
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
            name, alias = event["registered_model_name"], event["alias"]
            register_model(self._client, model, run_id=self._run_id, name=name, alias=alias)

    def _find_model(self, event: Event) -> LoggedModel | None:
        models = self._client.search_logged_models([self._experiment_id], f"tags.`{MODEL_KEY}` = '{event['key']}'")
        return models[0] if models else None

    def _send_model_metrics(self, model: LoggedModel, event: Event) -> None:
        """Log the metrics of a model. Where the run has one at this step, the model refers to that very row."""
        if model.metrics:
            return
        measured_on = _entity_of(event["dataset"]) if event.get("dataset") else None
        dataset = {"dataset_name": measured_on.name, "dataset_digest": measured_on.digest} if measured_on else {}
        metrics = []
        for name, value in event["metrics"].items():
            key, step = mlflow_key(name), event["step"]
            rows = [row for row in self._client.get_metric_history(self._run_id, key) if row.step == step]
            value, time = (rows[0].value, rows[0].timestamp) if rows else (_storable(value), event["time"])
            metrics.append(Metric(key, value, time, step, model_id=model.model_id, **dataset))
        for batch in _batches(metrics, METRICS_PER_BATCH):
            self._client.log_batch(self._run_id, metrics=batch)
        self._last_steps = None


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container may run under a user id without a name
        return "unknown"


def _storable(value: float) -> float:
    """Replace infinities by NaN: MLflow stores the largest float for them, which flattens every chart."""
    return value if math.isfinite(value) else math.nan


def _dataset_input(dataset: dict[str, str]) -> DatasetInput:
    """Input of a run with its use as a tag."""
    return DatasetInput(_entity_of(dataset), [InputTag(mlflow_tags.MLFLOW_DATASET_CONTEXT, dataset["context"])])


def _entity_of(dataset: dict[str, str]) -> Dataset:
    """Describe a data set for the lineage; the data itself is not read."""
    uri = mlflow_value(dataset["uri"], MAX_PARAM)
    scheme = uri.split("://")[0] if "://" in uri else "local"
    return Dataset(
        name=dataset["name"],
        digest=dataset["digest"].removeprefix("sha256:")[:DIGEST_LENGTH],
        source_type={"gs": "gcs", "file": "local", "https": "http"}.get(scheme, scheme),
        source=json.dumps({"uri": uri}),
    )


def _batches(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    return (items[start : start + size] for start in range(0, len(items), size))
