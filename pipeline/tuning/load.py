"""A sweep file, checked as a whole before anything starts: every problem of it in one error."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.config import ConfigError, Experiment
from pipeline.config_files import check, load_cluster, read_yaml, with_values
from pipeline.training.schedule import BASE_BATCH_SIZE, divided
from pipeline.tuning.space import Point, as_text, grid, grid_size, ordered, random, wanted
from pipeline.tuning.sweep import Sweep, evaluations, experiment_of

MOST_GRID_POINTS = 10_000
POINTS_TRIED = 100  # whole points that are checked besides each value on its own


def load_sweep(path: str | Path, overrides: Mapping[str, Any] | None = None) -> Sweep:
    """
    Args:
        overrides: values of the sweep by dotted key; a key that the sweep does not have is one of the experiment and
            goes into `set`: {"trials": 8, "schedule.epochs": 12}.

    Raises:
        ConfigError: with every problem of the sweep, of the experiment, and of every candidate value.
    """
    content = _placed(read_yaml(path), Path(path), overrides or {})
    problems = ["base: it is filled in, leave it out"] * (content.pop("base", None) is not None)
    try:
        content["base"] = _base(content)
    except ConfigError as error:
        problems.append(f"experiment: {error}")
    try:
        sweep = check(Sweep, content, source=str(path))
    except ConfigError as error:
        raise _error(path, [*problems, *_lines(error)]) from None
    problems += [] if problems else sweep_problems(sweep)
    if problems:
        raise _error(path, problems)
    return sweep


def sweep_problems(sweep: Sweep) -> list[str]:
    """Of everything that goes beyond single values: files, conditions, candidates, and how they fit together."""
    problems = _cluster_problems(sweep)
    try:
        base = check(Experiment, sweep.base, source=sweep.experiment)
    except ConfigError as error:
        return [*problems, *(f"experiment: {line}" for line in _lines(error))]
    problems += _condition_problems(sweep) + _searcher_problems(sweep)
    candidates = _candidate_problems(sweep)
    if not problems and not candidates:
        candidates = _combination_problems(sweep)
    return problems + candidates + _length_problems(sweep, base)


def _placed(content: dict[str, Any], path: Path, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """With overrides where they belong, paths made absolute, and a name."""
    own = {dotted: value for dotted, value in overrides.items() if dotted.split(".")[0] in Sweep.model_fields}
    content = with_values(content, own)
    of_experiment = {dotted: value for dotted, value in overrides.items() if dotted not in own}
    if of_experiment:
        content["set"] = {**(content.get("set") or {}), **of_experiment}
    for key in ("experiment", "cluster"):
        if isinstance(content.get(key), str):
            content[key] = os.path.abspath(path.parent / content[key])
    content.setdefault("name", path.stem)
    return content


def _base(content: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(content.get("experiment"), str):
        return {}  # said by the sweep's own check
    base = with_values(read_yaml(content["experiment"]), content.get("set") or {})
    base.setdefault("name", Path(content["experiment"]).stem)
    return base


def _cluster_problems(sweep: Sweep) -> list[str]:
    try:
        load_cluster(sweep.cluster)
    except ConfigError as error:
        return [f"cluster: {line}" for line in _lines(error)]
    return []


def _condition_problems(sweep: Sweep) -> list[str]:
    problems = []
    for key, domain in sweep.space.items():
        for other, values in domain.when.items():
            if other not in sweep.space:
                problems.append(f"space.{key}.when: {other} is not searched; known: {', '.join(sweep.space)}")
            elif not any(sweep.space[other].allows(value) for value in wanted(values)):
                problems.append(f"space.{key}.when: {other} is never {' or '.join(map(as_text, wanted(values)))}")
    searched = {key: domain for key, domain in sweep.space.items() if set(domain.when) <= set(sweep.space)}
    circle = [key for key in searched if key not in ordered(searched)]
    if circle:
        problems.append(f"space: the conditions of {', '.join(circle)} wait for each other")
    return problems


def _searcher_problems(sweep: Sweep) -> list[str]:
    kind, problems = sweep.searcher.kind, []
    for key, domain in sweep.space.items():
        if kind == "grid" and not domain.listed:
            problems.append(f"space.{key}: searcher grid needs a list of values (grid or choice), not {domain.kind}")
        if kind != "grid" and domain.kind == "grid":
            problems.append(f"space.{key}: grid needs searcher.kind grid; write choice for {kind} to draw from")
    if kind == "grid" and not problems and grid_size(sweep.space) > MOST_GRID_POINTS:
        problems.append(f"space: a grid of {grid_size(sweep.space):,} points: {MOST_GRID_POINTS:,} is the most")
    return problems


def _candidate_problems(sweep: Sweep) -> list[str]:
    """Every candidate in the experiment as it is, with the other values that its condition asks for."""
    problems = []
    for key, domain in sweep.space.items():
        context = {other: wanted(values)[0] for other, values in domain.when.items() if wanted(values)}
        for value in domain.ends:
            found = _refusals(sweep, {**context, key: value})
            if any("unknown key" in line for line in found):
                problems += [f"space.{key}: {line}" for line in found]
                break
            problems += [f"space.{key}: {as_text(value)} is refused: {line}" for line in found]
    return problems


def _combination_problems(sweep: Sweep) -> list[str]:
    """Values that are each right may not be so together: the first of many points that is refused."""
    whole = sweep.searcher.kind == "grid" and grid_size(sweep.space) <= POINTS_TRIED
    points = grid(sweep.space) if whole else [random(sweep.space, seed) for seed in range(POINTS_TRIED)]
    for point in points:
        if found := _refusals(sweep, point):
            shown = ", ".join(f"{key}={as_text(value)}" for key, value in point.items())
            return [f"space: values that are refused together ({shown}): {line}" for line in found]
    return []


def _refusals(sweep: Sweep, point: Point) -> list[str]:
    try:
        experiment = check(Experiment, experiment_of(sweep, point, seed=0), source="trial")
        batch = experiment.schedule.global_batch_size or BASE_BATCH_SIZE[experiment.model.variant]
        divided(batch, experiment.schedule.micro_batch_size, sweep.workers_per_trial)
    except ConfigError as error:
        return _lines(error)
    return []


def _length_problems(sweep: Sweep, base: Experiment) -> list[str]:
    problems = []
    if base.data.val is None:
        problems.append("experiment: data.val is missing: trials are compared by what is evaluated on it")
    total, grace = evaluations(base), sweep.scheduler.grace
    if total is not None and sweep.scheduler.kind != "none" and grace >= total:
        problems.append(
            f"scheduler.grace ({grace}) leaves nothing to stop: a trial has {total} evaluation(s); lower it, evaluate"
            " more often (set evaluation.every_epochs or every_steps), or take kind: none"
        )
    own = {"space": ("name", "storage", "init", "seed"), "set": ("name", "storage", "init")}
    for place, keys in own.items():
        given = [key for key in keys if key in getattr(sweep, place)]
        problems += [f"{place}.{key}: the sweep itself decides on it, leave it out" for key in given]
    return problems


def _lines(error: ConfigError) -> list[str]:
    """The problems in an error of `check`, without its headline."""
    head, *lines = str(error).split("\n  ")
    return lines or [head]


def _error(path: str | Path, problems: Sequence[str]) -> ConfigError:
    return ConfigError("\n  ".join([f"{path}: {len(problems)} problem(s)", *problems]))
