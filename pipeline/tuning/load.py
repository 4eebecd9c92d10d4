"""Loader of sweep files. A file is checked as a whole before anything starts; one error lists every problem."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.config import ConfigError, Experiment
from pipeline.config_files import check, load_cluster, read_yaml, with_values
from pipeline.config_keys import RENAMED_KEYS
from pipeline.training.schedule import BASE_BATCH_SIZE, evaluations_without_data, shared_micro_batch
from pipeline.tuning.locations import with_absolute_candidates
from pipeline.tuning.space import (
    Point,
    canonical_text,
    condition_values,
    grid_points,
    grid_size,
    random_point,
    sampling_order,
)
from pipeline.tuning.sweep import Sweep, experiment_of
from pipeline.wording import plural

MAX_GRID_POINTS = 10_000
MAX_POINTS_CHECKED = 100  # whole points that are checked, besides each value on its own


def load_sweep(path: str | Path, overrides: Mapping[str, Any] | None = None) -> Sweep:
    """Load and check a sweep file.

    Args:
        overrides: values by dotted key. Keys of the sweep replace its own; all others are keys of the experiment, and go
            into `set`: {"trials": 8, "schedule.epochs": 12}.

    Raises:
        ConfigError: lists every problem of the sweep, of the experiment, and of every candidate value.
    """
    content = _with_overrides(read_yaml(path), Path(path), overrides or {})
    problems = ["base: the loader fills it in; leave it out"] * (content.pop("base", None) is not None)
    try:
        content["base"] = _base(content)
    except ConfigError as error:
        problems.append(f"experiment: {error}")
    try:
        sweep = check(Sweep, content, source=str(path))
    except ConfigError as error:
        raise _error(path, [*problems, *_problem_lines(error)]) from None
    problems += [] if problems else sweep_problems(sweep)
    if problems:
        raise _error(path, problems)
    return sweep


def sweep_problems(sweep: Sweep) -> list[str]:
    """Check everything beyond single values: files, conditions, candidates, and their combinations."""
    problems = _cluster_problems(sweep)
    try:
        base = check(Experiment, sweep.base, source=sweep.experiment)
    except ConfigError as error:
        return [*problems, *(f"experiment: {line}" for line in _problem_lines(error))]
    problems += _condition_problems(sweep) + _searcher_problems(sweep)
    candidates = _candidate_problems(sweep)
    if not problems and not candidates:
        candidates = _combination_problems(sweep)
    return problems + candidates + _length_problems(sweep, base)


def _with_overrides(content: dict[str, Any], path: Path, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Apply overrides to the sweep or to `set`, make paths absolute, and fill in the name."""
    own = {dotted: value for dotted, value in overrides.items() if _is_key_of_a_sweep(dotted.split(".")[0])}
    content = with_values(content, own)
    experiment_overrides = {dotted: value for dotted, value in overrides.items() if dotted not in own}
    if experiment_overrides:
        content["set"] = {**(content.get("set") or {}), **experiment_overrides}
    for key in ("experiment", "cluster"):
        if isinstance(content.get(key), str):
            content[key] = os.path.abspath(path.parent / content[key])
    content.setdefault("name", path.stem)
    if isinstance(content.get("space"), dict):
        content["space"] = with_absolute_candidates(content["space"])
    return content


def _is_key_of_a_sweep(key: str) -> bool:
    """Old names count too: their error then names the new key."""
    return key in Sweep.model_fields or RENAMED_KEYS.get(key) in Sweep.model_fields


