"""Settings of a key that are compared: its listed values, or stretches of its range."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.tuning.space import Domain, Point, Space, same

MOST_STRETCHES = 4  # of a range
POINTS_PER_STRETCH = 12  # before a range is cut into more of them
FEW_INTEGERS = 6  # of a range that are not cut but compared one by one


@dataclass(frozen=True)
class Factor:
    """A key as a factor with levels. Level `reference` is the one that the experiment as it is belongs to."""

    key: str
    labels: tuple[str, ...]
    reference: int
    values: tuple[Any, ...] = ()  # of listed levels
    edges: tuple[float, ...] = ()  # of stretches, ascending; the last one holds its upper end
    default: Any = None

    def level(self, value: Any) -> int:
        """Raises: ValueError, if the value is no candidate and not the default."""
        for place, candidate in enumerate(self.values):
            if same(candidate, value):
                return place
        if self.edges and _number(value) and self.edges[0] <= value <= self.edges[-1]:
            place = int(np.searchsorted(self.edges, value, side="right")) - 1
            return min(place, len(self.edges) - 2)
        if same(value, self.default):
            return self.reference
        raise ValueError(f"{self.key}: {value!r} is not among {', '.join(self.labels)}")


def factors_of(space: Space, default: Point, points: int) -> tuple[Factor, ...]:
    """
    Args:
        points: that were tried; more of them allow finer stretches.
    """
    stretches = points // POINTS_PER_STRETCH
    return tuple(_factor(key, domain, default.get(key), stretches) for key, domain in space.items())


def _factor(key: str, domain: Domain, default: Any, stretches: int) -> Factor:
    values: tuple[Any, ...] = domain.values if domain.listed else _few_integers(domain)
    edges = () if values else _edges(domain, min(max(stretches, 2), MOST_STRETCHES))
    labels = [shown(value) for value in values]
    labels += [f"{shown(a)} to {shown(b)}" for a, b in itertools.pairwise(edges)]
    bare = Factor(key, tuple(labels), -1, values, edges)
    try:
        return Factor(key, tuple(labels), bare.level(default), values, edges, default)
    except ValueError:  # the experiment's own value is no candidate: a level of its own
        own = f"{shown(default)} (as it is)" if default is not None else "as it is"
        return Factor(key, (*labels, own), len(labels), values, edges, default)


def _few_integers(domain: Domain) -> tuple[int, ...]:
    if domain.kind != "integer":
        return ()
    low, high = domain.values[:2]
    found = tuple(range(low, high + 1, int(domain.step or 1)))
    return found if len(found) <= FEW_INTEGERS else ()


def _edges(domain: Domain, count: int) -> tuple[float, ...]:
    low, high = map(float, domain.values[:2])
    spaced = np.geomspace if domain.kind == "loguniform" else np.linspace
    edges = [float(edge) for edge in spaced(low, high, count + 1)]
    if domain.kind == "integer":
        edges = [low, *(math.ceil(edge) for edge in edges[1:-1]), high]
    return tuple(dict.fromkeys(edges))


def shown(value: Any) -> str:
    """A value for people: 0.00025, 1e-06, fdr."""
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(shown, value))}]"
    return str(value)


def point_text(point: Point) -> str:
    return ", ".join(f"{key}={shown(value)}" for key, value in point.items())


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """The last part of each key, where that is enough to tell them apart."""
    leaves = [key.rpartition(".")[2] for key in keys]
    return {key: leaf if leaves.count(leaf) == 1 else key for key, leaf in zip(keys, leaves, strict=True)}


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
