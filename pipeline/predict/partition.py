"""One part of a prediction: a few hundred pictures in, one Parquet file out, written whole or not at all.

A row is a picture, also where nothing was found in it or it could not be read. Pictures are decoded in threads while the
detector works on those before them.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor

from dfine_core.images import read_image
from dfine_core.inference import LoadedDetector, prepare
from dfine_core.model import distribution
from dfine_core.model.postprocess import Detections, best_pairs
from pipeline import storage
from pipeline.config import ConfigError
from pipeline.data.prepare.image_files import BadImageError, read_image_file
from pipeline.data.shards.manifest import FrozenModel
from pipeline.predict.inputs import Inputs, Picture, Unreadable, read_pictures

PARTS = "parts"
SCHEMA = pa.schema(
    [
        ("image_id", pa.int64()),
        ("file_name", pa.string()),
        ("frame", pa.int64()),  # of a video, from 0
        ("seconds", pa.float64()),  # into the video
        ("width", pa.int32()),  # null where the picture could not be read
        ("height", pa.int32()),
        ("boxes", pa.list_(pa.float32())),  # flat [4K], xyxy in pixels as stored; best first
        ("labels", pa.list_(pa.int32())),  # [K]
        ("scores", pa.list_(pa.float32())),  # [K]
        ("deviations", pa.list_(pa.float32())),  # flat [4K], of the left, top, right, bottom edge in pixels; or null
        ("rejected", pa.string()),  # why it could not be read
    ]
)
AHEAD = 3  # micro-batches that are decoded or being decoded


class Plan(FrozenModel):
    """What makes the parts what they are: files of one plan go together."""

    version: int = 1
    inputs: str  # digest
    detector: str  # digest
    pictures: PositiveInt
    part: PositiveInt  # pictures in each but the last
    batch: PositiveInt  # that the detector sees at once
    threshold: float
    deviations: bool

    @property
    def parts(self) -> int:
        return -(-self.pictures // self.part)

    def pictures_of(self, number: int) -> tuple[int, int]:
        return number * self.part, min((number + 1) * self.part, self.pictures)


@dataclass(frozen=True)
class Counts:
    pictures: NonNegativeInt
    detections: int
    rejected: int


def part_name(number: int) -> str:
    return f"part-{number:06d}.parquet"


def write_part(loaded: LoadedDetector, inputs: Inputs, plan: Plan, number: int, out: str, threads: int) -> Counts:
    """Detect in all pictures of part `number` and write its file below `out`."""
    ahead = AHEAD * plan.batch
    pictures = read_pictures(inputs, *plan.pictures_of(number))
    rows: list[dict[str, Any]] = []
    batch: list[_Opened] = []
    for opened in _opened(pictures, loaded.config.input_size, threads, ahead):
        rows.append(opened.row)
        batch += [opened] if opened.pixels is not None else []
        if len(batch) == plan.batch:
            _detect(loaded, batch, plan)
            batch = []
    if batch:
        _detect(loaded, batch, plan)
    with storage.open_atomic(storage.join(out, PARTS, part_name(number))) as file:
        pq.write_table(pa.Table.from_pylist(rows, SCHEMA), file, compression="zstd")
    return Counts(
        pictures=len(rows),
        detections=sum(len(row["labels"]) for row in rows),
        rejected=sum(row["rejected"] is not None for row in rows),
    )


def read_part(out: str, number: int) -> pa.Table:
    content = storage.read_bytes(storage.join(out, PARTS, part_name(number)))
    return pq.read_table(pa.BufferReader(content))


def detect(loaded: LoadedDetector, pixels: Tensor, sizes: Tensor, *, deviations: bool) -> tuple[Detections, Tensor]:
    """All detections, and the standard deviation of their edges: [B, R, 4] in pixels, R = 0 unless asked for.

    Args:
        pixels: [B, 3, H, W] uint8.
        sizes: [B, 2] (width, height) of the images before they were stretched.
        deviations: needs the detector as it was before `deploy()`.
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
    spread = spread * sizes.to(loaded.device).repeat(1, 2).unsqueeze(1)
    chosen = spread.gather(1, query.unsqueeze(-1).expand(-1, -1, 4))
    return detections, chosen


@dataclass(frozen=True)
class _Opened:
    row: dict[str, Any]
    pixels: Tensor | None  # [1, 3, H, W] uint8


def _opened(
    pictures: Iterable[Picture | Unreadable], input_size: tuple[int, int], threads: int, ahead: int
) -> Iterator[_Opened]:
    """The pictures in their order, decoded in threads, at most `ahead` of them at a time."""
    waiting: deque[Future[_Opened]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for picture in pictures:
            waiting.append(pool.submit(_open, picture, input_size))
            if len(waiting) >= ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _open(picture: Picture | Unreadable, input_size: tuple[int, int]) -> _Opened:
    row: dict[str, Any] = dict.fromkeys(SCHEMA.names)
    row |= {"boxes": [], "labels": [], "scores": []}
    row |= {"image_id": picture.image_id, "file_name": picture.file_name, "frame": picture.frame}
    if isinstance(picture, Unreadable):
        return _Opened(row | {"rejected": picture.detail}, None)
    try:
        content = read_image_file(picture.content) if isinstance(picture.content, str) else picture.content
        image = read_image(content)
    except (BadImageError, PermissionError, ValueError) as error:
        return _Opened(row | {"rejected": f"{error}"}, None)
    row |= {"seconds": picture.seconds, "width": image.width, "height": image.height}
    return _Opened(row, prepare([image], input_size))


def _detect(loaded: LoadedDetector, batch: list[_Opened], plan: Plan) -> None:
    """Put what is found in a batch into its rows."""
    pixels = torch.cat([opened.pixels for opened in batch if opened.pixels is not None])
    sizes = torch.tensor([[opened.row["width"], opened.row["height"]] for opened in batch])
    found, spread = detect(loaded, pixels, sizes, deviations=plan.deviations)
    scores, boxes, labels, spread = found.scores.cpu(), found.boxes.cpu(), found.labels.cpu(), spread.cpu()
    for place, opened in enumerate(batch):
        if not (scores[place].isfinite().all() and boxes[place].isfinite().all()):
            raise ConfigError(
                f"{opened.row['file_name']}: its detections are not finite numbers; the weights have diverged"
            )
        kept = scores[place] >= plan.threshold
        opened.row["boxes"] = boxes[place][kept].float().flatten().numpy()
        opened.row["labels"] = labels[place][kept].int().numpy()
        opened.row["scores"] = scores[place][kept].numpy()
        if plan.deviations:
            opened.row["deviations"] = spread[place][kept].flatten().numpy()
