"""What a sweep may vary: candidate values by dotted key, and points drawn from them.

A point holds a value for every key that is active in it; a key whose condition does not hold is left out, and the experiment's
own value stands. Keys are drawn after those that their conditions name.
"""

import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

import numpy as np
import optuna
from pydantic import Field, field_validator, model_validator

from pipeline.config import Config

Point = dict[str, Any]  # value by dotted key
KINDS = ("choice", "grid", "uniform", "loguniform", "quniform", "integer")
LISTED = ("choice", "grid")
_EXPONENT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")


class Domain(Config):
    """Candidate values of one key: exactly one of the first six."""

    choice: tuple[Any, ...] | None = None  # drawn from
    grid: tuple[Any, ...] | None = None  # each is tried, with each of every other key
    uniform: tuple[float, float] | None = None  # (lowest, highest)
    loguniform: tuple[float, float] | None = None
    quniform: tuple[float, float, float] | None = None  # (lowest, highest, step)
    integer: tuple[int, int] | tuple[int, int, int] | None = None  # (lowest, highest[, step]), both included
    when: dict[str, Any] = Field(
        default_factory=dict
    )  # other searched keys and the value, or list of values, that they must have

    @field_validator("choice", "grid", "when")
    @classmethod
    def _numbers_as_numbers(cls, value: Any) -> Any:
        return _with_numbers(value)

    @model_validator(mode="after")
    def _one_kind_that_can_be_drawn_from(self) -> Self:
        given = [kind for kind in KINDS if getattr(self, kind) is not None]
        if len(given) != 1:
            raise ValueError(f"give one of {', '.join(KINDS)}, not {' and '.join(given) or 'none'}")
        problems = _list_problems(self.values) if self.listed else _range_problems(self)
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @property
    def kind(self) -> str:
        return next(kind for kind in KINDS if getattr(self, kind) is not None)

    @property
    def listed(self) -> bool:
        """Whether the candidates are written one by one."""
        return self.kind in LISTED

    @property
    def values(self) -> tuple[Any, ...]:
        """The candidates as they are written: the list, or (lowest, highest[, step])."""
        return tuple(getattr(self, self.kind))

    @property
    def ends(self) -> tuple[Any, ...]:
        """The candidates to be checked: all of a list, both ends of a range."""
        return self.values if self.listed else self.values[:2]

    @property
    def step(self) -> float | None:
        return self.values[2] if not self.listed and len(self.values) == 3 else None

    def allows(self, value: Any) -> bool:
        if self.listed:
            return any(same(value, candidate) for candidate in self.values)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and self.values[0] <= value <= self.values[1]


def _with_numbers(value: Any) -> Any:
    """`1e-4` as people write it, which YAML 1.1 reads as a word."""
    if isinstance(value, dict):
        return {key: _with_numbers(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_with_numbers, value))
    return float(value) if isinstance(value, str) and _EXPONENT.fullmatch(value) else value


def _list_problems(values: Sequence[Any]) -> list[str]:
    texts = [as_text(value) for value in values]
    twice = sorted({text for text in texts if texts.count(text) > 1})
    problems = [f"{', '.join(twice)} is there twice"] if twice else []
    return problems if values else ["it is empty: name at least one value"]


def _range_problems(domain: Domain) -> list[str]:
    low, high, *rest = domain.values
    step = rest[0] if rest else None
    if not all(map(math.isfinite, domain.values)):
        return [f"{domain.kind} {list(domain.values)}: every number must be finite"]
    if low >= high:
        return [f"{domain.kind} [{low:g}, {high:g}]: the first number must be below the second"]
    if domain.kind == "loguniform" and low <= 0:
        return [f"loguniform [{low:g}, {high:g}] must lie above zero: take uniform, or another lower end"]
    if step is not None and step <= 0:
        return [f"{domain.kind}: the step ({step:g}) must be positive"]
    if step is not None and abs((high - low) / step - round((high - low) / step)) > 1e-9:
        reached = low + math.floor((high - low) / step) * step
        return [f"{domain.kind}: steps of {step:g} from {low:g} miss {high:g}; the last one is {reached:g}"]
    return []


Space = Mapping[str, Domain]


def as_text(value: Any) -> str:
    """A value as one name: equal values have equal names."""
    return json.dumps(_canonical(value), sort_keys=True)


