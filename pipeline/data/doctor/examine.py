"""Check shard sets, so that a defect is found before days of training depend on them.

One Ray task per shard reads all of it. The driver merges the summaries and checks what only all of them together show:
duplicate images, classes without examples, statistics that differ from those of the rows.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import ray
from numpy.typing import NDArray

from pipeline import storage
from pipeline.data.doctor.findings import (
    EXAMPLES,
    FINDING_KINDS,
    RARE_BOXES,
    SEVERITIES,
    TINY_SHARE,
    UNBALANCED_RATIO,
    Example,
    Finding,
    Severity,
    Tally,
)
from pipeline.data.doctor.row_checks import (
    SIDE_EDGES,
    SIZE_CELL,
    TINY_SIDE,
    RowIndex,
    Summary,
    empty_summary,
    merge_summaries,
)
from pipeline.data.doctor.shard_checks import READ_ERRORS, check_shard
from pipeline.data.prepare.prepare import read_rejected
from pipeline.data.shards.classes import repeated_names
from pipeline.data.shards.manifest import FrozenModel, ShardSet, Statistics
from pipeline.progress import Progress


class SizeCell(FrozenModel):
    """Images of about one size."""

    width: int  # px, rounded to SIZE_CELL
    height: int
    images: int


class SplitReport(FrozenModel):
    """Contents of one split, as counted and as its manifest states them."""

    title: str
    uri: str
    digest: str
    shards: int
    bytes: int
    images: int
    boxes: int
    rejected: int
    categories: tuple[str, ...]
    images_counted: int  # images in `statistics`; the others could not be read
    statistics: Statistics | None  # recounted from the rows
    tiny_boxes: int  # below 32 x 32 px when stretched to 640x640
    scaled_sides: tuple[int, ...]  # boxes by sqrt(area) at that size, between row_checks.SIDE_EDGES
    image_sizes: tuple[SizeCell, ...]

    @property
    def tiny_share(self) -> float:
        """Fraction of the boxes that are tiny."""
        return self.tiny_boxes / max(1, sum(self.scaled_sides))


class DoctorReport(FrozenModel):
    """Result of `dfine doctor`; its JSON form is the output of `--json`."""

    decoded: bool  # False: only image headers were read
    splits: tuple[SplitReport, ...]
    findings: tuple[Finding, ...]  # most severe first

    def count(self, severity: Severity) -> int:
        """Number of findings of a severity."""
        return sum(finding.severity == severity for finding in self.findings)


class _Split(NamedTuple):
    title: str
    shards: ShardSet
    summary: Summary


def examine(shard_sets: Sequence[ShardSet], *, decode: bool = True) -> DoctorReport:
    """Check one split, or several against each other. Ray must be running.

    Args:
        decode: decode every image, which takes most of the time; otherwise only headers are read.
    """
    # Splits go by their names, or by their URIs where names repeat.
    names = [shards.manifest.split for shards in shard_sets]
    titles = names if len(set(names)) == len(names) else [shards.uri for shards in shard_sets]
    summaries = _check_shards(shard_sets, titles, decode)
    splits = [_Split(*split) for split in zip(titles, shard_sets, summaries, strict=True)]

    # Findings within each split.
    findings: list[Finding] = []
    for split in splits:
        tally = Tally()
        tally.merge(split.summary.tally)
        for check in (
            _check_repetitions,
            _check_classes,
            _check_sizes,
            _check_statistics,
            _check_rejected,
            _check_notices,
        ):
            for code, examples, count in check(split):
                tally.add(code, examples, count)
        findings += tally.findings((split.title,))

    # Findings between splits.
    across = Tally()
    for code, examples, count in (*_check_categories(splits), *_check_overlap(splits)):
        across.add(code, examples, count)
    findings += across.findings(tuple(titles))
    findings.sort(key=lambda finding: (SEVERITIES.index(finding.severity), list(FINDING_KINDS).index(finding.code)))
    return DoctorReport(decoded=decode, splits=tuple(_report(split) for split in splits), findings=tuple(findings))


def _check_shards(shard_sets: Sequence[ShardSet], titles: Sequence[str], decode: bool) -> list[Summary]:
    """Summarise each set; the result does not depend on the order in which the tasks end."""
    task: Any = ray.remote(check_shard).options(num_cpus=1, scheduling_strategy="SPREAD")
    parts: list[list[Summary]] = [[empty_summary(Tally())] * (1 + len(shards.manifest.shards)) for shards in shard_sets]
    running = {
        task.remote(
            title,
            storage.absolute(shards.uri),
            s,
            shard,
            len(shards.manifest.categories),
            decode,
            bool(shards.manifest.options) and "exif" not in shards.manifest.options,  # prepared before there was a rule
        ): (n, s)
        for n, (title, shards) in enumerate(zip(titles, shard_sets, strict=True))
        for s, shard in enumerate(shards.manifest.shards)
    }
    total, megabytes = sum(shards.manifest.images for shards in shard_sets), 0.0
    with Progress("doctor", total=total, unit=" images") as progress:
        while running:
            (ready, *_), _ = ray.wait(list(running), num_returns=1)
            n, s = running.pop(ready)
            parts[n][s] = ray.get(ready)
            shard = shard_sets[n].manifest.shards[s]
            megabytes += shard.bytes / 1e6
            progress.advance(shard.rows, f"{megabytes / progress.seconds:.0f} MB/s")
    return [merge_summaries(summaries) for summaries in parts]


# Each check yields (code of the finding, some examples, number of cases).
CheckResults = Iterator[tuple[str, list[Example], int]]


def _check_repetitions(split: _Split) -> CheckResults:
    index = split.summary.index
    for code, values in (("image-id-repeated", index.image_id), ("image-repeated", index.content)):
        surplus, examples = 0, list[Example]()
        for alike in groups_of_equal(values):
            surplus += len(alike) - 1
            if len(examples) < EXAMPLES:
                first, *others = (_example(split, n) for n in alike[: EXAMPLES + 1].tolist())
                also = "; ".join(other.location for other in others)
                examples.append(first.model_copy(update={"detail": f"the same in {also}", "same_as": others[0]}))
        yield code, examples, surplus


def _check_overlap(splits: Sequence[_Split]) -> CheckResults:
    """Find images that occur in several splits."""
    number = np.repeat(np.arange(len(splits)), [len(split.summary.index.row) for split in splits])
    start = np.searchsorted(number, np.arange(len(splits)))
    content = np.concatenate([split.summary.index.content for split in splits])
    shared = (alike for alike in groups_of_equal(content) if number[alike[0]] != number[alike[-1]])
    examples, count = list[Example](), 0
    for alike in shared:
        count += 1
        if len(examples) < EXAMPLES:
            first, last = (_example(splits[number[n]], int(n - start[number[n]])) for n in (alike[0], alike[-1]))
            detail = f"also in {last.split}: {last.location}"
            examples.append(first.model_copy(update={"detail": detail, "same_as": last}))
    yield "image-in-splits", examples, count


def groups_of_equal(values: NDArray[Any]) -> Iterator[NDArray[np.intp]]:
    """Yield the ascending positions of each value that occurs more than once."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    begins = np.ones(len(values), np.bool_)
    begins[1:] = ordered[1:] != ordered[:-1]
    edges = np.append(np.flatnonzero(begins), len(values))
    for several in np.flatnonzero(np.diff(edges) > 1):
        yield order[edges[several] : edges[several + 1]]


