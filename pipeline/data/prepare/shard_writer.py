"""Write one shard, as one task: read and check its images, write the Parquet file, then a receipt.

While a shard set is being written, its work list is stored beside it (`.prepare/work.parquet`, one row group per shard), so a
task needs only its number. A shard is finished when its receipt exists, and the receipt is written after the shard.
"""

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from dfine_core.images import PIXEL_LIMIT
from pipeline import storage
from pipeline.data.prepare.image_files import BadImageError, EncodedImage, ExifRule, checked_image, read_image_file
from pipeline.data.prepare.tiled_records import TileRule, in_shard_order, tiled_records
from pipeline.data.shards.manifest import FrozenModel, Notice, Shard, Statistics, merge_notices
from pipeline.data.shards.records import SHARD_SCHEMA, ImageRecord, Rejection, table_from_records
from pipeline.data.shards.set_statistics import count_rows
from pipeline.data.sources.index import BoxEntry, ImageEntry

WORK_FOLDER = ".prepare"
WORK_LIST = f"{WORK_FOLDER}/work.parquet"
WORK_SCHEMA = pa.schema(
    [
        ("image_id", pa.int64()),
        ("uri", pa.string()),
        ("file_name", pa.string()),
        ("width", pa.int32()),  # null where the source has none: boxes and areas are then fractions of the image
        ("height", pa.int32()),
        ("boxes", pa.list_(pa.float32())),  # flat [4G], xyxy
        ("labels", pa.list_(pa.int32())),
        ("areas", pa.list_(pa.float32())),
        ("crowd", pa.list_(pa.bool_())),
        ("weights", pa.list_(pa.float32())),
    ]
)
SMALL_COLUMNS = [name for name in SHARD_SCHEMA.names if name != "image"]
READERS, FILES_AHEAD = 8, 32  # threads and files per task: hides the latency of network storage


def _is_unset(value: object) -> bool:
    return not value


class PrepareOptions(FrozenModel):
    """Options that determine the bytes of a shard set, together with its source."""

    shard_mib: PositiveFloat = 128.0
    row_group_rows: int = Field(default=32, ge=1, le=64)
    shuffle: bool = True
    seed: int = Field(default=0, ge=0, lt=2**63)
    longest_side: PositiveInt | None = None  # px; larger images are reduced to this
    jpeg_quality: int = Field(default=75, ge=1, le=95)  # for resized images; 75 as in the data of the released models
    max_pixels: PositiveInt = PIXEL_LIMIT  # per file
    verify: bool = True  # decode every image once, to find truncated files: about 2 ms per 150 kB
    exif: ExifRule = "upright"  # what annotations refer to: the image as viewers show it, or the pixels as stored
    # Not part of sets that do without them, so that these keep their digests.
    tiles: TileRule | None = Field(default=None, exclude_if=_is_unset)  # None: images are taken whole
    weights: bool = Field(default=False, exclude_if=_is_unset)  # labels are of unequal worth, also without tiles

    @property
    def weighted(self) -> bool:
        """Whether rows have weights."""
        return self.weights or self.tiles is not None


class Receipt(FrozenModel):
    """Result of a finished shard; `shard` and `statistics` are None if none of its images could be used."""

    shard: Shard | None
    statistics: Statistics | None
    rejected: tuple[Rejection, ...]
    images: NonNegativeInt  # in the work list, including rejected ones
    notices: tuple[Notice, ...] = ()


def shard_uri(out: str, index: int) -> str:
    """URI of shard `index`."""
    return storage.join(out, f"shard-{index:05d}.parquet")


def receipt_uri(out: str, index: int) -> str:
    """URI of the receipt of shard `index`."""
    return storage.join(out, WORK_FOLDER, f"shard-{index:05d}.json")


def work_table(images: Iterable[tuple[ImageEntry, list[BoxEntry]]]) -> pa.Table:
    """Table of the work list."""
    rows = [
        {
            **entry._asdict(),
            "boxes": [side for box in boxes for side in box[1:5]],
            "labels": [box.label for box in boxes],
            "areas": [box.area for box in boxes],
            "crowd": [bool(box.crowd) for box in boxes],
            "weights": [box.weight for box in boxes],
        }
        for entry, boxes in images
    ]
    return pa.Table.from_pylist(rows, schema=WORK_SCHEMA)


def write_shard(out: str, index: int, options: PrepareOptions, num_classes: int, *, first_shard: int = 0) -> Receipt:
    """Write shard `index` of the set at `out`, then its receipt.

    Args:
        first_shard: number of the first shard of the work list.
    """
    filesystem, path = storage.resolve(storage.join(out, WORK_LIST))
    with filesystem.open_input_file(path) as file:
        work = pq.ParquetFile(file).read_row_group(index - first_shard)
    rejected: list[Rejection] = []
    notices: list[Notice] = []
    records = _records(work, options, rejected, notices)
    if (tiles := options.tiles) is not None:
        cut = [tile for record in records for tile in tiled_records(record, tiles, options.seed, notices)]
        records = iter(in_shard_order(cut, options.seed, shuffle=options.shuffle))
    groups = _groups(records, options)
    shard, statistics = None, None
    if (first := next(groups, None)) is not None:
        shard, rows = _write_parquet(shard_uri(out, index), first, groups)
        statistics = count_rows(rows, num_classes)
    receipt = Receipt(
        shard=shard,
        statistics=statistics,
        rejected=tuple(rejected),
        images=work.num_rows,
        notices=merge_notices(notices),
    )
    storage.write_atomic(receipt_uri(out, index), receipt.model_dump_json().encode())
    return receipt


