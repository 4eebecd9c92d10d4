"""Turn a source into a shard set: the driver plans, and Ray tasks on the whole cluster read, check and write one shard each.

The plan is made once. Images are shuffled by a seed, so that neighbours in a shard are unrelated, and cut into shards of a
fixed number of rows, estimated from a sample. A run that was killed therefore continues where it stopped: shards with a
receipt are kept, the others are written again, and the manifest is the same.

Ray tasks rather than a Ray Data pipeline, since a shard is the unit of both the work and the resuming.
"""

import posixpath
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from itertools import islice
from math import ceil
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray
from pydantic import JsonValue, PositiveInt

from pipeline import storage
from pipeline.data.prepare.image_files import BadImageError, read_image_file
from pipeline.data.prepare.shard_writer import (
    WORK_FOLDER,
    WORK_LIST,
    WORK_SCHEMA,
    PrepareOptions,
    Receipt,
    encoded_image,
    receipt_uri,
    work_table,
    write_shard,
)
from pipeline.data.shards.manifest import (
    MANIFEST_NAME,
    Category,
    FrozenModel,
    Manifest,
    Notice,
    ShardSet,
    load_shards,
    merge_notices,
)
from pipeline.data.shards.records import REJECTED_SCHEMA, Rejection
from pipeline.data.shards.set_statistics import add_up
from pipeline.data.sources.index import AnnotationIndex, DatasetSource, ImageEntry
from pipeline.errors import UserError
from pipeline.progress import Progress

REJECTED_NAME = "rejected.parquet"
WORK_PLAN = f"{WORK_FOLDER}/plan.json"  # written last: if it exists, the work list is complete
REJECTED_BY_SOURCE = f"{WORK_FOLDER}/rejected.parquet"
SAMPLE_IMAGES = 128  # read to estimate the size of a row
MAX_LISTED_ROWS = 20  # rejected rows in an error


class PrepareError(UserError, RuntimeError):
    """Data that cannot become a shard set, or a folder that cannot hold it."""


class WorkPlan(FrozenModel):
    """Everything that determines the shards, stored beside the work list."""

    split: str
    source: dict[str, JsonValue]
    options: PrepareOptions
    categories: tuple[Category, ...]
    images: PositiveInt
    shards: PositiveInt
    notices: tuple[Notice, ...] = ()  # counted facts about the source


def prepare(source: DatasetSource, out: str, *, split: str, options: PrepareOptions, strict: bool = False) -> ShardSet:
    """Write the shard set of `source` to the folder `out`, or resume writing it. Ray must be running.

    Args:
        out: path or URI that all nodes of the cluster share.
        split: name of the split, such as "train".
        strict: fail on an image or a box that cannot be used, and leave the set unfinished.

    Raises:
        SourceError: the source is not in the stated format.
        PrepareError: the folder holds a different set, no image can be used, or `strict` found a rejection.
    """
    out = storage.absolute(out)
    if storage.exists(storage.join(out, MANIFEST_NAME)):
        manifest = load_shards(out).manifest
        _refuse_another(out, source, split, options, manifest.source, manifest.split, manifest.options)
    else:
        if not storage.exists(storage.join(out, WORK_PLAN)):
            _make_plan(out, source, split, options)
        plan = WorkPlan.model_validate_json(storage.read_bytes(storage.join(out, WORK_PLAN)))
        _refuse_another(out, source, split, options, plan.source, plan.split, plan.options.model_dump())
        _finish(out, plan, _write_shards(out, plan), strict)
    shards = load_shards(out)
    if strict and shards.manifest.rejected:
        raise _rejected_error(out, _read_rejected(storage.join(out, REJECTED_NAME)))
    return shards


