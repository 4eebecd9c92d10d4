"""The data of a training in words: sets with their weights, joined classes, classes that are repeated."""

from collections.abc import Iterator, Sequence

from pipeline.data.shards.classes import listed
from pipeline.data.shards.training_set import TrainingSet, WeightedSet
from pipeline.wording import plural

MOST_ROWS = 60  # classes of the table that a start prints
MOST_RARE = 10  # repeated classes


def set_lines(train: TrainingSet) -> list[str]:
    """Describe what is not plain about the data of a training; empty for one shard set as it is."""
    if train.is_plain and train.repeats is None:
        return []
    named = len(train.sets) > 1 or any(each.renamed for each in train.sets)
    return [*_weight_lines(train), *(_class_lines(train) if named else ()), *_repeat_lines(train)]


def _weight_lines(train: TrainingSet) -> Iterator[str]:
    total = train.images_in_epoch
    yield f"{plural(len(train.sets), 'set')}, {plural(total, 'image')} in an epoch"
    for number, each in enumerate(train.sets, start=1):
        repeated = f", {each.images_in_pass:,} with those repeated" if each.copies is not None else ""
        yield (
            f"  {number}. {each.shards.uri}: weight {each.weight:g}, {plural(each.images, 'image')}{repeated},"
            f" {each.images_in_epoch:,} in an epoch ({each.images_in_epoch / total:.1%}),"
            f" digest {each.shards.manifest.digest[:12]}"
        )


def _class_lines(train: TrainingSet) -> Iterator[str]:
    """Table of the classes that are not the same everywhere, and warnings."""
    sources = [
        _sources(each, len(train.names)) for each in train.sets
    ]  # by set and label: names and boxes, None: it has none
    rows = []
    for label, name in enumerate(train.names):
        own = [of_set[label] for of_set in sources]
        if all(each is not None and [n for n, _ in each] == [name] for each in own):
            continue
        texts = [
            "not annotated" if each is None else " + ".join(f"{n} ({plural(boxes, 'box')})" for n, boxes in each)
            for each in own
        ]
        rows.append([name, *texts])
    same = len(train.names) - len(rows)
    if same:
        yield f"{plural(same, 'class')} of the same name in {'all sets' if len(train.sets) > 1 else 'the set'}"
    if rows:
        shown = [["class", *(f"set {number}" for number in range(1, len(train.sets) + 1))], *rows[:MOST_ROWS]]
        widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
        yield from ("  " + "  ".join(t.ljust(w) for t, w in zip(row, widths, strict=True)).rstrip() for row in shown)
        if len(rows) > MOST_ROWS:
            yield f"  and {len(rows) - MOST_ROWS} more classes"
    yield from _class_warnings(train, sources)


def _class_warnings(train: TrainingSet, sources: Sequence[Sequence[object]]) -> Iterator[str]:
    for number, (each, of_set) in enumerate(zip(train.sets, sources, strict=True), start=1):
        lacking = [name for name, source in zip(train.names, of_set, strict=True) if source is None]
        if lacking:
            yield (
                f"WARNING: set {number} ({each.shards.uri}) does not annotate {listed(lacking)}: such objects in its images are"
                " learned as background; annotate them there, rename a class that means the same, or leave such images out"
            )
    alike: dict[str, list[str]] = {}
    for name in train.names:
        alike.setdefault(" ".join(name.casefold().split()), []).append(name)
    for names in alike.values():
        if len(names) > 1:
            yield (
                f"WARNING: {' and '.join(map(repr, names))} differ by case or blanks alone: if they are one class, rename it in"
                " one of the sets (classes: {...})"
            )


def _sources(each: WeightedSet, classes: int) -> list[list[tuple[str, int]] | None]:
    """By label of the training: the set's own classes and their boxes; None where it has none."""
    given = each.shards.manifest
    labels = each.shards.mapped_labels or range(classes)
    sources: list[list[tuple[str, int]] | None] = [None] * classes
    for category, label, boxes in zip(given.categories, labels, given.statistics.class_counts, strict=True):
        sources[label] = [*(sources[label] or []), (category.name, boxes)]
    return sources


def _repeat_lines(train: TrainingSet) -> Iterator[str]:
    repeats = train.repeats
    if repeats is None:
        return
    rare = sorted(
        (f, n, name) for f, n, name in zip(repeats.factors, repeats.images, train.names, strict=True) if f > 1
    )
    if not rare:
        yield f"repeat factors: no class is in fewer than {repeats.threshold:.4g} of the images, so nothing is repeated"
        return
    worst = ", ".join(
        f"{name} {factor:.2f} ({plural(images, 'image')})" for factor, images, name in rare[::-1][:MOST_RARE]
    )
    more = f" and {len(rare) - MOST_RARE} more" if len(rare) > MOST_RARE else ""
    yield (
        f"repeat factors: {plural(len(rare), 'class')} of {len(repeats.factors)} in fewer than {repeats.threshold:.4g} of the"
        f" images: {worst}{more}"
    )