def _canonical(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _canonical(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_canonical(part) for part in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def same(a: Any, b: Any) -> bool:
    """Equal as numbers, 8 and 8.0 too, but a truth value is none."""
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return isinstance(a, bool) == isinstance(b, bool) and bool(a == b)


def wanted(condition: Any) -> Sequence[Any]:
    """The values of a condition, which may be written as one or as a list."""
    return condition if isinstance(condition, list | tuple) else [condition]


def active(domain: Domain, point: Mapping[str, Any]) -> bool:
    """Whether the condition holds among the values drawn so far."""
    return all(
        key in point and any(same(point[key], value) for value in wanted(values)) for key, values in domain.when.items()
    )


def ordered(space: Space) -> list[str]:
    """Keys in the file's order, but each after those that its condition names; without those of a circle."""
    order: list[str] = []
    waiting = list(space)
    while ready := [key for key in waiting if all(other in order for other in space[key].when if other in space)]:
        order.append(ready[0])
        waiting.remove(ready[0])
    return order


def grid(space: Space) -> list[Point]:
    """Every combination once, the first key changing slowest.

    Args:
        space: of listed values alone.
    """
    points: list[Point] = [{}]
    for key in ordered(space):
        points = list(itertools.chain.from_iterable(_extended(point, key, space[key]) for point in points))
    return points


def grid_size(space: Space) -> int:
    """Number of combinations if no key had a condition: the most that there can be."""
    return math.prod(len(domain.values) for domain in space.values())


def _extended(point: Point, key: str, domain: Domain) -> Iterator[Point]:
    if not active(domain, point):
        yield point
        return
    yield from ({**point, key: value} for value in domain.values)


def random(space: Space, seed: int | Sequence[int]) -> Point:
    """One point; a pure function of the seed."""
    generator = np.random.default_rng(seed)
    point: Point = {}
    for key in ordered(space):
        if active(space[key], point):
            point[key] = _drawn(space[key], generator)
    return point


def _drawn(domain: Domain, generator: np.random.Generator) -> Any:
    if domain.listed:
        return domain.values[int(generator.integers(len(domain.values)))]
    low, high = domain.values[:2]
    if domain.kind == "loguniform":
        return float(np.exp(generator.uniform(np.log(low), np.log(high))))
    if domain.kind == "uniform":
        return float(generator.uniform(low, high))
    step = domain.step or 1
    value = low + step * int(generator.integers(round((high - low) / step) + 1))
    return int(value) if domain.kind == "integer" else min(float(value), float(high))


def suggest(space: Space, trial: optuna.Trial) -> Point:
    """One point by Optuna's sampler, the space being defined while it is drawn: conditions are its branches."""
    point: Point = {}
    for key in ordered(space):
        if active(space[key], point):
            point[key] = _suggested(key, space[key], trial)
    return point


def _suggested(key: str, domain: Domain, trial: optuna.Trial) -> Any:
    if domain.listed:
        return _from_categories(domain, trial.suggest_categorical(key, categories(domain)))
    low, high = domain.values[:2]
    if domain.kind == "integer":
        return trial.suggest_int(key, low, high, step=int(domain.step or 1))
    return trial.suggest_float(key, low, high, step=domain.step, log=domain.kind == "loguniform")


def distribution(domain: Domain) -> optuna.distributions.BaseDistribution:
    """The same candidates as `suggest` takes, for trials that are told to Optuna afterwards."""
    if domain.listed:
        return optuna.distributions.CategoricalDistribution(categories(domain))
    low, high = domain.values[:2]
    if domain.kind == "integer":
        return optuna.distributions.IntDistribution(low, high, step=int(domain.step or 1))
    return optuna.distributions.FloatDistribution(low, high, step=domain.step, log=domain.kind == "loguniform")


def categories(domain: Domain) -> list[Any]:
    """Optuna takes plain values only, and holds 1 and True for one: anything else goes in as its text."""
    plain = all(isinstance(value, str) for value in domain.values) or all(map(_is_number, domain.values))
    return list(domain.values) if plain else [as_text(value) for value in domain.values]


def category(domain: Domain, value: Any) -> Any:
    """The one of `categories` that stands for a value."""
    place = next(n for n, candidate in enumerate(domain.values) if same(candidate, value))
    return categories(domain)[place]


def _from_categories(domain: Domain, category: Any) -> Any:
    return domain.values[categories(domain).index(category)]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
