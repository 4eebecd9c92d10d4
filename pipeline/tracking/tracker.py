"""What a training tells MLflow: everything goes into a folder first, and is delivered from there by one thread.

    settings = TrackingSettings.resolve(storage, experiment="dfine/coco", run_name="s-72")
    with Tracker(folder, settings) as tracker:
        tracker.begin(flatten(config), tags={"variant": "s"}, datasets=[...], source_name="jobs/train.py")
        tracker.metrics({"train/loss": 3.1, "speed/images_per_s": 212.0}, step=50)
        tracker.finish("FINISHED")

A server that is slow, down or back later costs the training nothing. One process has the folder open at a time; the
next one continues where the last stopped, however that ended. Params, metrics, tags and status arrive in order; so do
artifacts, each after the records that were logged before it.
"""

import io
import json
import logging
import math
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import TYPE_CHECKING, Literal, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dfine_core.images import open_image
from pipeline.redaction import redact
from pipeline.tracking.event_log import Event
from pipeline.tracking.names import Scalar
from pipeline.tracking.outbox import QueueFolder, milliseconds
from pipeline.tracking.settings import TrackingSettings
from pipeline.tracking.uploader import Courier

if TYPE_CHECKING:
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)

THUMBNAIL_PIXELS = 256  # of the longer side
Status = Literal["FINISHED", "FAILED", "KILLED"]


@dataclass(frozen=True)
class DatasetInput:
    """What a run was trained or validated on."""

    name: str
    digest: str  # of the manifest
    uri: str
    context: Literal["training", "validation"]


