"""Process one part of a prediction: a few hundred images in, one Parquet file out, written atomically.

Every image has a row, also if nothing was detected in it or it could not be read. Images are decoded in threads while the
detector processes the previous ones.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from dfine_core.image_detections import RawDetections
from dfine_core.inference import LoadedDetector, prepare
from dfine_core.uncertainty.drift import ImageValues, image_values
from pipeline import storage
from pipeline.config import ConfigError
from pipeline.data.prepare.image_files import BadImageError
from pipeline.predict.inputs import InputImage, Inputs, MissingFrame, decode_input, read_images
from pipeline.predict.plan import SCHEMA, PredictPlan, part_uri

BATCHES_AHEAD = 3  # micro-batches decoded in advance
ROW_GROUP_IMAGES = 1024  # bounds what a reader of large parts holds


@dataclass(frozen=True)
class PartCounts:
    """Counts of one finished part."""

    images: int
    detections: int
    rejected: int


def write_part(
    loaded: LoadedDetector, inputs: Inputs, plan: PredictPlan, part: int, out: str, threads: int
) -> PartCounts:
    """Detect in all images of a part and write its file below `out`."""
    images = read_images(inputs, *plan.image_range(part))
    rows: list[dict[str, Any]] = []
    batch: list[DecodedImage] = []
    # Rows keep the order of the images. Those that could be decoded fill up batches, whose detections are added to them.
    for decoded in decode_ahead(images, loaded.config.input_size, threads, BATCHES_AHEAD * plan.batch_size):
        rows.append(decoded.row)
        batch += [decoded] if decoded.pixels is not None else []
        if len(batch) == plan.batch_size:
            _detect_batch(loaded, batch, plan)
            batch = []
    if batch:
        _detect_batch(loaded, batch, plan)
    write_rows(rows, part_uri(out, part))
    return PartCounts(
        images=len(rows),
        detections=sum(len(row["labels"]) for row in rows),
        rejected=sum(row["rejected"] is not None for row in rows),
    )


def write_rows(rows: Sequence[dict[str, Any]], uri: str) -> None:
    """Write the file of a part.

    Labels repeat, so that a dictionary makes them small; coordinates and scores hardly do, and one only costs time.
    """
    with storage.open_atomic(uri) as file:
        pq.write_table(
            pa.Table.from_pylist(rows, SCHEMA),
            file,
            compression="zstd",
            use_dictionary=["labels.list.element"],
            row_group_size=ROW_GROUP_IMAGES,
        )


@dataclass(frozen=True)
class DecodedImage:
    """Image of a part on its way to the detector."""

    row: dict[str, Any]
    pixels: Tensor | None  # [1, 3, H, W] uint8; None if rejected


def decode_ahead(
    images: Iterable[InputImage | MissingFrame], input_size: tuple[int, int], threads: int, ahead: int
) -> Iterator[DecodedImage]:
    """Decode images in threads and yield them in order; at most `ahead` of them are in memory."""
    pending: deque[Future[DecodedImage]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for image in images:
            pending.append(pool.submit(_decode, image, input_size))
            if len(pending) >= ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def _decode(source: InputImage | MissingFrame, input_size: tuple[int, int]) -> DecodedImage:
    row: dict[str, Any] = dict.fromkeys(SCHEMA.names)
    row |= {"boxes": [], "labels": [], "scores": []}
    row |= {"image_id": source.image_id, "file_name": source.file_name, "frame": source.frame}
    if isinstance(source, MissingFrame):
        return DecodedImage(row | {"rejected": source.detail}, None)
    try:
        image = decode_input(source)
    except (BadImageError, PermissionError, ValueError) as error:
        return DecodedImage(row | {"rejected": f"{error}"}, None)
    row |= {"seconds": source.seconds, "width": image.width, "height": image.height}
    return DecodedImage(row, prepare([image], input_size))


def _detect_batch(loaded: LoadedDetector, batch: list[DecodedImage], plan: PredictPlan) -> None:
    """Add the detections of a batch to its rows."""
    pixels = torch.cat([decoded.pixels for decoded in batch if decoded.pixels is not None])
    sizes = torch.tensor([[decoded.row["width"], decoded.row["height"]] for decoded in batch])
    least = torch.tensor(plan.thresholds)
    for decoded, raw in zip(batch, loaded.find(pixels, sizes), strict=True):
        if not (raw.scores.isfinite().all() and raw.boxes.isfinite().all()):
            raise ConfigError(
                f"{decoded.row['file_name']}: its detections are not finite; the weights of this detector have diverged"
            )
        found = loaded.keep(raw, least, coverage=plan.coverage, joint=plan.joint, measured=plan.edge_std)
        decoded.row["boxes"] = found.boxes.flatten().numpy()
        decoded.row["labels"] = found.labels.int().numpy()
        decoded.row["scores"] = found.scores.numpy()
        if found.edge_std_px is not None:
            decoded.row["edge_std_px"] = found.edge_std_px.flatten().numpy()
        if found.edge_intervals is not None:
            decoded.row["edge_intervals"] = found.edge_intervals.flatten().numpy()
        if plan.drift_score is not None:
            decoded.row["drift"] = drift_values(loaded, raw, plan.drift_score)


def drift_values(loaded: LoadedDetector, raw: RawDetections, least_score: float) -> ImageValues:
    """Summarise one image for the comparison with the calibration images, whatever the threshold of the prediction."""
    chosen = (raw.scores >= least_score).nonzero().squeeze(1)
    return image_values(raw.scores[chosen], *loaded.edges().widths(raw, chosen), least_score)
