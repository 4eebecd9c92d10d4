"""Read row groups of a shard set directly from Parquet: no listing, no schema inference."""

import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pyarrow import fs

from pipeline import storage
from pipeline.data.shards.manifest import ShardSet
from pipeline.data.shards.records import SHARD_SCHEMA, WEIGHTED_SCHEMA, with_weights
from pipeline.data.shards.teacher_boxes import TEACHER_FIELDS, read_teacher_group, with_teacher_columns
from pipeline.errors import UserError
from pipeline.progress import Progress

ROW_TYPE = pa.struct(
    [*WEIGHTED_SCHEMA, *TEACHER_FIELDS]
)  # a row of a training; empty lists without weights or a teacher
ANNOTATION_COLUMNS = tuple(name for name in SHARD_SCHEMA.names if name != "image")
PARALLEL_READS = 8  # concurrent requests: object storage has high latency, but serves many requests at once


MAX_LISTED_FILES = 3  # files in an error


class ShardError(UserError, ValueError):
    """Shard files that differ from their manifest."""


@dataclass(frozen=True)
class Rows:
    """Rows of a shard set, in order."""

    group: NDArray[np.int64]  # [n] row group, counted through all shards of the manifest
    row: NDArray[np.int64]  # [n] row within its group
    showing: NDArray[np.int64] | None = None  # [n] see `mixture.Mixture`; None: all are 0

    def __len__(self) -> int:
        return len(self.row)

    def __getitem__(self, part: slice) -> "Rows":
        return Rows(self.group[part], self.row[part], None if self.showing is None else self.showing[part])


class ShardFile(NamedTuple):
    """A shard, and the way its rows are read."""

    folder: str  # URI
    name: str
    sha256: str
    labels: NDArray[np.int32] | None  # [K] label that each one of the file becomes; None: as in the file
    teacher_boxes: str | None  # folder or URI of a teacher's boxes for these rows


@dataclass(frozen=True)
class RowGroups:
    """Location of every row group of one or several shard sets; small enough to send with a task."""

    files: tuple[ShardFile, ...]  # [S]
    shard: NDArray[np.int32]  # [G]
    index: NDArray[np.int32]  # [G] row group within its shard
    rows: NDArray[np.int64]  # [G]
    row_bytes: float  # average


def locate_row_groups(shards: ShardSet) -> RowGroups:
    """Locate all row groups from the manifest alone: no file is opened."""
    described = shards.manifest.shards
    if not described:
        raise ShardError(f"{shards.uri}: the shard set is empty")
    labels = None if shards.mapped_labels is None else np.array(shards.mapped_labels, np.int32)
    return RowGroups(
        files=tuple(
            ShardFile(shards.uri, shard.file, shard.sha256, labels, shards.teacher_boxes) for shard in described
        ),
        shard=np.array([s for s, shard in enumerate(described) for _ in shard.row_groups], np.int32),
        index=np.array([i for shard in described for i in range(len(shard.row_groups))], np.int32),
        rows=np.array([rows for shard in described for rows in shard.row_groups], np.int64),
        row_bytes=sum(shard.bytes for shard in described) / sum(shard.rows for shard in described),
    )


def joined_row_groups(parts: Sequence[RowGroups], shares: Sequence[float]) -> RowGroups:
    """Row groups of several shard sets, one set after the other.

    Args:
        shares: of each set in what is read; they add up to 1.
    """
    before = np.cumsum([0, *(len(part.files) for part in parts)])
    return RowGroups(
        files=tuple(file for part in parts for file in part.files),
        shard=np.concatenate([part.shard + first for part, first in zip(parts, before, strict=False)]).astype(np.int32),
        index=np.concatenate([part.index for part in parts]),
        rows=np.concatenate([part.rows for part in parts]),
        row_bytes=sum(share * part.row_bytes for part, share in zip(parts, shares, strict=True)),
    )


def refuse_changed_files(shards: ShardSet, *, contents: bool = False) -> None:
    """Compare the shard files with the manifest, by one listing of the folder.

    Args:
        contents: also read all files and compare their SHA-256.

    Raises:
        ShardError: files are missing, of another size, or of other content.
    """
    sizes = storage.sizes(shards.uri)
    wrong = [
        f"{shard.file} has {sizes[shard.file]:,} bytes instead of {shard.bytes:,}"
        if shard.file in sizes
        else f"{shard.file} is missing"
        for shard in shards.manifest.shards
        if sizes.get(shard.file) != shard.bytes
    ]
    if contents and not wrong:
        wrong = [f"{name} has another SHA-256 than the manifest" for name in _files_of_other_content(shards)]
    if wrong:
        more = f" and {len(wrong) - MAX_LISTED_FILES} more" if len(wrong) > MAX_LISTED_FILES else ""
        raise ShardError(
            f"{shards.uri}: {', '.join(wrong[:MAX_LISTED_FILES])}{more}: copy them again, or prepare the set again"
        )


def _files_of_other_content(shards: ShardSet) -> list[str]:
    described = shards.manifest.shards
    uris = [shards.shard_uri(index) for index in range(len(described))]
    total = sum(shard.bytes for shard in described)
    different = []
    with (
        ThreadPoolExecutor(PARALLEL_READS) as pool,
        Progress(f"verifying {shards.manifest.split}", total=total, unit="B", delay=5) as progress,
    ):
        for shard, digest in zip(described, pool.map(storage.sha256, uris), strict=True):
            progress.advance(shard.bytes)
            if digest != shard.sha256:
                different.append(shard.file)
    return different


