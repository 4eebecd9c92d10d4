"""Class heads carried over to other classes by name.

    match = match_classes(objects365_names(), ("person", "sofa", "drone"))
    print(match)                                   # source of each row with the reason; new rows
    state_dict = transfer_classes(state_dict, detector.state_dict(), match)

A name is compared as written, then without case, blanks and punctuation, then in the singular, then through synonyms, and
last by the parts of names such as "Bowl/Basin". The names and synonyms are data: `data/class_names.json`.
"""

import functools
import json
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any, Literal, get_args

from torch import Tensor

How = Literal["exact", "normalised", "plural", "synonym", "part"]  # from the strictest comparison to the loosest

EMBEDDING = "decoder.denoising_class_embed.weight"  # [classes + 1, D]; the last row is padding
_HEADS = re.compile(r"decoder\.(enc_score_head|dec_score_head\.\d+)\.(weight|bias)")
_SHOWN = 8


@dataclass(frozen=True)
class ClassRow:
    """Source of one class of the target."""

    name: str
    source: int | None = None  # row of the source's heads; None: nothing matched, the class starts anew
    source_name: str = ""
    how: How | None = None
    passed_over: tuple[str, ...] = ()  # other source classes that matched as well; the lowest row was taken


@dataclass(frozen=True)
class ClassMatch:
    """Source of every target class, in the order of the target's rows."""

    rows: tuple[ClassRow, ...]
    source_names: tuple[str | None, ...]  # None: a row that was never trained

    @property
    def new(self) -> tuple[str, ...]:
        """Target classes without a source, which start anew."""
        return tuple(row.name for row in self.rows if row.source is None)

    @property
    def unused(self) -> tuple[str, ...]:
        """Source classes that no target class takes."""
        used = {row.source for row in self.rows}
        return tuple(name for i, name in enumerate(self.source_names) if name is not None and i not in used)

    def __str__(self) -> str:
        kinds = [(how, sum(row.how == how for row in self.rows)) for how in get_args(How)]
        counts = ", ".join(f"{count} {how}" for how, count in kinds if count)
        lines = [f"{len(self.rows) - len(self.new)} of {len(self.rows)} classes carried over ({counts})"]
        lines += [
            f"  {row.name} <- {row.source_name} ({row.how})"
            + (f", rather than {', '.join(row.passed_over)}" if row.passed_over else "")
            for row in self.rows
            if row.how not in (None, "exact", "normalised") or row.passed_over
        ]
        lines += [f"  {what}: {_some(names)}" for what, names in (("new", self.new), ("unused", self.unused)) if names]
        return "\n".join(lines)


def match_classes(
    source_names: Sequence[str | None],
    target_names: Sequence[str],
    synonyms: Iterable[Iterable[str]] | None = None,
) -> ClassMatch:
    """Find for every target class the source class of the same name.

    One source class can serve several target classes. Where several match equally well, the lowest row is taken.

    Args:
        source_names: name of each row of the source's heads; None or blank for a row that was never trained.
        target_names: name of each row of the target's heads.
        synonyms: groups of names that mean the same, in any direction; `synonym_groups()` unless given.

    Raises:
        ValueError: if no class at all matches.
    """
    sources = tuple(name if name and name.strip() else None for name in source_names)
    groups = _index_groups(synonym_groups() if synonyms is None else synonyms)
    rows_by_key: dict[tuple[How, str], list[int]] = defaultdict(list)
    for row, name in enumerate(sources):
        for key in set() if name is None else _keys(name, groups):
            rows_by_key[key].append(row)

    def find(name: str) -> ClassRow:
        keys = _keys(name, groups)
        for how in get_args(How):
            rows = sorted({row for key in keys if key[0] == how for row in rows_by_key.get(key, ())})
            if rows:
                first, *others = (sources[row] or "" for row in rows)
                return ClassRow(name, rows[0], first, how, tuple(others))
        return ClassRow(name)

    match = ClassMatch(tuple(find(name) for name in target_names), sources)
    if len(match.new) == len(match.rows):
        raise ValueError(
            f"no class of the target ({_some(match.new)}) is among those of the source ({_some(match.unused)}):"
            " check the names, pass `synonyms` that join them, or train the class heads anew"
        )
    return match


