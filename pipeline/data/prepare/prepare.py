"""Turn a source into a shard set: the driver plans, and Ray tasks on the whole cluster read, check and write one shard each.

The plan is made once. Images are shuffled by a seed, so that neighbours in a shard are unrelated, and cut into shards of a
fixed number of rows, estimated from a sample. A run that was killed therefore continues where it stopped: shards with a
receipt are kept, the others are written again, and the manifest is the same.

Ray tasks rather than a Ray Data pipeline, since a shard is the unit of both the work and the resuming.
"""

import posixpath
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing
from math import ceil
from typing import Any

import ray
from pydantic import JsonValue

from pipeline import storage
from pipeline.data.prepare.image_files import BadImageError, read_image_file
from pipeline.data.prepare.retry import outcome, plan_retry
from pipeline.data.prepare.shard_writer import (
    WORK_FOLDER,
    WORK_LIST,
    PrepareOptions,
    Receipt,
    encoded_image,
    receipt_uri,
    write_shard,
)
from pipeline.data.prepare.tiled_records import LARGEST_ID, TILE_IDS, tiled_bytes
from pipeline.data.prepare.work_plan import (
    REJECTED_BY_SOURCE,
    REJECTED_NAME,
    WORK_PLAN,
    PrepareError,
    WorkPlan,
    read_plan,
    read_rejections,
    write_rejections,
    write_work_list,
)
from pipeline.data.shards.manifest import MANIFEST_NAME, Manifest, ShardSet, load_shards, merge_notices
from pipeline.data.shards.records import Rejection
from pipeline.data.shards.set_statistics import add_up
from pipeline.data.sources.index import AnnotationIndex, DatasetSource, ImageEntry, temporary_files_named
from pipeline.output_folder import refuse_foreign_folder
from pipeline.progress import Progress

SAMPLE_IMAGES = 128  # read to estimate the size of a row
MAX_LISTED_ROWS = 20  # rejected rows in an error


def prepare(
    source: DatasetSource,
    out: str,
    *,
    split: str,
    options: PrepareOptions,
    strict: bool = False,
    report: Callable[[str], None] | None = None,
) -> ShardSet:
    """Write the shard set of `source` to the folder `out`, or resume writing it. Ray must be running.

    A finished set stays, and images that were rejected are tried again.

    Args:
        out: path or URI that all nodes of the cluster share.
        split: name of the split, such as "train".
        strict: fail on an image or a box that cannot be used, and leave the set unfinished.
        report: takes a line about what was kept and what was tried again.

    Raises:
        SourceError: the source is not in the stated format.
        ConfigError: the folder holds other files.
        PrepareError: the folder holds a different set, no image can be used, or `strict` found a rejection.
    """
    out = storage.absolute(out)
    if storage.exists(storage.join(out, MANIFEST_NAME)):
        before = load_shards(out)
        manifest = before.manifest
        _refuse_another(out, source, split, options, manifest.source, manifest.split, manifest.options)
        retry = plan_retry(before, source, options)
        say = report or (lambda _: None)
        say(retry.text)
        if retry.plan is not None:
            _finish(out, retry.plan, _write_shards(out, retry.plan), strict=False, before=manifest)
            say(outcome(before, load_shards(out)))
    else:
        if (plan := read_plan(out)) is None:
            refuse_foreign_folder(out, MANIFEST_NAME, "shard set")
            plan = _make_plan(out, source, split, options)
        else:
            old_options = plan.options.model_dump(exclude_unset=True)  # those of the version that wrote it
            _refuse_another(out, source, split, options, plan.source, plan.split, old_options)
        _finish(out, plan, _write_shards(out, plan), strict=strict)
    shards = load_shards(out)
    if strict and shards.manifest.rejected:
        raise _rejected_error(out, read_rejections(storage.join(out, REJECTED_NAME)))
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
    settings = options.model_dump()
    old = {"split": old_split, **old_source, **old_options}
    new = {"split": split, **source.description, **settings}
    if unknown := [key for key in PrepareOptions().model_dump() if key not in old_options]:
        raise PrepareError(
            f"{out} was prepared by a version without {', '.join(unknown)}, whose images may be others. Trainings, evaluations"
            " and doctor read it as it is; to prepare it by the present rules, choose another --out, or delete the folder"
        )
    changed = [
        f"{key} is {old.get(key)!r} there and {new.get(key)!r} now" for key in old | new if old.get(key) != new.get(key)
    ]
    if changed:
        raise PrepareError(
            f"{out} holds a different shard set: {', '.join(changed)}. Choose another --out, or delete the folder"
        )