def encoded_image(entry: ImageEntry, data: bytes, options: PrepareOptions) -> EncodedImage:
    """Check and encode an image as its shard stores it; raises BadImageError."""
    size = None if entry.width is None or entry.height is None else (entry.width, entry.height)
    return checked_image(
        data,
        size,
        longest_side=options.longest_side,
        quality=options.jpeg_quality,
        max_pixels=options.max_pixels,
        verify=options.verify,
        exif=options.exif,
    )


def _records(
    work: pa.Table, options: PrepareOptions, rejected: list[Rejection], notices: list[Notice]
) -> Iterator[ImageRecord]:
    """Yield the usable images; the others, and unusable boxes, are added to `rejected`."""
    rows = work.to_pylist()
    for row, file in zip(rows, _read_ahead(row["uri"] for row in rows), strict=True):
        entry = ImageEntry(**{name: row[name] for name in ImageEntry._fields})
        try:
            image = encoded_image(entry, file.result(), options)
        except BadImageError as bad:
            rejected.append(Rejection(entry.image_id, entry.file_name, "image", bad.reason, bad.detail))
            continue
        if image.exif is not None:
            notices.append(Notice(code=image.exif, count=1, example=entry.file_name))
        yield _record(entry, row, image, rejected)


def _record(entry: ImageEntry, row: dict[str, Any], image: EncodedImage, rejected: list[Rejection]) -> ImageRecord:
    """Convert boxes and areas to pixels of the stored image, and reject unusable boxes."""
    # Scale from the annotated size, which is 1 x 1 where boxes are fractions.
    annotated_in = (1, 1) if entry.width is None else (image.annotated_width, image.annotated_height)
    sx, sy = image.width / annotated_in[0], image.height / annotated_in[1]
    boxes = np.array(row["boxes"], np.float32).reshape(-1, 4) * np.array([sx, sy, sx, sy], np.float32)
    # A usable box has an area and touches the image.
    proper = np.asarray(np.isfinite(boxes).all(1) & (boxes[:, 2:] > boxes[:, :2]).all(1))
    is_box = proper & (boxes[:, 2:] > 0).all(1) & (boxes[:, :2] < (image.width, image.height)).all(1)
    for index in np.flatnonzero(~is_box):
        box, reason = boxes[index], "box outside the image" if proper[index] else "degenerate box"
        corners = ", ".join(f"{corner:g}" for corner in box)
        rejected.append(Rejection(entry.image_id, entry.file_name, "box", reason, f"xyxy {corners}"))
    return ImageRecord(
        image_id=entry.image_id,
        file_name=entry.file_name,
        width=image.width,
        height=image.height,
        image=image.data,
        boxes=boxes[is_box],
        labels=np.array(row["labels"], np.int32)[is_box],
        areas=np.array(row["areas"], np.float32)[is_box] * np.float32(sx * sy),
        crowd=np.array(row["crowd"], np.bool_)[is_box],
        weights=np.array(row["weights"], np.float32)[is_box],
    )


def _read_ahead(uris: Iterator[str]) -> Iterator[Future[bytes]]:
    """Yield the files in order; later ones are read in the background."""
    with ThreadPoolExecutor(READERS) as pool:
        pending = deque(pool.submit(read_image_file, uri) for uri in islice(uris, FILES_AHEAD))
        while pending:
            yield pending.popleft()
            pending.extend(pool.submit(read_image_file, uri) for uri in islice(uris, 1))


def _groups(records: Iterator[ImageRecord], options: PrepareOptions) -> Iterator[pa.Table]:
    while group := list(islice(records, options.row_group_rows)):
        yield table_from_records(group, weighted=options.weighted)


def _write_parquet(uri: str, first: pa.Table, others: Iterable[pa.Table]) -> tuple[Shard, pa.Table]:
    """Write one row group per table; return the shard, and all its rows without the images."""
    row_groups, small = [], []
    with storage.open_atomic(uri) as file:
        hashing = HashingFile(file)
        # Encoded images do not compress, and their minimum and maximum are useless.
        with pq.ParquetWriter(
            hashing, first.schema, compression="none", use_dictionary=False, write_statistics=["image_id"]
        ) as writer:
            for table in (first, *others):
                writer.write_table(table, row_group_size=table.num_rows)
                row_groups.append(table.num_rows)
                small.append(table.select(SMALL_COLUMNS))
    shard = Shard(
        file=uri.rpartition("/")[2],
        rows=sum(row_groups),
        bytes=hashing.bytes,
        sha256=hashing.sha256.hexdigest(),
        row_groups=tuple(row_groups),
    )
    return shard, pa.concat_tables(small)


class HashingFile:
    """A file for writing that hashes everything written; its owner closes it."""

    closed = False

    def __init__(self, file: IO[bytes]) -> None:
        self._write: Callable[[bytes], int] = file.write
        self.sha256 = hashlib.sha256()
        self.bytes = 0

    def write(self, data: bytes) -> int:
        """Write and hash."""
        self.sha256.update(data)
        self.bytes += len(data)
        return self._write(data)

    def flush(self) -> None:
        """Leave it to the owner."""

    def close(self) -> None:
        """Leave it to the owner."""
