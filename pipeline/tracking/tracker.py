"""Tracker of one MLflow run: events go into an outbox on disk, from which a thread uploads them.

    settings = TrackingSettings.resolve(storage, experiment="dfine/coco", run_name="s-72")
    with Tracker(folder, settings) as tracker:
        tracker.begin(flatten(config), tags={"variant": "s"}, datasets=[...], source_name="jobs/train.py")
        tracker.metrics({"train/loss": 3.1, "speed/images_per_s": 212.0}, step=50)
        tracker.finish("FINISHED")

A slow or unreachable server does not delay the training. Several processes may log to one run; one at a time uploads, and the
next one continues where the last one stopped, however that ended. Params, metrics, tags and status arrive in order; so do
artifacts, each after the records that were logged before it. FINISHED arrives after everything.
"""

import hashlib
import io
import json
import logging
import math
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import TYPE_CHECKING, Literal, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dfine_core.images import open_image
from pipeline.redaction import redact
from pipeline.tracking.outbox import Event, Lane, Outbox, Pending, milliseconds
from pipeline.tracking.settings import Scalar, TrackingSettings
from pipeline.tracking.uploader import Uploader

if TYPE_CHECKING:
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)

THUMBNAIL_PIXELS = 256  # longer side
PATIENCE_S = 60.0  # without progress at the end of a run
PATIENCE_AFTER_ERROR_S = 10.0  # the same where an error ended it
LIMIT_AFTER_INTERRUPT_S = 2.0  # after Ctrl-C or SIGTERM, with progress or without
Status = Literal["FINISHED", "FAILED", "KILLED"]


@dataclass(frozen=True)
class DatasetInput:
    """Data set that a run was trained or validated on."""

    name: str
    digest: str  # SHA-256 of the manifest
    uri: str
    context: Literal["training", "validation"]