def _example(split: _Split, n: int) -> Example:
    """Describe image n of the index."""
    index: RowIndex = split.summary.index
    return Example(
        split=split.title,
        shard=split.shards.manifest.shards[index.shard[n]].file,
        row=int(index.row[n]),
        image_id=int(index.image_id[n]),
        file_name=index.file_name[n].as_py(),
    )


def _check_classes(split: _Split) -> CheckResults:
    if split.summary.statistics is None:
        return
    counts = split.summary.statistics.class_counts
    named = sorted(zip(counts, (category.name for category in split.shards.manifest.categories), strict=True))
    empty = [name for boxes, name in named if boxes == 0]
    yield "class-empty", [Example(split=split.title, detail=", ".join(empty))], len(empty)
    rare = [f"{name} {boxes}" for boxes, name in named if 0 < boxes < RARE_BOXES]
    yield "class-rare", [Example(split=split.title, detail=", ".join(rare))], len(rare)
    some = [pair for pair in named if pair[0]]
    if some and some[-1][0] > UNBALANCED_RATIO * some[0][0]:
        (least, rarest), (most, commonest) = some[0], some[-1]
        detail = f"{most:,} boxes of {commonest}, {least:,} of {rarest}: {most / least:.0f} to 1"
        yield "class-unbalanced", [Example(split=split.title, detail=detail)], 1


