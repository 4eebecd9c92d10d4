"""Row groups of a shard set, read straight from Parquet: no listing, no schema inference."""

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pyarrow import fs

from pipeline import storage
from pipeline.data.shards.manifest import ShardSet
from pipeline.data.shards.records import SHARD_SCHEMA
from pipeline.errors import UserError

ROW = pa.struct(list(SHARD_SCHEMA))
ANNOTATION_COLUMNS = tuple(name for name in SHARD_SCHEMA.names if name != "image")
PARALLEL_READS = 8  # requests under way at once: object storage answers slowly, but side by side


SHOWN = 3  # files in an error


class ShardError(UserError, ValueError):
    """Shard files that are not those of their manifest."""


@dataclass(frozen=True)
class Rows:
    """Rows of a shard set, in order."""

    group: NDArray[np.int64]  # [n] row group, counted through all shards of the manifest
    row: NDArray[np.int64]  # [n] row within its group

    def __len__(self) -> int:
        return len(self.row)


@dataclass(frozen=True)
class RowGroups:
    """Where every row group of a shard set lies; small enough to travel with a task."""

    folder: str  # URI
    files: tuple[str, ...]  # [S] shards
    sha256: tuple[str, ...]  # [S]
    shard: NDArray[np.int32]  # [G]
    index: NDArray[np.int32]  # [G] within its shard
    rows: NDArray[np.int64]  # [G]
    row_bytes: float  # on average


def locate_row_groups(shards: ShardSet) -> RowGroups:
    """As the manifest has it: no file is opened."""
    described = shards.manifest.shards
    if not described:
        raise ShardError(f"{shards.uri}: the shard set is empty")
    return RowGroups(
        folder=shards.uri,
        files=tuple(shard.file for shard in described),
        sha256=tuple(shard.sha256 for shard in described),
        shard=np.array([s for s, shard in enumerate(described) for _ in shard.row_groups], np.int32),
        index=np.array([i for shard in described for i in range(len(shard.row_groups))], np.int32),
        rows=np.array([rows for shard in described for rows in shard.row_groups], np.int64),
        row_bytes=sum(shard.bytes for shard in described) / sum(shard.rows for shard in described),
    )


def refuse_changed_files(shards: ShardSet) -> None:
    """Compare the shard files with the manifest, by one listing of their folder.

    Raises:
        ShardError: files are missing or of another size.
    """
    there = storage.sizes(shards.uri)
    wrong = [
        f"{shard.file} has {there[shard.file]:,} bytes instead of {shard.bytes:,}"
        if shard.file in there
        else f"{shard.file} is missing"
        for shard in shards.manifest.shards
        if there.get(shard.file) != shard.bytes
    ]
    if wrong:
        more = f" and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
        raise ShardError(f"{shards.uri}: {', '.join(wrong[:SHOWN])}{more}: copy them again, or prepare the set again")


def read_row_groups(
    source: RowGroups, groups: Iterable[int], columns: Sequence[str] = SHARD_SCHEMA.names
) -> dict[int, pa.Table]:
    """The rows of each of `groups`.

    Raises:
        ShardError: a shard is not the one that the manifest describes.
    """
    filesystem, folder = _resolve(source.folder)

    def read(group: int) -> pa.Table:
        shard, index = source.shard[group], int(source.index[group])
        path = storage.join(folder, source.files[shard])
        footer = _footer(source.folder, source.files[shard], source.sha256[shard])
        if index >= footer.num_row_groups or footer.row_group(index).num_rows != source.rows[group]:
            raise ShardError(
                f"{path}: row group {index} does not have the {source.rows[group]} rows that the manifest says; the"
                " file changed after its manifest was written: prepare the shard set again"
            )
        with filesystem.open_input_file(path) as file:
            parquet = pq.ParquetFile(file, metadata=footer, pre_buffer=True)
            return parquet.read_row_group(index, columns=list(columns), use_threads=False)

    wanted = [int(group) for group in groups]
    with ThreadPoolExecutor(PARALLEL_READS) as pool:
        return dict(zip(wanted, pool.map(read, wanted), strict=True))


@lru_cache(maxsize=8)
def _resolve(folder: str) -> tuple[fs.FileSystem, str]:
    return storage.resolve(folder)  # a new client of an object store costs a second


@lru_cache(maxsize=256)
def _footer(folder: str, file: str, sha256: str) -> pq.FileMetaData:
    """`sha256` is part of the key so that a shard set written anew is not read by an old footer."""
    filesystem, path = _resolve(folder)
    try:
        with filesystem.open_input_file(storage.join(path, file)) as source:
            return pq.read_metadata(source)
    except pa.ArrowInvalid as error:
        raise ShardError(f"{storage.join(folder, file)}: damaged: {error}; prepare the shard set again") from None


def take_rows(groups: dict[int, pa.StructArray], rows: Rows) -> pa.StructArray:
    """[n] the named rows, in order. By slices: `Table.take` would first copy all images into one buffer."""
    pairs = zip(rows.group.tolist(), rows.row.tolist(), strict=True)
    none = pa.array([], ROW)
    return pa.concat_arrays([none, *(groups[group].slice(row, 1) for group, row in pairs)])


def read_annotations(shards: ShardSet) -> pa.Table:
    """Everything but the images, of all rows in order: ground truth in pixels, crowd regions included."""
    source = locate_row_groups(shards)
    tables = read_row_groups(source, range(len(source.rows)), ANNOTATION_COLUMNS)
    empty = pa.schema([SHARD_SCHEMA.field(name) for name in ANNOTATION_COLUMNS]).empty_table()
    return pa.concat_tables([empty, *tables.values()])
