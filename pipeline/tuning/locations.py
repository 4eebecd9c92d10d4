"""Paths among the values of a sweep, made absolute: its trials run in working directories of their own.

The types of the experiment say which of its keys are paths, at any depth: `data.train`, `init`, `teacher.boxes.folder`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from pydantic import AfterValidator, BaseModel

from pipeline.config import Experiment
from pipeline.pretrained import weights_location
from pipeline.ray_job import absolute_location
from pipeline.tuning.space import LISTED

TO_ABSOLUTE = (absolute_location, weights_location)


def with_absolute_paths(experiment: Mapping[str, Any]) -> dict[str, Any]:
    """Copy plain values of an experiment with absolute paths. Wrong values stay, for the check that names them."""
    paths: dict[str, Any] = _absolute(experiment, Experiment)
    return paths


def with_absolute_candidates(space: Mapping[str, Any]) -> dict[str, Any]:
    """Copy the plain values of a search space with absolute paths among candidates and conditions."""
    return {key: _domain(key, domain) if isinstance(domain, Mapping) else domain for key, domain in space.items()}


def _domain(key: str, domain: Mapping[str, Any]) -> dict[str, Any]:
    changed = dict(domain)
    for kind in LISTED:
        if kind in domain:
            changed[kind] = _absolute_all(domain[kind], _type_at(key))
    if isinstance(conditions := domain.get("when"), Mapping):
        changed["when"] = {other: _absolute_all(values, _type_at(other)) for other, values in conditions.items()}
    return changed


def _absolute_all(values: Any, kind: Any) -> Any:
    return [_absolute(value, kind) for value in values] if isinstance(values, list | tuple) else _absolute(values, kind)


def _absolute(value: Any, kind: Any) -> Any:
    """Copy a value of the type `kind`, sections with their parts."""
    if isinstance(value, str):
        for to_absolute in _converters(kind):
            try:
                return to_absolute(value)
            except ValueError:
                return value
    if isinstance(value, list | tuple):
        items = _item_type(kind)
        return [_absolute(item, items) for item in value] if items is not None else value
    if isinstance(value, Mapping):
        parts = _parts(kind)
        return {name: _absolute(part, parts.get(name)) for name, part in value.items()}
    return value


def _type_at(dotted: str) -> Any:
    """Type of a key of the experiment; None if there is no such key."""
    kind: Any = Experiment
    for name in str(dotted).split("."):
        kind = _parts(kind).get(name)
    return kind


def _parts(kind: Any) -> dict[str, Any]:
    """Types of the keys of a section."""
    parts: dict[str, Any] = {}
    for section in _alternatives(kind):
        if is_dataclass(section) or (isinstance(section, type) and issubclass(section, BaseModel)):
            parts |= get_type_hints(section, include_extras=True)
    return parts


def _item_type(kind: Any) -> Any:
    """Type of the items of a list; None if the key takes none."""
    return next((get_args(each)[0] for each in _alternatives(kind) if get_args(each)[1:] == (Ellipsis,)), None)


def _converters(kind: Any) -> Iterator[Callable[[str], str]]:
    for alternative in _alternatives(kind):
        for extra in get_args(alternative)[1:] if get_origin(alternative) is Annotated else ():
            if isinstance(extra, AfterValidator) and extra.func in TO_ABSOLUTE:
                yield extra.func


def _alternatives(kind: Any) -> Sequence[Any]:
    """Types that a union allows, or the type itself."""
    return (kind,) if kind is None or get_origin(kind) is Annotated or not get_args(kind) else get_args(kind)
