"""The search space of a sweep: candidate values by dotted key, and points sampled from them.

A point has a value for every key that is active in it. A key whose condition does not hold is left out, and keeps the
experiment's own value. Keys are sampled after those that their conditions name.
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

from pipeline.config_keys import Config

Point = dict[str, Any]  # value by dotted key
KINDS = ("choice", "grid", "uniform", "loguniform", "quniform", "integer")
LISTED = ("choice", "grid")
_EXPONENT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")


class Domain(Config):
    """Candidate values of one key: exactly one of the first six fields is given."""

    choice: tuple[Any, ...] | None = None  # sampled from
    grid: tuple[Any, ...] | None = None  # every combination with the other keys is tried
    uniform: tuple[float, float] | None = None  # (lowest, highest)
    loguniform: tuple[float, float] | None = None
    quniform: tuple[float, float, float] | None = None  # (lowest, highest, step)
    integer: tuple[int, int] | tuple[int, int, int] | None = None  # (lowest, highest[, step]), both included
    # Condition: other searched keys, each with the value, or list of values, that it must have.
    when: dict[str, Any] = Field(default_factory=dict)

    @field_validator("choice", "grid", "when")
    @classmethod
    def _numbers_as_numbers(cls, value: Any) -> Any:
        return _with_numbers(value)

    @model_validator(mode="after")
    def _one_valid_kind(self) -> Self:
        given = [kind for kind in KINDS if getattr(self, kind) is not None]
        if len(given) != 1:
            raise ValueError(f"give one of {', '.join(KINDS)}, not {' and '.join(given) or 'none'}")
        problems = _list_problems(self.values) if self.listed else _range_problems(self)
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @property
    def kind(self) -> str:
        """Name of the field that is given."""
        return next(kind for kind in KINDS if getattr(self, kind) is not None)

    @property
    def listed(self) -> bool:
        """True for a list of candidates, False for a range."""
        return self.kind in LISTED

    @property
    def values(self) -> tuple[Any, ...]:
        """Candidates as written: the list, or (lowest, highest[, step])."""
        return tuple(getattr(self, self.kind))

    @property
    def ends(self) -> tuple[Any, ...]:
        """Candidates to check: the whole list, or both ends of the range."""
        return self.values if self.listed else self.values[:2]

    @property
    def step(self) -> float | None:
        """Step of a range; None if it has none."""
        return self.values[2] if not self.listed and len(self.values) == 3 else None

    def allows(self, value: Any) -> bool:
        """Test a value against the list or the range."""
        if self.listed:
            return any(equal_values(value, candidate) for candidate in self.values)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and self.values[0] <= value <= self.values[1]


def _with_numbers(value: Any) -> Any:
    """Convert exponents such as `1e-4`, which YAML 1.1 reads as text, to numbers."""
    if isinstance(value, dict):
        return {key: _with_numbers(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_with_numbers, value))
    return float(value) if isinstance(value, str) and _EXPONENT.fullmatch(value) else value


def _list_problems(values: Sequence[Any]) -> list[str]:
    texts = [canonical_text(value) for value in values]
    twice = sorted({text for text in texts if texts.count(text) > 1})
    problems = [f"{', '.join(twice)} is listed twice"] if twice else []
    return problems if values else ["the list is empty: give at least one value"]


def _range_problems(domain: Domain) -> list[str]:
    low, high, *rest = domain.values
    step = rest[0] if rest else None
    if not all(map(math.isfinite, domain.values)):
        return [f"{domain.kind} {list(domain.values)}: every number must be finite"]
    if low >= high:
        return [f"{domain.kind} [{low:g}, {high:g}]: the first number must be below the second"]
    if domain.kind == "loguniform" and low <= 0:
        return [f"loguniform [{low:g}, {high:g}] must be above zero: use uniform, or a positive lower end"]
    if step is not None and step <= 0:
        return [f"{domain.kind}: the step ({step:g}) must be positive"]
    if step is not None and abs((high - low) / step - round((high - low) / step)) > 1e-9:
        last = low + math.floor((high - low) / step) * step
        return [f"{domain.kind}: steps of {step:g} from {low:g} miss {high:g}; the last one is {last:g}"]
    return []


Space = Mapping[str, Domain]


def canonical_text(value: Any) -> str:
    """JSON text of a value; equal values have equal texts."""
    return json.dumps(_canonical(value), sort_keys=True)


def _canonical(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _canonical(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_canonical(part) for part in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def equal_values(a: Any, b: Any) -> bool:
    """Compare values: numbers by value (8 == 8.0); a bool never equals a number."""
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(equal_values, a, b))
    return isinstance(a, bool) == isinstance(b, bool) and bool(a == b)


def condition_values(condition: Any) -> Sequence[Any]:
    """Values of a condition, which may be written as one value or as a list."""
    return condition if isinstance(condition, list | tuple) else [condition]


def is_active(domain: Domain, point: Mapping[str, Any]) -> bool:
    """Test the condition of a key against the values sampled so far."""
    return all(
        key in point and any(equal_values(point[key], value) for value in condition_values(values))
        for key, values in domain.when.items()
    )


def sampling_order(space: Space) -> list[str]:
    """Keys in the file's order, but each after those that its condition names; keys with circular conditions are left out."""
    order: list[str] = []
    waiting = list(space)
    while ready := [key for key in waiting if all(other in order for other in space[key].when if other in space)]:
        order.append(ready[0])
        waiting.remove(ready[0])
    return order