def transfer_classes(
    state_dict: Mapping[str, Tensor], target: Mapping[str, Tensor], match: ClassMatch
) -> dict[str, Tensor]:
    """Rearrange the class rows of every score head and of the denoising embedding for the target.

    Args:
        state_dict: the source's weights; everything but class rows is passed on as it is.
        target: weights of a freshly built target model: rows of new classes are taken from it.
        match: from `match_classes`, for exactly these two models.

    Raises:
        ValueError: if a head has another number of rows than there are names.
    """
    carried = [(row, entry.source) for row, entry in enumerate(match.rows) if entry.source is not None]
    target_rows, source_rows = ([pair[side] for pair in carried] for side in (0, 1))
    result = dict(state_dict)
    for key in state_dict.keys() & target.keys():
        padding = int(key == EMBEDDING)
        if not padding and not _HEADS.fullmatch(key):
            continue
        source, fresh = state_dict[key], target[key]
        names, fresh_names = len(match.source_names), len(match.rows)
        if "enc_score_head" in key and len(source) == len(fresh) == 1:
            continue  # a class-agnostic head: it scores "an object", whichever the classes
        if len(source) != names + padding or len(fresh) != fresh_names + padding:
            raise ValueError(
                f"{key} has {len(source) - padding} classes in the source and {len(fresh) - padding} in the target, but"
                f" {names} and {fresh_names} were named. Released Objects365 weights have 366 rows: use objects365_names()."
            )
        result[key] = fresh.clone().to(source)
        result[key][target_rows] = source[source_rows]
    return result


@functools.cache
def coco_categories() -> tuple[tuple[int, str], ...]:
    """Original id and name of the 80 COCO classes, in the order of a COCO model's rows."""
    return tuple((category, name) for category, name in _tables()["coco"])


def coco_names() -> tuple[str, ...]:
    """Names of the 80 COCO classes, in the order of a COCO model's rows."""
    return tuple(name for _, name in coco_categories())


def objects365_names() -> tuple[str | None, ...]:
    """Names of the 366 rows of a released Objects365 model: row = category id 1 to 365, and row 0 was never trained.

    Spelled as in the dataset's own annotations.
    """
    return (None, *_tables()["objects365"])


def categories_of(count: int, names: Sequence[str] | None = None) -> list[tuple[int, str]]:
    """Category id and name of each label of a detector that stores no ids.

    With names, they are COCO's ids if the classes are COCO's in their order, else the labels. Without names, the number of
    classes decides: COCO's, Objects365's, or placeholders.
    """
    coco, objects365 = coco_categories(), list(enumerate(objects365_names()))
    if names is not None:
        groups = _index_groups(synonym_groups())
        same = [_keys(our, groups) & _keys(their, groups) for (_, our), their in zip(coco, names, strict=False)]
        ids = [number for number, _ in coco] if len(names) == len(coco) and all(same) else range(len(names))
        return list(zip(ids, names, strict=True))
    for known in (coco, objects365, objects365[1:]):
        if len(known) == count:
            return [(number, name or f"class_{number}") for number, name in known]
    return [(label, f"class_{label}") for label in range(count)]


def synonym_groups() -> tuple[tuple[str, ...], ...]:
    """Groups of class names that mean the same. Some are loose on purpose: "suitcase" and "luggage"."""
    return tuple(tuple(group) for group in _tables()["synonyms"])


@functools.cache
def _tables() -> dict[str, Any]:
    tables: dict[str, Any] = json.loads(
        (resources.files("dfine_core.checkpoints") / "class_names.json").read_text("utf-8")
    )
    return tables


def _keys(name: str, groups: Mapping[str, set[str]]) -> set[tuple[How, str]]:
    """Keys under which a name is compared, for every way of comparing."""
    by_how: dict[How, set[str]] = {
        "exact": {name.strip()},
        "normalised": {_normalised(name)},
        "plural": _singulars(name),
        "synonym": _groups_of(name, groups),
        "part": {key for part in name.split("/") for key in _singulars(part) | _groups_of(part, groups)},
    }
    return {(how, key) for how, keys in by_how.items() for key in keys if key}


def _index_groups(groups: Iterable[Iterable[str]]) -> dict[str, set[str]]:
    """Index from every form of each name to the groups that hold it."""
    index: dict[str, set[str]] = defaultdict(set)
    for number, group in enumerate(groups):
        for form in {form for name in group for form in _singulars(name)}:
            index[form].add(f"group {number}")  # the blank keeps it apart from any normalised name
    return index


def _groups_of(name: str, groups: Mapping[str, set[str]]) -> set[str]:
    return {group for form in _singulars(name) for group in groups.get(form, ())}


def _normalised(name: str) -> str:
    return "".join(letter for letter in unicodedata.normalize("NFKC", name).casefold() if letter.isalnum())


def _singulars(name: str) -> set[str]:
    """Normalised name, and the singulars it may be the plural of."""
    name = _normalised(name)
    forms = {name}
    if name.endswith("s") and not name.endswith(("ss", "us", "is")):
        forms.add(name.removesuffix("s"))
    if name.endswith("ies"):
        forms.add(name.removesuffix("ies") + "y")
    if name.endswith(("ses", "xes", "zes", "ches", "shes", "oes")):
        forms.add(name.removesuffix("es"))
    return forms


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
