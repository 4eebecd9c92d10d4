"""Searched keys as factors: the levels of a list are its values, the levels of a range are intervals."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.tuning.space import Domain, Point, Space, equal_values

MAX_INTERVALS = 4  # per range
POINTS_PER_INTERVAL = 12  # tried points that allow one more interval
MAX_SEPARATE_INTEGERS = 6  # an integer range with so few values is compared value by value


@dataclass(frozen=True)
class Factor:
    """A searched key as a factor. Level `reference` contains the experiment's own value."""

    key: str
    labels: tuple[str, ...]
    reference: int
    values: tuple[Any, ...] = ()  # one per level of a list
    edges: tuple[float, ...] = ()  # interval bounds, ascending; the last interval includes its upper end
    default: Any = None

    def level(self, value: Any) -> int:
        """Level of a value.

        Raises:
            ValueError: the value is neither a candidate nor the default.
        """
        for level, candidate in enumerate(self.values):
            if equal_values(candidate, value):
                return level
        if self.edges and _is_number(value) and self.edges[0] <= value <= self.edges[-1]:
            level = int(np.searchsorted(self.edges, value, side="right")) - 1
            return min(level, len(self.edges) - 2)
        if equal_values(value, self.default):
            return self.reference
        raise ValueError(f"{self.key}: {value!r} is not among {', '.join(self.labels)}")


def factors_of(space: Space, default: Point, points: int) -> tuple[Factor, ...]:
    """Factors of a search space.

    Args:
        points: number of points that were tried; more points allow more intervals.
    """
    intervals = points // POINTS_PER_INTERVAL
    return tuple(_factor(key, domain, default.get(key), intervals) for key, domain in space.items())


def _factor(key: str, domain: Domain, default: Any, intervals: int) -> Factor:
    values: tuple[Any, ...] = domain.values if domain.listed else _separate_integers(domain)
    edges = () if values else _edges(domain, min(max(intervals, 2), MAX_INTERVALS))
    labels = [value_text(value) for value in values]
    labels += [f"{value_text(a)} to {value_text(b)}" for a, b in itertools.pairwise(edges)]
    bare = Factor(key, tuple(labels), -1, values, edges)
    try:
        return Factor(key, tuple(labels), bare.level(default), values, edges, default)
    except ValueError:  # the experiment's own value is no candidate, and gets a level of its own
        own = f"{value_text(default)} (default)" if default is not None else "default"
        return Factor(key, (*labels, own), len(labels), values, edges, default)


def _separate_integers(domain: Domain) -> tuple[int, ...]:
    if domain.kind != "integer":
        return ()
    low, high = domain.values[:2]
    values = tuple(range(low, high + 1, int(domain.step or 1)))
    return values if len(values) <= MAX_SEPARATE_INTEGERS else ()


def _edges(domain: Domain, count: int) -> tuple[float, ...]:
    low, high = map(float, domain.values[:2])
    spacing = np.geomspace if domain.kind == "loguniform" else np.linspace
    edges = [float(edge) for edge in spacing(low, high, count + 1)]
    if domain.kind == "integer":
        edges = [low, *(math.ceil(edge) for edge in edges[1:-1]), high]
    return tuple(dict.fromkeys(edges))


def value_text(value: Any) -> str:
    """Short text of a value: 0.00025, 1e-06, fdr."""
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(value_text, value))}]"
    return str(value)


def point_text(point: Point) -> str:
    """Short text of a point: key=value, ..."""
    return ", ".join(f"{key}={value_text(value)}" for key, value in point.items())


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """Last part of each key, or the whole key if that is ambiguous."""
    leaves = [key.rpartition(".")[2] for key in keys]
    return {key: leaf if leaves.count(leaf) == 1 else key for key, leaf in zip(keys, leaves, strict=True)}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