class Tracker:
    """One run. Its methods return as soon as the event is in the folder, or raise OSError if the disk does not take it.

    Args:
        folder: on a disk; made if missing.

    Raises:
        ValueError: the folder belongs to another run.
        RuntimeError: another process has it open.
    """

    def __init__(self, folder: Path, settings: TrackingSettings) -> None:
        self._queue = QueueFolder(folder, settings.run_key)
        self._courier = Courier(self._queue, settings)
        self._closed = False

    def begin(
        self,
        params: Mapping[str, Scalar],
        tags: Mapping[str, str],
        datasets: Sequence[DatasetInput] = (),
        source_name: str | None = None,
        parent: Mapping[str, str] | None = None,
    ) -> None:
        """Say what the run is. The first time counts; after that it only marks the run as running again.

        Args:
            parent: where its first weights come from: "model_id" of a logged model, or "run_key" of the run that made it.
        """
        if self._queue.identity.begun:
            self._queue.records.append({"kind": "running"})
            return
        source = {"mlflow.source.name": source_name, "mlflow.source.type": "JOB"} if source_name else {}
        event = {
            "kind": "begin",
            "params": _redacted(params),
            "tags": _redacted(source | dict(tags)),
            "datasets": [_redacted(asdict(dataset)) for dataset in datasets],
            "parent": dict(parent or {}),
        }
        self._queue.records.append(event)
        self._queue.mark_begun()

    def metrics(self, values: Mapping[str, float], step: int, timestamp: float | None = None) -> None:
        """Log values at a step.

        The steps of a name ascend: one that is not above the last is dropped, as steps repeated after a resume.

        Args:
            values: by name, in groups divided by slashes ("train/loss_vfl"). What is not finite is stored as NaN.
            timestamp: seconds since 1970; now if None.
        """
        when = milliseconds(time.time() if timestamp is None else timestamp)
        numbers = {name: float(value) for name, value in values.items()}
        self._queue.records.append({"kind": "metrics", "step": int(step), "time": when, "values": numbers})

    def tags(self, tags: Mapping[str, str]) -> None:
        """Set or replace tags."""
        self._queue.records.append({"kind": "tags", "tags": _redacted(tags)})

    def finish(self, status: Status) -> None:
        self._queue.records.append({"kind": "finish", "status": status, "time": milliseconds(time.time())})

    def artifact(self, source: Path | bytes, path: str) -> None:
        """A file, a folder or bytes as the run's artifact `path`. Copied, so the source may change afterwards."""
        self._append_artifact(source, path)

    def text(self, text: str, path: str) -> None:
        self._append_artifact(redact(text).encode(), path)

    def figure(self, figure: "Figure", path: str) -> None:
        """A drawing, in the format that the suffix of `path` names."""
        drawn = io.BytesIO()
        figure.savefig(drawn, format=PurePosixPath(path).suffix.removeprefix("."))
        self._append_artifact(drawn.getvalue(), path)

    def table(self, columns: Mapping[str, Sequence[Scalar]], path: str) -> None:
        """Columns of one length, as a table that the UI shows. `path` ends in .json."""
        lengths = {name: len(column) for name, column in columns.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"table {path}: its columns differ in length, {lengths}")
        if not path.endswith(".json"):
            raise ValueError(f"table {path}: MLflow shows tables from .json files")
        rows = [[_cell(value) for value in row] for row in zip(*columns.values(), strict=True)]
        content = json.dumps({"columns": list(columns), "data": rows}, allow_nan=False)
        self._append_artifact(content.encode(), path, shown_as="table")

    def image(self, name: str, image: "Image.Image | NDArray[np.uint8] | Figure", step: int) -> None:
        """One picture of a series over steps, which the UI shows as a grid.

        Args:
            image: an array is [H, W, 3] uint8 RGB.
        """
        if isinstance(image, np.ndarray):
            image = Image.fromarray(image)
        elif not isinstance(image, Image.Image):
            drawn = io.BytesIO()
            image.savefig(drawn, format="png")
            image = open_image(drawn.getvalue())
        picture = image.convert("RGB")
        thumbnail = picture.copy()
        thumbnail.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS))
        # The UI reads name, step and time out of the file name, and takes the thumbnail for the grid.
        now = milliseconds(time.time())
        stem = f"images/{name.replace('/', '~')}+step+{int(step)}+timestamp+{now}+{uuid.uuid4()}"
        for pixels, suffix in ((picture, ".png"), (thumbnail, "+compressed.webp")):
            encoded = io.BytesIO()
            pixels.save(encoded, suffix.rpartition(".")[2])
            self._append_artifact(encoded.getvalue(), stem + suffix, shown_as="image")

    def model(
        self,
        folder: Path,
        *,
        name: str,
        step: int,
        metrics: Mapping[str, float],
        registered_model_name: str | None = None,
        alias: str | None = None,
    ) -> None:
        """A saved MLflow model as a logged model of this run.

        Args:
            metrics: of this model, under the names that they have in the run at `step`.
            registered_model_name: also make it a version of this registered model, and let `alias` point to that.
        """
        if alias and not registered_model_name:
            raise ValueError(f"alias {alias!r} belongs to a registered model: give registered_model_name")
        event = {
            "kind": "model",
            "key": uuid.uuid4().hex,
            "file": self._queue.keep(folder, name),
            "name": name,
            "step": int(step),
            "time": milliseconds(time.time()),
            "metrics": {key: float(value) for key, value in metrics.items()},
            "registered_model_name": registered_model_name,
            "alias": alias,
        }
        self._queue.artifacts.append(event)

    @property
    def run_key(self) -> str:
        """Identifies the run from the start; the tag `dfine.run_key`."""
        return self._queue.identity.run_key

    @property
    def run_id(self) -> str | None:
        """MLflow's id of the run; None until the server was reached."""
        return self._queue.delivered.run_id

    def wait_for_run_id(self, timeout: float) -> str | None:
        return self._courier.wait_for_run_id(timeout)

    @property
    def pending(self) -> int:
        """Events not yet delivered."""
        return self._queue.pending

    def flush(self, timeout: float) -> bool:
        """Try at once, and wait at most `timeout` seconds; whether everything is delivered."""
        return self._courier.flush(timeout)

    def close(self, timeout: float = 10.0) -> None:
        """Deliver what can be within `timeout` seconds. The rest stays in the folder for the next who opens it."""
        if self._closed:
            return
        self._closed = True
        if not self.flush(timeout):
            logger.warning(
                "%d events for MLflow wait in %s and are delivered when the run continues",
                self.pending,
                self._queue.path,
            )
        self._queue.sync()
        self._courier.stop()
        self._queue.unlock_writing()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _append_artifact(self, source: Path | bytes, path: str, shown_as: str | None = None) -> None:
        place = PurePosixPath(path)
        if place.is_absolute() or ".." in place.parts or not place.name:
            raise ValueError(f"artifact path {path!r} must lead to a file inside the run's artifacts")
        folder = None if place.parent == PurePosixPath() else str(place.parent)
        file = self._queue.keep(source, place.name)
        self._queue.artifacts.append({"kind": "artifact", "file": file, "folder": folder, "shown_as": shown_as})


def _redacted(values: Mapping[str, Scalar]) -> Event:
    return {name: redact(value) if isinstance(value, str) else value for name, value in values.items()}


def _cell(value: Scalar) -> Scalar:
    """JSON has no NaN."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
