"""Classes of one shard set in the label order of another: of `val` in that of `train`, of any set in that of a detector."""

from collections.abc import Sequence
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
            f"{shards.uri}: its {len(theirs)} classes are not the {len(names)} of {owner} (here alone: {_listed(own, counts)};"
            f" only of {owner}: {_listed(lacking)}): prepare both with the same categories"
        )
    for place, given in ((shards.uri, theirs), (owner, list(names))):
        if twice := [name for name in dict.fromkeys(given) if given.count(name) > 1]:
            raise ManifestError(
                f"{place}: {_listed(twice)} names several classes, and the classes of {shards.uri} and {owner} differ:"
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
        lines.append(f"{use} alone has {_listed(own)}, without boxes: left out")
    if lacking := [name for name in names if name not in theirs]:
        lines.append(f"{use} lacks {_listed(lacking)}: not measured")
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


def _listed(names: Sequence[str], counts: dict[str, int] | None = None) -> str:
    texts = [f"{name} ({counts[name]} boxes)" if counts else name for name in names[:MOST_NAMED]]
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return (", ".join(texts) or "none") + more