def grid_points(space: Space) -> list[Point]:
    """Every combination once; the first key changes slowest.

    Args:
        space: all its domains are lists.
    """
    points: list[Point] = [{}]
    for key in sampling_order(space):
        points = list(itertools.chain.from_iterable(_extended(point, key, space[key]) for point in points))
    return points


def grid_size(space: Space) -> int:
    """Number of combinations without any condition: an upper bound."""
    return math.prod(len(domain.values) for domain in space.values())


def _extended(point: Point, key: str, domain: Domain) -> Iterator[Point]:
    if not is_active(domain, point):
        yield point
        return
    yield from ({**point, key: value} for value in domain.values)


def random_point(space: Space, seed: int | Sequence[int]) -> Point:
    """Sample a point; a pure function of the seed."""
    generator = np.random.default_rng(seed)
    point: Point = {}
    for key in sampling_order(space):
        if is_active(space[key], point):
            point[key] = _sample_value(space[key], generator)
    return point


def _sample_value(domain: Domain, generator: np.random.Generator) -> Any:
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


def suggest_point(space: Space, trial: optuna.Trial) -> Point:
    """Sample a point with Optuna. The space is defined by run: conditions are branches."""
    point: Point = {}
    for key in sampling_order(space):
        if is_active(space[key], point):
            point[key] = _suggest_value(key, space[key], trial)
    return point


def _suggest_value(key: str, domain: Domain, trial: optuna.Trial) -> Any:
    if domain.listed:
        return _from_categories(domain, trial.suggest_categorical(key, categories(domain)))
    low, high = domain.values[:2]
    if domain.kind == "integer":
        return trial.suggest_int(key, low, high, step=int(domain.step or 1))
    return trial.suggest_float(key, low, high, step=domain.step, log=domain.kind == "loguniform")


def distribution(domain: Domain) -> optuna.distributions.BaseDistribution:
    """Optuna's distribution of the candidates, for trials that are added to a study afterwards."""
    if domain.listed:
        return optuna.distributions.CategoricalDistribution(categories(domain))
    low, high = domain.values[:2]
    if domain.kind == "integer":
        return optuna.distributions.IntDistribution(low, high, step=int(domain.step or 1))
    return optuna.distributions.FloatDistribution(low, high, step=domain.step, log=domain.kind == "loguniform")


def categories(domain: Domain) -> list[Any]:
    """Candidates as Optuna's categories. It takes plain values only, and 1 equals True there: others become text."""
    plain = all(isinstance(value, str) for value in domain.values) or all(map(_is_number, domain.values))
    return list(domain.values) if plain else [canonical_text(value) for value in domain.values]


def category(domain: Domain, value: Any) -> Any:
    """Category of a candidate value."""
    index = next(n for n, candidate in enumerate(domain.values) if equal_values(candidate, value))
    return categories(domain)[index]


def _from_categories(domain: Domain, category: Any) -> Any:
    return domain.values[categories(domain).index(category)]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