def _base(content: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(content.get("experiment"), str):
        return {}  # the check of the sweep reports it
    base = with_values(read_yaml(content["experiment"]), content.get("set") or {})
    base.setdefault("name", Path(content["experiment"]).stem)
    return base


def _cluster_problems(sweep: Sweep) -> list[str]:
    try:
        load_cluster(sweep.cluster)
    except ConfigError as error:
        return [f"cluster: {line}" for line in _problem_lines(error)]
    return []


def _condition_problems(sweep: Sweep) -> list[str]:
    problems = []
    for key, domain in sweep.space.items():
        for other, values in domain.when.items():
            if other not in sweep.space:
                problems.append(f"space.{key}.when: {other} is not searched; known: {', '.join(sweep.space)}")
            elif not any(sweep.space[other].allows(value) for value in condition_values(values)):
                problems.append(
                    f"space.{key}.when: {other} is never {' or '.join(map(canonical_text, condition_values(values)))}"
                )
    searched = {key: domain for key, domain in sweep.space.items() if set(domain.when) <= set(sweep.space)}
    circular = [key for key in searched if key not in sampling_order(searched)]
    if circular:
        problems.append(f"space: circular conditions: {', '.join(circular)}")
    return problems


def _searcher_problems(sweep: Sweep) -> list[str]:
    kind, problems = sweep.searcher.kind, []
    for key, domain in sweep.space.items():
        if kind == "grid" and not domain.listed:
            problems.append(
                f"space.{key}: searcher.kind grid needs a list of values (grid or choice), not {domain.kind}"
            )
        if kind != "grid" and domain.kind == "grid":
            problems.append(f"space.{key}: grid needs searcher.kind grid; use choice with {kind}")
    if kind == "grid" and not problems and grid_size(sweep.space) > MAX_GRID_POINTS:
        problems.append(
            f"space: the grid has {grid_size(sweep.space):,} points; at most {MAX_GRID_POINTS:,} are allowed"
        )
    return problems


def _candidate_problems(sweep: Sweep) -> list[str]:
    """Check every candidate in the unchanged experiment, with the values that its condition requires."""
    problems = []
    for key, domain in sweep.space.items():
        context = {
            other: condition_values(values)[0] for other, values in domain.when.items() if condition_values(values)
        }
        for value in domain.ends:
            refusals = _point_problems(sweep, {**context, key: value})
            if any("unknown key" in line for line in refusals):
                problems += [f"space.{key}: {line}" for line in refusals]
                break
            problems += [f"space.{key}: {canonical_text(value)} is invalid: {line}" for line in refusals]
    return problems


def _combination_problems(sweep: Sweep) -> list[str]:
    """Check combinations: values that are valid alone may be invalid together. Reports the first such point."""
    whole = sweep.searcher.kind == "grid" and grid_size(sweep.space) <= MAX_POINTS_CHECKED
    points = (
        grid_points(sweep.space) if whole else [random_point(sweep.space, seed) for seed in range(MAX_POINTS_CHECKED)]
    )
    for point in points:
        if refusals := _point_problems(sweep, point):
            values = ", ".join(f"{key}={canonical_text(value)}" for key, value in point.items())
            return [f"space: values that are invalid together ({values}): {line}" for line in refusals]
    return []


def _point_problems(sweep: Sweep, point: Point) -> list[str]:
    try:
        experiment = check(Experiment, experiment_of(sweep, point, seed=0), source="trial")
        batch = experiment.schedule.global_batch_size or BASE_BATCH_SIZE[experiment.model.variant]
        shared_micro_batch(batch, experiment.schedule.micro_batch_size, sweep.workers_per_trial)
    except ConfigError as error:
        return _problem_lines(error)
    return []


def _length_problems(sweep: Sweep, base: Experiment) -> list[str]:
    problems = []
    if base.data.val is None:
        problems.append("experiment: data.val is missing: trials are compared by their results on it")
    total, grace = evaluations_without_data(base), sweep.scheduler.grace
    if total is not None and sweep.scheduler.kind != "none" and grace >= total:
        problems.append(
            f"scheduler.grace ({grace}) leaves nothing to stop: a trial has {plural(total, 'evaluation')}; lower it, evaluate"
            " more often (set evaluation.every_epochs or every_steps), or use scheduler.kind none"
        )
    if sweep.init is not None and "init" in sweep.space:
        problems.append("init is given for all trials, and searched: leave one of them out")
    own = {"space": ("name", "storage", "seed"), "set": ("name", "storage", "init")}
    for section, keys in own.items():
        given = [key for key in keys if key in getattr(sweep, section)]
        problems += [f"{section}.{key}: the sweep sets it; leave it out" for key in given]
    return problems


def _problem_lines(error: ConfigError) -> list[str]:
    """Problems in an error of `check`, without its headline."""
    head, *lines = str(error).split("\n  ")
    return lines or [head]


def _error(path: str | Path, problems: Sequence[str]) -> ConfigError:
    return ConfigError("\n  ".join([f"{path}: {plural(len(problems), 'problem')}", *problems]))