def _check_sizes(split: _Split) -> CheckResults:
    share = _tiny_boxes(split.summary) / max(1, int(split.summary.scaled_sides.sum()))
    if share > TINY_SHARE:
        yield "objects-tiny", [Example(split=split.title, detail=f"{share:.0%} of all boxes")], 1


def _check_statistics(split: _Split) -> CheckResults:
    """Compare recounted statistics with the manifest, if every row could be counted; otherwise another finding says why."""
    manifest, summary = split.shards.manifest, split.summary
    if summary.statistics is None or summary.counted != manifest.images:
        return
    stated = dict(_values("", manifest.statistics.model_dump())) | {"boxes": manifest.boxes}
    counted = dict(_values("", summary.statistics.model_dump()))
    counted["boxes"] = sum(summary.statistics.class_counts) + summary.statistics.crowd_boxes
    different = [name for name in stated | counted if stated.get(name) != counted.get(name)]
    details = [f"{name} is {stated.get(name)!r} in the manifest, {counted.get(name)!r} counted" for name in different]
    yield "statistics-differ", [Example(split=split.title, detail=detail) for detail in details], len(details)


def _values(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Yield (path, value) of every number and string in nested data, with paths such as class_counts.3."""
    if isinstance(value, dict | tuple):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _values(f"{name}.{key}" if name else str(key), inner)
    else:
        yield name, value


def _check_rejected(split: _Split) -> CheckResults:
    stated = split.shards.manifest.rejected
    try:
        rejected = read_rejected(split.shards)
    except READ_ERRORS as error:
        if stated:
            detail = f"the manifest counts {stated}: {error}"
            yield "rejected-list", [Example(split=split.title, detail=detail)], 1
        return
    if len(rejected) != stated:
        detail = f"{len(rejected)} rows, the manifest counts {stated}"
        yield "rejected-list", [Example(split=split.title, detail=detail)], 1
    # The most frequent reasons, each with its first case.
    reasons = Counter((row.kind, row.reason) for row in rejected)
    examples = []
    for (kind, reason), count in islice(reasons.most_common(), EXAMPLES):
        first = next(row for row in rejected if (row.kind, row.reason) == (kind, reason))
        detail = f"{kind}, {reason}: {count}, such as {first.file_name or first.image_id}: {first.detail}"
        examples.append(Example(split=split.title, detail=detail, magnitude=count))
    yield "rejected", examples, len(rejected)


def _check_notices(split: _Split) -> CheckResults:
    """Repeat what `dfine prepare` noticed in the source, and what its manifest alone shows."""
    manifest = split.shards.manifest
    repeated = repeated_names(manifest.categories)
    yield "class-name-repeated", [Example(split=split.title, detail=", ".join(repeated))], len(repeated)
    for notice in manifest.notices:
        if notice.code in FINDING_KINDS:
            yield notice.code, [Example(split=split.title, detail=f"such as {notice.example}")], notice.count


def _check_categories(splits: Sequence[_Split]) -> CheckResults:
    first = splits[0].shards.manifest.categories
    for split in splits[1:]:
        categories = split.shards.manifest.categories
        if categories != first:
            pairs = zip(first, categories, strict=False)
            changed = next((f"{a.label} is {a.name!r} and {b.name!r}" for a, b in pairs if a != b), "the rest agrees")
            detail = f"{len(first)} in {splits[0].title}, {len(categories)} here; {changed}"
            yield "categories-differ", [Example(split=split.title, detail=detail)], 1


def _tiny_boxes(summary: Summary) -> int:
    return int(summary.scaled_sides[: np.searchsorted(SIDE_EDGES, TINY_SIDE)].sum())


def _report(split: _Split) -> SplitReport:
    manifest, summary = split.shards.manifest, split.summary
    return SplitReport(
        title=split.title,
        uri=split.shards.uri,
        digest=manifest.digest,
        shards=len(manifest.shards),
        bytes=sum(shard.bytes for shard in manifest.shards),
        images=manifest.images,
        boxes=manifest.boxes,
        rejected=manifest.rejected,
        categories=tuple(category.name for category in manifest.categories),
        images_counted=summary.counted,
        statistics=summary.statistics,
        tiny_boxes=_tiny_boxes(summary),
        scaled_sides=tuple(summary.scaled_sides.tolist()),
        image_sizes=tuple(
            SizeCell(width=x * SIZE_CELL, height=y * SIZE_CELL, images=images)
            for (x, y), images in sorted(summary.image_sizes.items())
        ),
    )
