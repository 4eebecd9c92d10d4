"""A finished set that is prepared again: images that were rejected are tried once more, and added as shards of their own.

Nothing of the finished set is written anew, so whoever reads it under its former manifest is not disturbed. The manifest is
exchanged last and at once; its digest changes with the images.
"""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from math import ceil

from pipeline import storage
from pipeline.data.prepare.shard_writer import WORK_FOLDER, WORK_LIST, PrepareOptions
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
from pipeline.data.shards.manifest import ShardSet
from pipeline.data.sources.index import AnnotationIndex, DatasetSource, temporary_files_named
from pipeline.wording import plural


@dataclass(frozen=True)
class Retry:
    """A finished set that was given again."""

    plan: WorkPlan | None  # shards to add; None if there are none
    text: str  # what is kept and what is tried, in words


def plan_retry(shards: ShardSet, source: DatasetSource, options: PrepareOptions) -> Retry:
    """Plan the shards of images that were rejected and may be usable now, or continue a plan that was interrupted.

    Raises:
        PrepareError: the source has other classes than the set.
    """
    out, manifest = shards.uri, shards.manifest
    kept = f"{out} was prepared before: {plural(manifest.images, 'image')} kept, not read again"
    plan = read_plan(out)
    if plan is not None and plan.extends == manifest.digest:
        return Retry(plan, f"{kept}; {plural(plan.images, 'rejected image')} tried again")
    if storage.names(storage.join(out, WORK_FOLDER)):  # killed after its manifest was written
        storage.remove_folder(storage.join(out, WORK_FOLDER))
    rejected = read_rejections(storage.join(out, REJECTED_NAME)) if manifest.rejected else []
    images = {row.image_id for row in rejected if row.kind == "image" and row.image_id is not None}
    if not images:
        return Retry(None, f"{kept}; delete the folder to read all of them")
    if "split_off" in manifest.source:
        # A repaired image may resemble images of the other part; then it belongs there.
        advice = "delete the folders of both parts to try rejected images again"
        return Retry(None, f"{kept}; {advice}, because the parts follow from all images")

    with temporary_files_named(), closing(AnnotationIndex(seed=options.seed, shuffle=options.shuffle)) as index:
        categories = source.fill(index)
        index.finish()
        if categories != manifest.categories:
            raise PrepareError(
                f"{out}: its classes are not those of the source; choose another --out, or delete the folder"
            )
        index.keep_images(images)
        count = len(index.entries())
        if not count:
            return Retry(None, f"{kept}; what was rejected follows from the annotations alone, and is not tried again")
        row_bytes = sum(shard.bytes for shard in manifest.shards) / manifest.images
        parts = max(1, round(count * row_bytes / (options.shard_mib * 2**20)))
        rows = ceil(count / parts / options.row_group_rows) * options.row_group_rows  # per shard, except the last
        write_work_list(index, storage.join(out, WORK_LIST), images=count, rows_per_shard=rows)
        tried = {entry.image_id for entry in index.entries()}
        others = [row for row in rejected if row.image_id not in tried]
        again = [row for row in index.rejected() if row.image_id in tried]
        write_rejections(storage.join(out, REJECTED_BY_SOURCE), [*others, *again])
    plan = WorkPlan(
        split=manifest.split,
        source=manifest.source,
        options=options,
        categories=categories,
        images=count,
        shards=ceil(count / rows),
        first_shard=1 + max(_number(shard.file) for shard in manifest.shards),
        extends=manifest.digest,
    )
    storage.write_atomic(storage.join(out, WORK_PLAN), plan.model_dump_json(indent=1).encode())
    return Retry(plan, f"{kept}; {plural(count, 'rejected image')} tried again")


def outcome(before: ShardSet, after: ShardSet) -> str:
    """What a retry has brought, in words."""
    added = after.manifest.images - before.manifest.images
    if not added:
        return "none of them can be used; the set is as it was"
    files: Sequence[str] = [shard.file for shard in after.manifest.shards[len(before.manifest.shards) :]]
    return (
        f"{plural(added, 'image')} added as {', '.join(files[:3])}{', …' if len(files) > 3 else ''}; the digest is another:"
        f" runs on the former set, {before.manifest.digest[:12]}, do not continue on this one"
    )


def _number(file: str) -> int:
    return int(file.removeprefix("shard-").removesuffix(".parquet"))
