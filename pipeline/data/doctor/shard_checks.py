"""One task of the doctor: every byte and every row of one shard, in the memory of one row group.

A shard is read twice, for its hash and for its rows: reading it once would hold it in memory.
"""

import hashlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from pipeline import storage
from pipeline.data.doctor.findings import Example, Tally
from pipeline.data.doctor.row_checks import Place, Summary, check_rows, merged, summary_of
from pipeline.data.shards.manifest import Shard
from pipeline.data.shards.records import SHARD_SCHEMA

HASH_CHUNK = 4 << 20  # bytes
LARGEST_ROW_GROUP = 64
READ_ERRORS = (OSError, pa.ArrowException)


def check_shard(split: str, folder: str, number: int, shard: Shard, num_classes: int, decode: bool) -> Summary:
    """All that is wrong with one shard, and what the checks over all shards need of it.

    Args:
        split: its name in examples.
        folder: URI of the shard set.
        decode: decode every image; otherwise only its header is read.
    """
    place = Place(split, number, shard.file)
    found: list[tuple[str, str]] = []  # codes and details
    parts: list[Summary] = []
    try:
        filesystem, path = storage.resolve(storage.join(folder, shard.file))
        found += _check_bytes(filesystem, path, shard)
        with filesystem.open_input_file(path) as source:
            parquet = pq.ParquetFile(source)
            found += _check_footer(parquet, shard)
            if "shard-schema" not in dict(found):
                parts, unreadable = _check_row_groups(parquet, place, num_classes, decode)
                found += unreadable
    except FileNotFoundError:
        found.append(("shard-missing", ""))
    except READ_ERRORS as error:
        found.append(("shard-unreadable", str(error)))
    tally = Tally()
    for code, detail in found:
        tally.add(code, [Example(split=split, shard=shard.file, detail=detail)], 1)
    return merged([summary_of(tally), *parts])


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
    found = []
    types = dict(zip(parquet.schema_arrow.names, parquet.schema_arrow.types, strict=True))
    wrong = [
        f"{field.name} is {types.get(field.name, 'missing')}, not {field.type}"
        for field in SHARD_SCHEMA
        if types.get(field.name) != field.type
    ]
    if wrong:
        found.append(("shard-schema", "; ".join(wrong)))
    rows = tuple(_rows_of_groups(parquet))
    if rows != shard.row_groups:
        there, described = (f"{len(groups)} of {sum(groups)} rows" for groups in (rows, shard.row_groups))
        if there == described:
            there, described = (", ".join(map(str, groups)) for groups in (rows, shard.row_groups))
        found.append(("shard-row-groups", f"row groups: {there}; the manifest says {described}"))
    if max(rows, default=0) > LARGEST_ROW_GROUP:
        found.append(("row-groups-large", f"up to {max(rows)} rows"))
    return found


def _check_row_groups(
    parquet: pq.ParquetFile, place: Place, num_classes: int, decode: bool
) -> tuple[list[Summary], list[tuple[str, str]]]:
    """Summaries of the row groups that can be read, and what is wrong with the others."""
    parts, errors = [], []
    rows = _rows_of_groups(parquet)
    for group, first_row in enumerate(np.cumsum([0, *rows[:-1]]).tolist()):
        try:
            table = parquet.read_row_group(group, columns=SHARD_SCHEMA.names, use_threads=False)
        except READ_ERRORS as error:
            errors.append(f"row group {group}: {error}")
        else:
            here = Place(place.split, place.shard, place.file, first_row)
            parts.append(check_rows(table, here, num_classes=num_classes, decode=decode))
    if not errors:
        return parts, []
    return parts, [("shard-unreadable", f"{len(errors)} of {len(rows)} row groups; {errors[0]}")]


def _rows_of_groups(parquet: pq.ParquetFile) -> list[int]:
    return [parquet.metadata.row_group(group).num_rows for group in range(parquet.num_row_groups)]
