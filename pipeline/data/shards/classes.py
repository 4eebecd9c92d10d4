"""Classes by name: of one shard set in the label order of another, as `val` in that of `train` or any set in that of a detector;
and of the sets of a training in one order.
"""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from pipeline.data.shards.manifest import Category, ManifestError, ShardSet

MOST_NAMED = 5  # classes in a message


def with_classes_of(shards: ShardSet, names: Sequence[str], owner: str) -> ShardSet:
    """Map the labels of a shard set by name, so that they are indices of `names`.

    Classes that the set lacks are fine. A class that it alone has must be without boxes.

    Args:
        names: class names by label.
        owner: what they belong to, in words.

    Raises:
        ManifestError: names disagree, or repeat so that they do not tell the classes apart.
    """
    theirs = [category.name for category in shards.manifest.categories]
    if theirs == list(names):
        return shards
    own = classes_of_its_own(shards, names)
    counts = dict(zip(theirs, shards.manifest.statistics.class_counts, strict=True))
    used = [name for name in own if counts[name] or shards.manifest.statistics.crowd_boxes]
    if used or not set(theirs) & set(names):
        lacking = [name for name in names if name not in theirs]
        raise ManifestError(
            f"{shards.uri}: its {len(theirs)} classes are not the {len(names)} of {owner} (here alone: {listed(own, counts)};"
            f" only of {owner}: {listed(lacking)}): prepare both with the same categories"
        )
    for place, given in ((shards.uri, theirs), (owner, list(names))):
        if twice := [name for name in dict.fromkeys(given) if given.count(name) > 1]:
            raise ManifestError(
                f"{place}: {listed(twice)} names several classes, and the classes of {shards.uri} and {owner} differ:"
                " give every class a name of its own, and prepare the data again"
            )
    known = {category.name: category for category in shards.manifest.categories}
    free = min([category.original_id for category in known.values()], default=0)
    categories = tuple(
        # A class that the set lacks gets an id that no other has.
        Category(label=label, original_id=known[name].original_id if name in known else free - 1 - label, name=name)
        for label, name in enumerate(names)
    )
    # A class of the set alone has no boxes; its label is never looked up.
    labels = tuple(names.index(name) if name in names else -1 for name in theirs)
    return replace(shards, mapped_categories=categories, mapped_labels=labels)


def joined_classes(shard_sets: Sequence[ShardSet], renames: Sequence[Mapping[str, str]]) -> list[ShardSet]:
    """Map the labels of several shard sets to one list of classes: those of the first set, then what each other one adds.

    Args:
        renames: of each set, names of its classes and those that they get. Two classes that are both named may become one.

    Raises:
        ManifestError: a name is none of a set's classes, or does not tell its classes apart; names every problem.
    """
    if len(shard_sets) == 1 and not renames[0]:
        return [*shard_sets]
    if problems := [line for each in zip(shard_sets, renames, strict=True) for line in _rename_problems(*each)]:
        raise ManifestError("\n  ".join(["data.train: the classes cannot be joined:", *problems]))
    names_of_sets = [
        [renamed.get(category.name, category.name) for category in shards.manifest.categories]
        for shards, renamed in zip(shard_sets, renames, strict=True)
    ]
    # A class keeps the id of the first set that has it, unless another class has taken that.
    names: dict[str, int] = {}
    taken: set[int] = set()
    free = 1 + max((c.original_id for shards in shard_sets for c in shards.manifest.categories), default=0)
    for shards, own in zip(shard_sets, names_of_sets, strict=True):
        for category, name in zip(shards.manifest.categories, own, strict=True):
            if name not in names:
                names[name] = category.original_id if category.original_id not in taken else free
                free += category.original_id in taken
                taken.add(names[name])
    categories = tuple(
        Category(label=label, original_id=original, name=name) for label, (name, original) in enumerate(names.items())
    )
    label_of = {name: label for label, name in enumerate(names)}
    return [
        shards
        if [category.name for category in shards.manifest.categories] == list(names)
        else replace(shards, mapped_categories=categories, mapped_labels=tuple(label_of[name] for name in own))
        for shards, own in zip(shard_sets, names_of_sets, strict=True)
    ]


def _rename_problems(shards: ShardSet, renamed: Mapping[str, str]) -> Iterator[str]:
    """Reasons why the classes of a set cannot be joined with others under their new names."""
    theirs = [category.name for category in shards.manifest.categories]
    if twice := [name for name in dict.fromkeys(theirs) if theirs.count(name) > 1]:
        yield (
            f"{shards.uri}: {listed(twice)} names several classes: give every class a name of its own, and prepare the data"
            " again"
        )
    for name in renamed:
        if name not in theirs:
            close = difflib.get_close_matches(name, theirs, n=3)
            known = f"did you mean {' or '.join(close)}?" if close else f"it has {listed(theirs)}"
            yield f"{shards.uri}: classes renames {name!r}, and it has no such class; {known}"
    becoming: dict[str, list[str]] = {}
    for name in dict.fromkeys(theirs):
        becoming.setdefault(renamed.get(name, name), []).append(name)
    for name, sources in becoming.items():
        if len(sources) > 1 and not set(sources) <= renamed.keys():
            others = ", ".join(source for source in sources if source in renamed)
            yield (
                f"{shards.uri}: {others} would become {name}, and it has a class {name} already: choose another name, or write"
                f" `{name}: {name}` too, to make one class of them"
            )


def classes_of_its_own(shards: ShardSet, names: Sequence[str]) -> list[str]:
    """Classes of the set that are not among `names`."""
    return list(dict.fromkeys(c.name for c in shards.manifest.categories if c.name not in names))


def class_lines(shards: ShardSet, use: str) -> list[str]:
    """Describe the mapping of classes for the person who starts a run; empty where there was none."""
    if shards.mapped_categories is None:
        return []
    names = [category.name for category in shards.mapped_categories]
    theirs = [category.name for category in shards.manifest.categories]
    lines = [f"{use}: its classes are in another order, or fewer; labels are mapped by name"]
    if own := classes_of_its_own(shards, names):
        lines.append(f"{use} alone has {listed(own)}, without boxes: left out")
    if lacking := [name for name in names if name not in theirs]:
        lines.append(f"{use} lacks {listed(lacking)}: not measured")
    return lines


def repeated_names(categories: Sequence[Category]) -> list[str]:
    """Names that several categories have, apart from case and blanks, each with the ids of all of them."""
    groups: dict[str, list[Category]] = {}
    for category in categories:
        groups.setdefault(" ".join(category.name.casefold().split()), []).append(category)
    return [
        f"{alike[0].name} ({', '.join(f'{category.original_id}' for category in alike)})"
        for alike in groups.values()
        if len(alike) > 1
    ]


def listed(names: Sequence[str], counts: dict[str, int] | None = None) -> str:
    """Names of classes in a message, with their boxes where `counts` has them."""
    texts = [f"{name} ({counts[name]} boxes)" if counts else name for name in names[:MOST_NAMED]]
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return (", ".join(texts) or "none") + more
