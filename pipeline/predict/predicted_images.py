"""Detections of a finished prediction, image by image, read from its parts with a few of them in memory."""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline import storage
from pipeline.config import ConfigError
from pipeline.predict.plan import PARTS_FOLDER, PredictPlan, missing_parts, part_uri, read_plan

# Read in advance, in threads. A scan by `pyarrow.dataset` would hold everything that its consumer has not taken.
PARTS_AHEAD = 4
BATCH_IMAGES = 1024


@dataclass(frozen=True, eq=False)
class PredictedImage:
    """Detections of one image, best first, or the reason why it could not be read."""

    image_id: int
    file_name: str
    frame: int | None  # index of the video frame, from 0
    seconds: float | None  # time from the start of the video
    width: int | None  # None if the image could not be read
    height: int | None
    boxes: NDArray[np.float32]  # [K, 4] xyxy in pixels of the image as it is stored
    labels: NDArray[np.int32]  # [K]
    scores: NDArray[np.float32]  # [K] in [0, 1]; calibrated if the detector was
    names: tuple[str, ...]  # [K] classes
    edge_std_px: NDArray[np.float32] | None  # [K, 4] left, top, right, bottom edge; NaN: cut by tiles
    edge_intervals: (
        NDArray[np.float32] | None
    )  # [K, 4, 2] lowest and highest coordinate of each edge, px; or not measured
    rejected: str | None


def predicted_images(out: str) -> Iterator[PredictedImage]:
    """Yield all images of a prediction with their detections, in the order of the inputs.

    Args:
        out: folder that `dfine predict` has written, path or URI.

    Raises:
        ConfigError: the folder holds no prediction, or an unfinished one.
    """
    plan = read_plan(out)
    class_names = [category.name for category in plan.categories]
    for batch in record_batches(out, plan):
        values = {
            name: _per_image(batch, name) for name in ("boxes", "labels", "scores", "edge_std_px", "edge_intervals")
        }
        columns = ("image_id", "file_name", "frame", "seconds", "width", "height", "rejected")
        for index, row in enumerate(batch.select(columns).to_pylist()):
            labels, read = values["labels"][index], row["rejected"] is None
            std, intervals = values["edge_std_px"][index], values["edge_intervals"][index]
            yield PredictedImage(
                **row,
                boxes=values["boxes"][index].reshape(-1, 4),
                labels=labels,
                scores=values["scores"][index],
                names=tuple(class_names[label] for label in labels.tolist()),
                edge_std_px=std.reshape(-1, 4) if plan.edge_std and read else None,
                edge_intervals=intervals.reshape(-1, 4, 2) if plan.coverage is not None and read else None,
            )


def record_batches(out: str, plan: PredictPlan, columns: Sequence[str] | None = None) -> Iterator[pa.RecordBatch]:
    """Yield the rows of all parts in order, by default with all columns of `SCHEMA`.

    Raises:
        ConfigError: parts are missing.
    """
    if missing := missing_parts(out, plan):
        raise ConfigError(
            f"{storage.join(out, PARTS_FOLDER)}: {len(missing)} of {plan.num_parts} parts are missing;"
            " run the same dfine predict again to write them"
        )
    pending: deque[Future[pa.Table]] = deque()
    with ThreadPoolExecutor(PARTS_AHEAD) as pool:
        for part in range(plan.num_parts):
            pending.append(pool.submit(read_part, out, part, columns))
            if len(pending) > PARTS_AHEAD:
                yield from pending.popleft().result().to_batches(BATCH_IMAGES)
        while pending:
            yield from pending.popleft().result().to_batches(BATCH_IMAGES)


def read_part(out: str, part: int, columns: Sequence[str] | None = None) -> pa.Table:
    """Read one part, by default with all columns; of an object store, only the bytes of these columns."""
    filesystem, path = storage.resolve(part_uri(out, part))
    with filesystem.open_input_file(path) as stream, pq.ParquetFile(stream) as file:
        return file.read(None if columns is None else list(columns), use_threads=False)


def counts_per_image(batch: pa.RecordBatch) -> NDArray[np.int64]:
    """Number of detections of every row, [rows]."""
    lengths: Any = batch.column("labels").value_lengths()
    return np.asarray(lengths.to_numpy(zero_copy_only=False), np.int64)


def _per_image(batch: pa.RecordBatch, name: str) -> list[NDArray[Any]]:
    """Values of a list column, by row; a null is empty."""
    column: Any = batch.column(name)
    lengths = column.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
    values = column.flatten().to_numpy(zero_copy_only=False)
    return np.split(values, np.cumsum(lengths)[:-1])
