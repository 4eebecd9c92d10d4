"""Small shard sets of synthetic images, written row by row so that a test knows their content."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.data.shards.manifest import MANIFEST_NAME, Category, Manifest, Shard, ShardSet, load_shards
from pipeline.data.shards.records import ImageRecord, table_from_records
from pipeline.data.shards.set_statistics import count_rows
from pipeline.data.sources.synthetic import CLASSES, synthetic_image


def synthetic_records(count: int, *, longest_side: int = 48, seed: int = 0) -> list[ImageRecord]:
    return [synthetic_image(index, seed=seed, longest_side=longest_side, max_shapes=6) for index in range(count)]


def write_shards(
    folder: Path, records: Sequence[ImageRecord], *, group_rows: int = 8, shard_rows: int = 32, weighted: bool = False
) -> ShardSet:
    folder.mkdir(parents=True)
    rows = table_from_records(records, weighted=weighted)
    shards = []
    for start in range(0, len(rows), shard_rows):
        part = rows.slice(start, shard_rows)
        path = folder / f"part-{start:05d}.parquet"
        pq.write_table(part, path, row_group_size=group_rows, compression="none")
        shards.append(
            Shard(
                file=path.name,
                rows=len(part),
                bytes=path.stat().st_size,
                sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
                row_groups=tuple(len(part.slice(first, group_rows)) for first in range(0, len(part), group_rows)),
            )
        )
    manifest = Manifest(
        split="synthetic",
        categories=tuple(Category(label=label, original_id=label, name=name) for label, name in enumerate(CLASSES)),
        shards=tuple(shards),
        images=len(rows),
        boxes=sum(len(record.labels) for record in records),
        rejected=0,
        statistics=count_rows(rows, len(CLASSES)),
        source={},
        options={"weights": True} if weighted else {},
    )
    (folder / MANIFEST_NAME).write_text(manifest.model_dump_json())
    return load_shards(folder)


def stored_rows(shards: ShardSet) -> pa.Table:
    """All rows, read by pyarrow's own reader."""
    return pa.concat_tables(pq.read_table(shards.shard_uri(i)) for i in range(len(shards.manifest.shards)))