def read_row_groups(
    source: RowGroups, groups: Iterable[int], columns: Sequence[str] = SHARD_SCHEMA.names
) -> dict[int, pa.Table]:
    """Read the rows of each of `groups`.

    Raises:
        ShardError: a shard differs from the manifest.
    """
    numbers = [int(group) for group in groups]
    shards = {group: source.files[source.shard[group]] for group in numbers}
    resolved = {folder: _resolve(folder) for folder in dict.fromkeys(shard.folder for shard in shards.values())}

    def read(group: int) -> pa.Table:
        shard, index = shards[group], int(source.index[group])
        filesystem, folder = resolved[shard.folder]
        path = storage.join(folder, shard.name)
        key = shard.folder, shard.name, shard.sha256
        try:
            with filesystem.open_input_file(path) as file:
                parquet = pq.ParquetFile(file, metadata=_footers.get(key), pre_buffer=True)
                footer = _footers.setdefault(key, parquet.metadata)
                if index >= footer.num_row_groups or footer.row_group(index).num_rows != source.rows[group]:
                    raise ShardError(
                        f"{path}: row group {index} does not have the {source.rows[group]} rows of the manifest: the file"
                        " changed after the manifest was written; prepare the shard set again"
                    )
                table = parquet.read_row_group(index, columns=list(columns), use_threads=False)
                return _with_labels(table, shard.labels, "labels")
        except pa.ArrowInvalid as error:
            raise ShardError(f"{path}: damaged: {error}; prepare the shard set again") from None

    with ThreadPoolExecutor(PARALLEL_READS) as pool:
        return dict(zip(numbers, pool.map(read, numbers), strict=True))


def read_training_rows(source: RowGroups, groups: Iterable[int]) -> dict[int, pa.Table]:
    """Read rows of `ROW_TYPE` of each of `groups`: those of the shards, with a teacher's boxes if `source` names some."""
    read = read_row_groups(source, groups, WEIGHTED_SCHEMA.names)  # a column that the files lack is passed over
    tables = {group: with_weights(table) for group, table in read.items()}
    shards = {group: source.files[source.shard[group]] for group in tables}
    taught = dict.fromkeys(shard.teacher_boxes for shard in shards.values() if shard.teacher_boxes is not None)
    resolved = {folder: _resolve(folder) for folder in taught}

    def join(group: int) -> pa.Table:
        shard, rows = shards[group], tables[group]
        if shard.teacher_boxes is None:
            return with_teacher_columns(rows, None)
        filesystem, folder = resolved[shard.teacher_boxes]
        boxes = read_teacher_group(storage.join(folder, shard.name), filesystem, int(source.index[group]), rows)
        return with_teacher_columns(rows, _with_labels(boxes, shard.labels, "teacher_labels"))

    with ThreadPoolExecutor(PARALLEL_READS) as pool:
        return dict(zip(tables, pool.map(join, tables), strict=True))


def _with_labels(table: pa.Table, labels: NDArray[np.int32] | None, name: str) -> pa.Table:
    """Replace the labels in the column `name`, if there is one and they change."""
    if labels is None or name not in table.column_names:
        return table
    column = table[name].combine_chunks()
    given = column.flatten().to_numpy()
    if len(given) and not 0 <= given.min() <= given.max() < len(labels):
        raise ShardError(
            f"a label is not in 0..{len(labels) - 1}: `dfine doctor` names its image; prepare the set again"
        )
    mapped = pa.array(labels[given], pa.int32())
    offsets = np.append(0, np.cumsum(column.value_lengths().to_numpy())).astype(np.int32)
    lists = pa.ListArray.from_arrays(pa.array(offsets), mapped)
    return table.set_column(table.column_names.index(name), pa.field(name, lists.type), lists)


@lru_cache(maxsize=64)
def _resolve(folder: str) -> tuple[fs.FileSystem, str]:
    return storage.resolve(folder)  # a new client of an object store takes a second to create


class _Footers:
    """Footers of the shards that were read last. Beyond their number, a read takes the footer from the file it opens anyway.

    The hash of a shard is part of its key: a rewritten shard set needs its new footers.
    """

    def __init__(self, limit: int) -> None:
        self._limit, self._kept = limit, OrderedDict[tuple[str, str, str], pq.FileMetaData]()
        self._lock = threading.Lock()

    def get(self, key: tuple[str, str, str]) -> pq.FileMetaData | None:
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
            return self._kept.get(key)

    def setdefault(self, key: tuple[str, str, str], footer: pq.FileMetaData) -> pq.FileMetaData:
        with self._lock:
            kept = self._kept.setdefault(key, footer)
            while len(self._kept) > self._limit:
                self._kept.popitem(last=False)
            return kept


_footers = _Footers(limit=256)


def take_rows(groups: dict[int, pa.StructArray], rows: Rows) -> pa.StructArray:
    """Take rows [n] in order. Slices, because `Table.take` would first copy all images into one buffer."""
    pairs = zip(rows.group.tolist(), rows.row.tolist(), strict=True)
    none = pa.array([], ROW_TYPE)
    return pa.concat_arrays([none, *(groups[group].slice(row, 1) for group, row in pairs)])


def read_annotations(shards: ShardSet) -> pa.Table:
    """Read all columns but the images, of all rows in order: ground truth in pixels, crowd regions included."""
    source = locate_row_groups(shards)
    tables = read_row_groups(source, range(len(source.rows)), ANNOTATION_COLUMNS)
    empty = pa.schema([SHARD_SCHEMA.field(name) for name in ANNOTATION_COLUMNS]).empty_table()
    return pa.concat_tables([empty, *tables.values()])