class Tracker:
    """Log of one MLflow run. Methods return once the event is in the outbox; they raise OSError if the disk is full or gone.

    Args:
        folder: the outbox, on a disk; created if missing.
        standby: upload only while somebody waits for it; another process uploads otherwise.

    Raises:
        OutboxError: the folder belongs to another run, or is damaged.
    """

    def __init__(self, folder: Path, settings: TrackingSettings, *, standby: bool = False) -> None:
        self._outbox = Outbox(folder, settings.run_key, settings.to_note())
        self._uploader = Uploader(self._outbox, settings, standby=standby)
        self._closed = False

    def begin(
        self,
        params: Mapping[str, Scalar],
        tags: Mapping[str, str],
        datasets: Sequence[DatasetInput] = (),
        source_name: str | None = None,
        parent: Mapping[str, str] | None = None,
    ) -> None:
        """Log params, tags and data sets. Only the first call does so; later ones mark the run as running again.

        Args:
            parent: source of the initial weights: "model_id" of a logged model, or "run_id" or "run_key" of the run that made it.
        """
        source = {"mlflow.source.name": source_name, "mlflow.source.type": "JOB"} if source_name else {}
        event = {
            "kind": "begin",
            "params": _redacted(params),
            "tags": _redacted(source | dict(tags)),
            "datasets": [_redacted(asdict(dataset)) for dataset in datasets],
            "parent": dict(parent or {}),
        }
        self._outbox.begin(event)

    def metrics(self, values: Mapping[str, float], step: int, timestamp: float | None = None) -> None:
        """Log values at a step.

        The steps of a metric ascend: a step that is not above the last one is dropped, because a resumed run repeats steps.

        Args:
            values: by name, in groups divided by slashes ("train/loss_vfl"). Infinities are stored as NaN.
            timestamp: seconds since 1970; now if None.
        """
        when = milliseconds(time.time() if timestamp is None else timestamp)
        numbers = {name: float(value) for name, value in values.items()}
        self._log({"kind": "metrics", "step": int(step), "time": when, "values": numbers})

    def tags(self, tags: Mapping[str, str]) -> None:
        """Set or replace tags."""
        self._log({"kind": "tags", "tags": _redacted(tags)})

    def finish(self, status: Status) -> None:
        """Mark the run as ended. FINISHED stays until the run begins again."""
        self._outbox.finish({"kind": "finish", "status": status, "time": milliseconds(time.time())})

    def artifact(self, source: Path | bytes, path: str) -> None:
        """Log a file, a folder or bytes as the artifact `path`. It is copied, so the source may change afterwards."""
        self._append_artifact(source, path)

    def text(self, text: str, path: str) -> None:
        """Log a text, without passwords, as the artifact `path`."""
        self._append_artifact(redact(text).encode(), path)

    def figure(self, figure: "Figure", path: str) -> None:
        """Log a figure, in the format that the suffix of `path` names."""
        stream = io.BytesIO()
        figure.savefig(stream, format=PurePosixPath(path).suffix.removeprefix("."))
        self._append_artifact(stream.getvalue(), path)

    def table(self, columns: Mapping[str, Sequence[Scalar]], path: str) -> None:
        """Log columns of equal length as a table that the UI displays. `path` ends in .json."""
        lengths = {name: len(column) for name, column in columns.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"table {path}: its columns differ in length, {lengths}")
        if not path.endswith(".json"):
            raise ValueError(f"table {path}: MLflow shows tables from .json files")
        rows = [[_cell(value) for value in row] for row in zip(*columns.values(), strict=True)]
        content = json.dumps({"columns": list(columns), "data": rows}, allow_nan=False)
        self._append_artifact(content.encode(), path, shown_as="table")

    def image(self, name: str, image: "Image.Image | NDArray[np.uint8] | Figure", step: int) -> None:
        """Log one image of a series over steps, which the UI displays as a grid. A step is logged once, as in `metrics`.

        Args:
            image: an array is [H, W, 3] uint8 RGB.
        """
        once = f"image/{name}/{int(step)}"
        if self._outbox.is_logged(once):
            return
        if isinstance(image, np.ndarray):
            image = Image.fromarray(image)
        elif not isinstance(image, Image.Image):
            stream = io.BytesIO()
            image.savefig(stream, format="png")
            image = open_image(stream.getvalue())
        full = image.convert("RGB")
        thumbnail = full.copy()
        thumbnail.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS))
        # The UI reads name, step and time from the file name, and uses the thumbnail for the grid.
        now = milliseconds(time.time())
        stem = f"images/{name.replace('/', '~')}+step+{int(step)}+timestamp+{now}+{uuid.uuid4()}"
        events = []
        for pixels, suffix in ((full, ".png"), (thumbnail, "+compressed.webp")):
            encoded = io.BytesIO()
            pixels.save(encoded, suffix.rpartition(".")[2])
            events.append(self._artifact_event(encoded.getvalue(), stem + suffix, shown_as="image"))
        self._outbox.append(*events, lane=Lane.ARTIFACTS, once=once)

    def model(
        self,
        folder: Path,
        *,
        name: str,
        step: int,
        metrics: Mapping[str, float],
        dataset: DatasetInput | None = None,
        registered_model_name: str | None = None,
        alias: str | None = None,
    ) -> None:
        """Log a saved MLflow model: once for a name and step, however often an interrupted run comes to its end.

        Args:
            metrics: of this model, under the names that they have in the run at `step`.
            dataset: the data set that they were measured on, logged by `begin`.
            registered_model_name: also make it a version of this registered model.
            alias: of the registered model; made to point to that version.
        """
        if alias and not registered_model_name:
            raise ValueError(f"alias {alias!r} belongs to a registered model: give registered_model_name")
        once = f"model/{name}/{int(step)}/{registered_model_name or ''}/{alias or ''}"
        if self._outbox.is_logged(once):
            return
        event = {
            "kind": "model",
            "key": hashlib.sha256(f"{self.run_key}/{name}/{int(step)}".encode()).hexdigest()[:32],
            **self._outbox.store_content(folder, name),
            "name": name,
            "step": int(step),
            "time": milliseconds(time.time()),
            "metrics": {key: float(value) for key, value in metrics.items()},
            "dataset": _redacted(asdict(dataset)) if dataset else None,
            "registered_model_name": registered_model_name,
            "alias": alias,
        }
        self._outbox.append(event, lane=Lane.ARTIFACTS, once=once)

    @property
    def folder(self) -> Path:
        """Folder of the outbox."""
        return self._outbox.path

    @property
    def run_key(self) -> str:
        """Key that identifies the run from its start; the tag `dfine.run_key`."""
        return self._outbox.run_key

    @property
    def run_id(self) -> str | None:
        """MLflow's id of the run; None until the server has been reached."""
        return self._outbox.run_id

    def wait_for_run_id(self, timeout: float) -> str | None:
        """Wait at most `timeout` seconds for MLflow's id of the run."""
        return self._uploader.wait_for_run_id(timeout)

    @property
    def pending(self) -> int:
        """Number of events not yet uploaded."""
        return self._outbox.pending().events

    @property
    def rejected(self) -> list[tuple[Event, str]]:
        """Events that the server refused for good, each with its reason."""
        return self._outbox.rejected()

    def flush(self, timeout: float) -> bool:
        """Upload now, and wait at most `timeout` seconds; return whether everything is uploaded."""
        return not self.deliver(math.inf, limit=timeout).events

    def deliver(
        self,
        patience: float = PATIENCE_S,
        show: Callable[[Pending], None] = lambda _: None,
        limit: float = math.inf,
    ) -> Pending:
        """Upload now, and wait as long as the server makes progress; return what is left.

        Args:
            patience: seconds without progress after which waiting ends.
            show: called once a second with what is left.
            limit: seconds after which waiting ends in any case.
        """
        return self._uploader.deliver(patience, limit, show)

    def stop(self) -> None:
        """End the upload. The rest stays in the outbox for the next process that opens it."""
        self._closed = True
        self._uploader.stop()

    def close(self, patience: float = PATIENCE_S, limit: float = math.inf) -> None:
        """Upload as `deliver` does, and stop."""
        if self._closed:
            return
        try:
            if left := self.deliver(patience, limit=limit).events:
                logger.warning(
                    "%d events for MLflow wait in %s; the same command again, or `dfine record`, delivers them",
                    left,
                    self._outbox.path,
                )
        finally:
            self.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        elif isinstance(error, Exception):
            self.close(PATIENCE_AFTER_ERROR_S)
        else:
            self.close(limit=LIMIT_AFTER_INTERRUPT_S)

    def _log(self, event: Event) -> None:
        self._outbox.append(event, lane=Lane.RECORDS)

    def _append_artifact(self, source: Path | bytes, path: str, shown_as: str | None = None) -> None:
        self._outbox.append(self._artifact_event(source, path, shown_as), lane=Lane.ARTIFACTS)

    def _artifact_event(self, source: Path | bytes, path: str, shown_as: str | None = None) -> Event:
        target = PurePosixPath(path)
        if target.is_absolute() or ".." in target.parts or not target.name:
            raise ValueError(f"artifact path {path!r} must lead to a file inside the run's artifacts")
        folder = None if target.parent == PurePosixPath() else str(target.parent)
        stored = self._outbox.store_content(source, target.name)
        return {"kind": "artifact", **stored, "folder": folder, "shown_as": shown_as}


def _redacted(values: Mapping[str, Scalar]) -> Event:
    return {name: redact(value) if isinstance(value, str) else value for name, value in values.items()}


def _cell(value: Scalar) -> Scalar:
    """Replace numbers that JSON does not have by None."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