def _make_plan(out: str, source: DatasetSource, split: str, options: PrepareOptions) -> WorkPlan:
    """Write the work list, then the plan."""
    with temporary_files_named(), closing(AnnotationIndex(seed=options.seed, shuffle=options.shuffle)) as index:
        categories = source.fill(index)
        images = index.finish()
        if images == 0:
            first = next((f"; the first of the rejected: {row.reason}: {row.detail}" for row in index.rejected()), "")
            raise PrepareError(f"the source has no images that can be used{first}: {source.description}")
        if options.tiles is not None and (largest := index.largest_id()) > LARGEST_ID:
            raise PrepareError(
                f"--tile: image id {largest} is too large, as a tile's id is {TILE_IDS:,} times that of its image and its number;"
                " renumber the images of the source"
            )
        sizes, problems = ray.get(_task(_try_images).remote(index.sample(SAMPLE_IMAGES), options))
        if not sizes:
            raise PrepareError(f"none of {len(problems)} sampled images can be used; the first: {problems[0]}")
        shards = max(1, round(images * sum(sizes) / len(sizes) / (options.shard_mib * 2**20)))
        rows = ceil(images / shards)  # images per shard, except the last
        if options.tiles is None:
            rows = ceil(rows / options.row_group_rows) * options.row_group_rows
        write_work_list(index, storage.join(out, WORK_LIST), images=images, rows_per_shard=rows)
        write_rejections(storage.join(out, REJECTED_BY_SOURCE), list(index.rejected()))
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
    return plan


def _try_images(sample: Sequence[ImageEntry], options: PrepareOptions) -> tuple[list[int], list[str]]:
    """Stored size of each usable image, and the problems of the others; runs as a task, as all reading does."""
    sizes: list[int] = []
    problems: list[str] = []
    for entry in sample:
        try:
            image = encoded_image(entry, read_image_file(entry.uri), options)
            stored, size = len(image.data), (image.width, image.height)
            sizes.append(stored if options.tiles is None else tiled_bytes(size, stored, options.tiles))
        except BadImageError as bad:
            problems.append(str(bad))
    return sizes, problems


def _write_shards(out: str, plan: WorkPlan) -> list[Receipt]:
    """Write every shard that has no receipt, and return all receipts."""
    receipts = _kept_receipts(out, plan)
    task = _task(write_shard)
    running = {
        task.remote(out, index, plan.options, len(plan.categories), first_shard=plan.first_shard): index
        for index in _numbers(plan)
        if index not in receipts
    }
    kept, written = sum(receipt.images for receipt in receipts.values()), 0
    with Progress("prepare", total=plan.images, initial=kept, unit=" images") as progress:
        while running:
            (ready, *_), _ = ray.wait(list(running), num_returns=1)
            receipt = receipts[running.pop(ready)] = ray.get(ready)
            written += receipt.shard.bytes if receipt.shard else 0
            progress.advance(receipt.images, f"{written / 1e6 / progress.seconds:.0f} MB/s")
    return [receipts[index] for index in _numbers(plan)]


def _numbers(plan: WorkPlan) -> range:
    return range(plan.first_shard, plan.first_shard + plan.shards)


def _kept_receipts(out: str, plan: WorkPlan) -> dict[int, Receipt]:
    """Receipts of an earlier run by shard number, if the shard itself exists too."""
    shards, work = storage.sizes(out), storage.sizes(storage.join(out, WORK_FOLDER))
    receipts = {}
    for index in _numbers(plan):
        uri = receipt_uri(out, index)
        if posixpath.basename(uri) in work:
            receipt = Receipt.model_validate_json(storage.read_bytes(uri))
            if receipt.shard is None or shards.get(receipt.shard.file) == receipt.shard.bytes:
                receipts[index] = receipt
    return receipts


def _finish(
    out: str, plan: WorkPlan, receipts: Sequence[Receipt], *, strict: bool, before: Manifest | None = None
) -> None:
    """Write the list of rejections and the manifest, and remove the work folder.

    Args:
        before: manifest of the finished set to which the shards are added; it stays if there are none.
    """
    if before is not None and not any(receipt.shard for receipt in receipts):
        storage.remove_folder(storage.join(out, WORK_FOLDER))
        return
    rejected = read_rejections(storage.join(out, REJECTED_BY_SOURCE))
    rejected += [rejection for receipt in receipts for rejection in receipt.rejected]
    write_rejections(storage.join(out, REJECTED_NAME), rejected)
    if strict and rejected:
        # Shards with rejected images are written again after a repair.
        for index, receipt in zip(_numbers(plan), receipts, strict=True):
            if any(row.kind == "image" for row in receipt.rejected):
                storage.remove_file(receipt_uri(out, index))
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
    notices = [*plan.notices, *(notice for receipt in receipts for notice in receipt.notices)]
    if before is not None:
        shards, parts, notices = [*before.shards, *shards], [before.statistics, *parts], [*before.notices, *notices]
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
        notices=merge_notices(notices),
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
    return read_rejections(storage.join(shards.uri, REJECTED_NAME))


def _rejected_error(out: str, rejected: Sequence[Rejection]) -> PrepareError:
    lines = [f"  {row.file_name or row.image_id}: {row.reason}: {row.detail}" for row in rejected[:MAX_LISTED_ROWS]]
    more = [f"  and {len(rejected) - MAX_LISTED_ROWS} more"] if len(rejected) > MAX_LISTED_ROWS else []
    uri = storage.join(out, REJECTED_NAME)
    return PrepareError("\n".join([f"strict: {reasons(rejected)} rejected; all are in {uri}", *lines, *more]))


def _task(function: Any) -> Any:
    """Make a Ray task that is spread over the nodes, since each one reads and writes much."""
    return ray.remote(function).options(num_cpus=1, scheduling_strategy="SPREAD")
