"""Process one part of a prediction: a few hundred images in, one Parquet file out, written atomically.

Every image has a row, also if nothing was detected in it or it could not be read. Images are decoded in threads while the
detector processes the previous ones.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from pydantic import PositiveInt
from torch import Tensor

from dfine_core.images import read_image
from dfine_core.inference import LoadedDetector, prepare
from dfine_core.model import distribution
from dfine_core.model.postprocess import Detections, best_pairs
from pipeline import storage
from pipeline.config import ConfigError
from pipeline.data.prepare.image_files import BadImageError, read_image_file
from pipeline.data.shards.manifest import FrozenModel
from pipeline.predict.inputs import InputImage, Inputs, MissingFrame, read_images

PARTS_FOLDER = "parts"
SCHEMA = pa.schema(
    [
        ("image_id", pa.int64()),
        ("file_name", pa.string()),
        ("frame", pa.int64()),  # index of the video frame, from 0
        ("seconds", pa.float64()),  # time from the start of the video
        ("width", pa.int32()),  # null if the image could not be read
        ("height", pa.int32()),
        ("boxes", pa.list_(pa.float32())),  # flat [4K], xyxy in pixels as stored; best first
        ("labels", pa.list_(pa.int32())),  # [K]
        ("scores", pa.list_(pa.float32())),  # [K]
        ("deviations", pa.list_(pa.float32())),  # flat [4K]: left, top, right, bottom edge in pixels; or null
        ("rejected", pa.string()),  # reason if the image could not be read
    ]
)
BATCHES_AHEAD = 3  # micro-batches decoded in advance


class PredictPlan(FrozenModel):
    """Everything that the content of the parts depends on: parts of equal plans belong together."""

    version: int = 1
    inputs: str  # digest
    detector: str  # digest
    num_images: PositiveInt
    part_size: PositiveInt  # images per part; the last one may have fewer
    batch_size: PositiveInt  # images per forward pass
    threshold: float
    deviations: bool

    @property
    def num_parts(self) -> int:
        """Parts of the whole prediction."""
        return -(-self.num_images // self.part_size)

    def image_range(self, part: int) -> tuple[int, int]:
        """Return the index range (first, stop) of the images of a part."""
        return part * self.part_size, min((part + 1) * self.part_size, self.num_images)


@dataclass(frozen=True)
class PartCounts:
    """Counts of one finished part."""

    images: int
    detections: int
    rejected: int


def part_name(part: int) -> str:
    """Return the file name of a part."""
    return f"part-{part:06d}.parquet"


def write_part(
    loaded: LoadedDetector, inputs: Inputs, plan: PredictPlan, part: int, out: str, threads: int
) -> PartCounts:
    """Detect in all images of a part and write its file below `out`."""
    images = read_images(inputs, *plan.image_range(part))
    rows: list[dict[str, Any]] = []
    batch: list[_DecodedImage] = []
    # Rows keep the order of the images. Those that could be decoded fill up batches, whose detections are added to them.
    for decoded in _decode_ahead(images, loaded.config.input_size, threads, BATCHES_AHEAD * plan.batch_size):
        rows.append(decoded.row)
        batch += [decoded] if decoded.pixels is not None else []
        if len(batch) == plan.batch_size:
            _detect_batch(loaded, batch, plan)
            batch = []
    if batch:
        _detect_batch(loaded, batch, plan)
    with storage.open_atomic(storage.join(out, PARTS_FOLDER, part_name(part))) as file:
        pq.write_table(pa.Table.from_pylist(rows, SCHEMA), file, compression="zstd")
    return PartCounts(
        images=len(rows),
        detections=sum(len(row["labels"]) for row in rows),
        rejected=sum(row["rejected"] is not None for row in rows),
    )


def read_part(out: str, part: int) -> pa.Table:
    """Read the file of a part."""
    content = storage.read_bytes(storage.join(out, PARTS_FOLDER, part_name(part)))
    return pq.read_table(pa.BufferReader(content))


def detect_with_deviations(
    loaded: LoadedDetector, pixels: Tensor, sizes: Tensor, *, deviations: bool
) -> tuple[Detections, Tensor]:
    """Detect, and measure the standard deviation of every edge: [B, R, 4] in pixels; R = 0 without `deviations`.

    Args:
        pixels: [B, 3, H, W] uint8.
        sizes: [B, 2] (width, height) of the original images.
        deviations: requires a detector that is not deployed.
    """
    if not deviations:
        return loaded.detect(pixels, sizes), torch.zeros(len(pixels), 0, 4)
    detections, output = loaded.predict(pixels, sizes, every_layer=True)
    _, query, _ = best_pairs(output.logits, detections.scores.shape[1])
    assert output.matching is not None
    assert output.matching.edge_logits is not None
    spread = distribution.edge_deviations(
        output.matching.initial_boxes,
        output.matching.edge_logits[-1],
        loaded.detector.decoder.bins,
        loaded.config.reg_scale,
    )
    spread = spread * sizes.to(loaded.device).repeat(1, 2).unsqueeze(1)  # [B, Q, 4] in pixels
    return detections, spread.gather(1, query.unsqueeze(-1).expand(-1, -1, 4))


@dataclass(frozen=True)
class _DecodedImage:
    row: dict[str, Any]
    pixels: Tensor | None  # [1, 3, H, W] uint8; None if rejected


def _decode_ahead(
    images: Iterable[InputImage | MissingFrame], input_size: tuple[int, int], threads: int, ahead: int
) -> Iterator[_DecodedImage]:
    """Decode images in threads and yield them in order; at most `ahead` of them are in memory."""
    pending: deque[Future[_DecodedImage]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for image in images:
            pending.append(pool.submit(_decode, image, input_size))
            if len(pending) >= ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def _decode(source: InputImage | MissingFrame, input_size: tuple[int, int]) -> _DecodedImage:
    row: dict[str, Any] = dict.fromkeys(SCHEMA.names)
    row |= {"boxes": [], "labels": [], "scores": []}
    row |= {"image_id": source.image_id, "file_name": source.file_name, "frame": source.frame}
    if isinstance(source, MissingFrame):
        return _DecodedImage(row | {"rejected": source.detail}, None)
    try:
        content = read_image_file(source.content) if isinstance(source.content, str) else source.content
        image = read_image(content)
    except (BadImageError, PermissionError, ValueError) as error:
        return _DecodedImage(row | {"rejected": f"{error}"}, None)
    row |= {"seconds": source.seconds, "width": image.width, "height": image.height}
    return _DecodedImage(row, prepare([image], input_size))


def _detect_batch(loaded: LoadedDetector, batch: list[_DecodedImage], plan: PredictPlan) -> None:
    """Add the detections of a batch to its rows."""
    pixels = torch.cat([decoded.pixels for decoded in batch if decoded.pixels is not None])
    sizes = torch.tensor([[decoded.row["width"], decoded.row["height"]] for decoded in batch])
    detections, deviations = detect_with_deviations(loaded, pixels, sizes, deviations=plan.deviations)
    scores, boxes, labels = detections.scores.cpu(), detections.boxes.cpu(), detections.labels.cpu()
    deviations = deviations.cpu()
    for index, decoded in enumerate(batch):
        if not (scores[index].isfinite().all() and boxes[index].isfinite().all()):
            raise ConfigError(
                f"{decoded.row['file_name']}: its detections are not finite; the weights of this detector have diverged"
            )
        kept = scores[index] >= plan.threshold
        decoded.row["boxes"] = boxes[index][kept].float().flatten().numpy()
        decoded.row["labels"] = labels[index][kept].int().numpy()
        decoded.row["scores"] = scores[index][kept].numpy()
        if plan.deviations:
            decoded.row["deviations"] = deviations[index][kept].flatten().numpy()
