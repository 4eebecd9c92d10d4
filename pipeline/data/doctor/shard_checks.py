"""Check every byte and every row of one shard, as one task, with one row group in memory at a time.

A shard is read twice, for its hash and for its rows: a single pass would have to hold it in memory.
"""

import hashlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from pipeline import storage
from pipeline.data.doctor.findings import Example, Tally
from pipeline.data.doctor.row_checks import RowGroupLocation, Summary, check_rows, empty_summary, merge_summaries
from pipeline.data.shards.manifest import Shard
from pipeline.data.shards.records import SHARD_SCHEMA

HASH_CHUNK = 4 << 20  # bytes
LARGEST_ROW_GROUP = 64
READ_ERRORS = (OSError, pa.ArrowException)


def check_shard(
    split: str, folder: str, number: int, shard: Shard, num_classes: int, decode: bool, marks: bool = False
) -> Summary:
    """Check one shard, and summarise it for the checks over all shards.

    Args:
        split: name of the split in examples.
        folder: URI of the shard set.
        decode: decode every image; otherwise only headers are read.
        marks: look for EXIF orientation.
    """
    location = RowGroupLocation(split, number, shard.file)
    problems: list[tuple[str, str]] = []  # (code, detail)
    parts: list[Summary] = []
    try:
        filesystem, path = storage.resolve(storage.join(folder, shard.file))
        problems += _check_bytes(filesystem, path, shard)
        with filesystem.open_input_file(path) as source:
            parquet = pq.ParquetFile(source)
            problems += _check_footer(parquet, shard)
            if "shard-schema" not in dict(problems):
                parts, unreadable = _check_row_groups(parquet, location, num_classes, decode, marks)
                problems += unreadable
    except FileNotFoundError:
        problems.append(("shard-missing", ""))
    except READ_ERRORS as error:
        problems.append(("shard-unreadable", str(error)))
    tally = Tally()
    for code, detail in problems:
        tally.add(code, [Example(split=split, shard=shard.file, detail=detail)], 1)
    return merge_summaries([empty_summary(tally), *parts])


def _check_bytes(filesystem: fs.FileSystem, path: str, shard: Shard) -> list[tuple[str, str]]:
    digest, size = hashlib.sha256(), 0
    with filesystem.open_input_stream(path, compression=None) as stream:
        while chunk := stream.read(HASH_CHUNK):
            digest.update(chunk)
            size += len(chunk)
    if size != shard.bytes:
        return [("shard-size", f"{size:,} bytes, the manifest says {shard.bytes:,}")]
    if digest.hexdigest() != shard.sha256:
        return [("shard-hash", f"{digest.hexdigest()}, the manifest says {shard.sha256}")]
    return []


def _check_footer(parquet: pq.ParquetFile, shard: Shard) -> list[tuple[str, str]]:
    problems = []
    types = dict(zip(parquet.schema_arrow.names, parquet.schema_arrow.types, strict=True))
    wrong = [
        f"{field.name} is {types.get(field.name, 'missing')}, not {field.type}"
        for field in SHARD_SCHEMA
        if types.get(field.name) != field.type
    ]
    if wrong:
        problems.append(("shard-schema", "; ".join(wrong)))
    rows = tuple(_rows_of_groups(parquet))
    if rows != shard.row_groups:
        in_file, in_manifest = (f"{len(groups)} of {sum(groups)} rows" for groups in (rows, shard.row_groups))
        if in_file == in_manifest:
            in_file, in_manifest = (", ".join(map(str, groups)) for groups in (rows, shard.row_groups))
        problems.append(("shard-row-groups", f"row groups: {in_file}; the manifest says {in_manifest}"))
    if max(rows, default=0) > LARGEST_ROW_GROUP:
        problems.append(("row-groups-large", f"up to {max(rows)} rows"))
    return problems


def _check_row_groups(
    parquet: pq.ParquetFile, location: RowGroupLocation, num_classes: int, decode: bool, marks: bool
) -> tuple[list[Summary], list[tuple[str, str]]]:
    """Summarise the row groups that can be read, and report the others."""
    parts, errors = [], []
    rows = _rows_of_groups(parquet)
    for group, first_row in enumerate(np.cumsum([0, *rows[:-1]]).tolist()):
        try:
            table = parquet.read_row_group(group, columns=SHARD_SCHEMA.names, use_threads=False)
        except READ_ERRORS as error:
            errors.append(f"row group {group}: {error}")
        else:
            group_location = RowGroupLocation(location.split, location.shard, location.file, first_row)
            parts.append(check_rows(table, group_location, num_classes=num_classes, decode=decode, marks=marks))
    if not errors:
        return parts, []
    return parts, [("shard-unreadable", f"{len(errors)} of {len(rows)} row groups; {errors[0]}")]


def _rows_of_groups(parquet: pq.ParquetFile) -> list[int]:
    return [parquet.metadata.row_group(group).num_rows for group in range(parquet.num_row_groups)]