def _refuse_another(
    out: str,
    source: DatasetSource,
    split: str,
    options: PrepareOptions,
    old_source: dict[str, JsonValue],
    old_split: str,
    old_options: dict[str, JsonValue],
) -> None:
    """Raise PrepareError unless the folder holds this very set, finished or not."""
    old = {"split": old_split, **old_source, **old_options}
    new = {"split": split, **source.description, **options.model_dump()}
    changed = [
        f"{key} is {old.get(key)!r} there and {new.get(key)!r} now" for key in old | new if old.get(key) != new.get(key)
    ]
    if changed:
        raise PrepareError(
            f"{out} holds a different shard set: {', '.join(changed)}. Choose another --out, or delete the folder"
        )


def _make_plan(out: str, source: DatasetSource, split: str, options: PrepareOptions) -> None:
    """Write the work list, then the plan."""
    with closing(AnnotationIndex(seed=options.seed, shuffle=options.shuffle)) as index:
        categories = source.fill(index)
        images = index.finish()
        if images == 0:
            first = next((f"; the first of the rejected: {row.reason}: {row.detail}" for row in index.rejected()), "")
            raise PrepareError(f"the source has no images that can be used{first}: {source.description}")
        sizes, problems = ray.get(_task(_try_images).remote(index.sample(SAMPLE_IMAGES), options))
        if not sizes:
            raise PrepareError(f"none of {len(problems)} sampled images can be used; the first: {problems[0]}")
        shards = max(1, round(images * sum(sizes) / len(sizes) / (options.shard_mib * 2**20)))
        rows = ceil(images / shards / options.row_group_rows) * options.row_group_rows  # per shard, except the last
        write_work_list(index, storage.join(out, WORK_LIST), images=images, rows_per_shard=rows)
        _write_rejected(storage.join(out, REJECTED_BY_SOURCE), list(index.rejected()))
        notices = index.notices
    plan = WorkPlan(
        split=split,
        source=source.description,
        options=options,
        categories=categories,
        images=images,
        shards=ceil(images / rows),
        notices=notices,
    )
    storage.write_atomic(storage.join(out, WORK_PLAN), plan.model_dump_json(indent=1).encode())


def write_work_list(index: AnnotationIndex, uri: str, *, images: int, rows_per_shard: int) -> None:
    """Write all images of the index in order, one row group per shard."""
    ordered = index.ordered()
    with (
        storage.open_atomic(uri) as file,
        pq.ParquetWriter(file, WORK_SCHEMA) as writer,
        Progress("work list", total=images, unit=" images", delay=5) as progress,
    ):
        while (work := work_table(islice(ordered, rows_per_shard))).num_rows:
            writer.write_table(work, row_group_size=work.num_rows)
            progress.advance(work.num_rows)


def _try_images(sample: Sequence[ImageEntry], options: PrepareOptions) -> tuple[list[int], list[str]]:
    """Stored size of each usable image, and the problems of the others; runs as a task, as all reading does."""
    sizes: list[int] = []
    problems: list[str] = []
    for entry in sample:
        try:
            sizes.append(len(encoded_image(entry, read_image_file(entry.uri), options).data))
        except BadImageError as bad:
            problems.append(str(bad))
    return sizes, problems


def _write_shards(out: str, plan: WorkPlan) -> list[Receipt]:
    """Write every shard that has no receipt, and return all receipts."""
    receipts = _kept_receipts(out, plan)
    task = _task(write_shard)
    running = {
        task.remote(out, index, plan.options, len(plan.categories)): index
        for index in range(plan.shards)
        if index not in receipts
    }
    kept, written = sum(receipt.images for receipt in receipts.values()), 0
    with Progress("prepare", total=plan.images, initial=kept, unit=" images") as progress:
        while running:
            (ready, *_), _ = ray.wait(list(running), num_returns=1)
            receipt = receipts[running.pop(ready)] = ray.get(ready)
            written += receipt.shard.bytes if receipt.shard else 0
            progress.advance(receipt.images, f"{written / 1e6 / progress.seconds:.0f} MB/s")
    return [receipts[index] for index in range(plan.shards)]


