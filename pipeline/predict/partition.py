"""Process one part of a prediction: a few hundred images in, one Parquet file out, written atomically.

Every image has a row, also if nothing was detected in it or it could not be read. Images are decoded in threads while the
detector processes the previous ones. Tiles of several images share a batch, as images do.
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

from dfine_core.image_detections import ImageDetections, RawDetections
from dfine_core.images import OpenedImage
from dfine_core.inference import LoadedDetector, prepare
from dfine_core.tile_merging import merge_tiles
from dfine_core.tiles import Tile, Tiling, batched, tiles_of
from dfine_core.uncertainty.drift import ImageValues, image_values
from pipeline import storage
from pipeline.config import ConfigError
from pipeline.data.prepare.image_files import BadImageError
from pipeline.predict.inputs import InputImage, Inputs, MissingFrame, decode_input, read_images
from pipeline.predict.plan import SCHEMA, PredictPlan, part_uri

BATCHES_AHEAD = 3  # micro-batches decoded in advance
LARGE_IMAGES_AHEAD = 2  # images decoded in advance where they are cut into tiles
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
    rows: list[dict[str, Any]] = []
    tiling = plan.tiling
    # Images with tiles are as large as users have them, so that few are in memory.
    ahead = BATCHES_AHEAD * plan.batch_size if tiling is None else LARGE_IMAGES_AHEAD
    images = read_images(inputs, *plan.image_range(part))
    decoded_images = decode_ahead(images, loaded.config.input_size, threads, ahead, tiling)
    least = torch.tensor(plan.thresholds)
    found: list[ImageDetections] = []  # in tiles of the image whose last tile comes
    drift: list[ImageValues] = []
    for batch in batched(_in_tiles(decoded_images, rows), plan.batch_size):
        pixels = torch.cat([decoded.pixels_of(tile, loaded.config.input_size) for decoded, tile in batch])
        sizes = torch.tensor([tile.size for _, tile in batch])
        for (decoded, tile), raw in zip(batch, loaded.find(pixels, sizes), strict=True):
            _refuse_not_finite(raw, decoded.row["file_name"])
            found.append(loaded.keep(raw, least, coverage=plan.coverage, joint=plan.joint, measured=plan.edge_std))
            if plan.drift_score is not None:
                drift.append(drift_values(loaded, raw, plan.drift_score))
            if tile == decoded.tiles[-1]:
                size = decoded.row["width"], decoded.row["height"]
                _fill_row(decoded.row, merge_tiles(found, decoded.tiles, size), drift)
                found, drift = [], []
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
    """Image of a part on its way to the detector, whole or in tiles."""

    row: dict[str, Any]
    pixels: Tensor | None  # [1, 3, H, W] uint8; None if rejected, or with several tiles
    tiles: Sequence[Tile] = ()  # none if rejected
    image: OpenedImage | None = None  # RGB, where several tiles are cut out of it

    def pixels_of(self, tile: Tile, input_size: tuple[int, int]) -> Tensor:
        """Pixels of a tile, [1, 3, H, W]; they are made when they are needed, so that few exist."""
        if self.pixels is not None:
            return self.pixels
        assert self.image is not None
        return prepare([tile.cut(self.image)], input_size)


def decode_ahead(
    images: Iterable[InputImage | MissingFrame],
    input_size: tuple[int, int],
    threads: int,
    ahead: int,
    tiling: Tiling | None = None,
) -> Iterator[DecodedImage]:
    """Decode images in threads and yield them in order; at most `ahead` of them are in memory."""
    pending: deque[Future[DecodedImage]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for image in images:
            pending.append(pool.submit(_decode, image, input_size, tiling))
            if len(pending) >= ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def _in_tiles(images: Iterable[DecodedImage], rows: list[dict[str, Any]]) -> Iterator[tuple[DecodedImage, Tile]]:
    """Yield the tiles of all images that could be decoded; the rows of all images are added to `rows`."""
    for image in images:
        rows.append(image.row)
        yield from ((image, tile) for tile in image.tiles)


def _decode(source: InputImage | MissingFrame, input_size: tuple[int, int], tiling: Tiling | None) -> DecodedImage:
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
    tiles = tiles_of(image.size, tiling)
    if len(tiles) > 1:
        return DecodedImage(row, None, tiles, image)
    return DecodedImage(row, prepare([image], input_size), tiles)


def _refuse_not_finite(raw: RawDetections, name: str) -> None:
    if not (raw.scores.isfinite().all() and raw.boxes.isfinite().all()):
        raise ConfigError(f"{name}: its detections are not finite; the weights of this detector have diverged")


def _fill_row(row: dict[str, Any], found: ImageDetections, drift: Sequence[ImageValues]) -> None:
    """Add the detections of an image to its row."""
    row["boxes"] = found.boxes.flatten().numpy()
    row["labels"] = found.labels.int().numpy()
    row["scores"] = found.scores.numpy()
    if found.edge_std_px is not None:
        row["edge_std_px"] = found.edge_std_px.flatten().numpy()
    if found.edge_intervals is not None:
        row["edge_intervals"] = found.edge_intervals.flatten().numpy()
    if drift:
        row["drift"] = [value for values in drift for value in values]


def drift_values(loaded: LoadedDetector, raw: RawDetections, least_score: float) -> ImageValues:
    """Summarise one image for the comparison with the calibration images, whatever the threshold of the prediction."""
    chosen = (raw.scores >= least_score).nonzero().squeeze(1)
    return image_values(raw.scores[chosen], *loaded.edges().widths(raw, chosen), least_score)