def _kept_receipts(out: str, plan: WorkPlan) -> dict[int, Receipt]:
    """Receipts of an earlier run by shard number, if the shard itself exists too."""
    shards, work = storage.sizes(out), storage.sizes(storage.join(out, WORK_FOLDER))
    receipts = {}
    for index in range(plan.shards):
        uri = receipt_uri(out, index)
        if posixpath.basename(uri) in work:
            receipt = Receipt.model_validate_json(storage.read_bytes(uri))
            if receipt.shard is None or shards.get(receipt.shard.file) == receipt.shard.bytes:
                receipts[index] = receipt
    return receipts


def _finish(out: str, plan: WorkPlan, receipts: Sequence[Receipt], strict: bool) -> None:
    """Write the list of rejections and the manifest, and remove the work folder."""
    rejected = _read_rejected(storage.join(out, REJECTED_BY_SOURCE))
    rejected += [rejection for receipt in receipts for rejection in receipt.rejected]
    _write_rejected(storage.join(out, REJECTED_NAME), rejected)
    if strict and rejected:
        raise _rejected_error(out, rejected)
    shards = [receipt.shard for receipt in receipts if receipt.shard is not None]
    parts = [receipt.statistics for receipt in receipts if receipt.statistics is not None]
    if not shards:
        raise PrepareError(f"none of {plan.images} images can be used; see {storage.join(out, REJECTED_NAME)}")
    # Every shard must be visible to the driver, or the folder is not shared.
    sizes = storage.sizes(out)
    for shard in shards:
        if sizes.get(shard.file) != shard.bytes:
            raise PrepareError(
                f"{shard.file} was written, but the driver does not find it in {out}: --out must be shared by all nodes"
            )

    # The manifest comes last: a folder with a manifest is a finished set.
    statistics = add_up(parts)
    manifest = Manifest(
        split=plan.split,
        categories=plan.categories,
        shards=tuple(shards),
        images=sum(shard.rows for shard in shards),
        boxes=sum(statistics.class_counts) + statistics.crowd_boxes,
        rejected=len(rejected),
        statistics=statistics,
        source=plan.source,
        options=plan.options.model_dump(mode="json"),
        notices=merge_notices([*plan.notices, *(notice for receipt in receipts for notice in receipt.notices)]),
    )
    storage.write_atomic(storage.join(out, MANIFEST_NAME), manifest.model_dump_json(indent=1).encode())
    storage.remove_folder(storage.join(out, WORK_FOLDER))
    storage.remove_temporaries(out)


def reasons(rejected: Sequence[Rejection]) -> str:
    """Number of rejections per reason, in one line."""
    counts = Counter(rejection.reason for rejection in rejected)
    return ", ".join(f"{count} {reason}" for reason, count in counts.most_common())


def read_rejected(shards: ShardSet) -> list[Rejection]:
    """Read the images and boxes that were left out of a shard set."""
    return _read_rejected(storage.join(shards.uri, REJECTED_NAME))


def _rejected_error(out: str, rejected: Sequence[Rejection]) -> PrepareError:
    lines = [f"  {row.file_name or row.image_id}: {row.reason}: {row.detail}" for row in rejected[:MAX_LISTED_ROWS]]
    more = [f"  and {len(rejected) - MAX_LISTED_ROWS} more"] if len(rejected) > MAX_LISTED_ROWS else []
    uri = storage.join(out, REJECTED_NAME)
    return PrepareError("\n".join([f"strict: {reasons(rejected)} rejected; all are in {uri}", *lines, *more]))


def _read_rejected(uri: str) -> list[Rejection]:
    rows = pq.read_table(pa.BufferReader(storage.read_bytes(uri))).to_pylist()
    return [Rejection(**row) for row in rows]


def _write_rejected(uri: str, rejected: Sequence[Rejection]) -> None:
    table = pa.Table.from_pylist([rejection._asdict() for rejection in rejected], schema=REJECTED_SCHEMA)
    with storage.open_atomic(uri) as file:
        pq.write_table(table, file)


def _task(function: Any) -> Any:
    """Make a Ray task that is spread over the nodes, since each one reads and writes much."""
    return ray.remote(function).options(num_cpus=1, scheduling_strategy="SPREAD")
