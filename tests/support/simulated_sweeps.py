"""Simulated sweeps with known effects: planted effects, noise and successive halving, without any training."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from pipeline.tuning.analysis.verdict import top_points
from pipeline.tuning.load import load_sweep
from pipeline.tuning.space import Point, grid_points, random_point
from pipeline.tuning.sweep import Phase, Sweep, Trial, confirm_trials, default_point, replicate_trials, search_trials
from pipeline.tuning.trial_records import TrialEvaluation, TrialRecord

TrueMean = Callable[[Point], float]  # expected final metric of a point

EXPERIMENT: dict[str, Any] = {
    "data": {"train": "train", "val": "val"},
    "model": {"variant": "n", "input_size": [128, 128], "num_queries": 50},
    "schedule": {"steps": 900, "global_batch_size": 8},
    "evaluation": {"every_steps": 100},
}
SPACE: dict[str, Any] = {
    "model.reg_max": {"choice": [8, 16, 32, 64]},
    "loss.ddf": {"choice": [0, 0.5, 1.5, 5]},
}


def written(folder: Path, **sweep: Any) -> Path:
    """Write a sweep file and its experiment file."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "experiment.yaml").write_text(yaml.safe_dump(EXPERIMENT))
    content = {"experiment": "experiment.yaml", "space": SPACE, "trials": 16, **sweep}
    given = {key: value for key, value in content.items() if value is not None}
    (folder / "sweep.yaml").write_text(yaml.safe_dump(given, sort_keys=False))
    return folder / "sweep.yaml"


def loaded(folder: Path, **sweep: Any) -> Sweep:
    return load_sweep(written(folder, **sweep))


def trained(
    trial: Trial, number: int, true_mean: TrueMean, *, sd: float, seed: int, evaluations: int = 9
) -> TrialRecord:
    """Record of a trial at full length. Its deviation from the mean is the same at all evaluations."""
    generator = np.random.default_rng([seed, number])
    end = true_mean(trial.point) + sd * generator.standard_normal()
    rise = 1 - 0.6 ** (3 * np.arange(1, evaluations + 1))
    values = np.maximum(0, end * rise + 0.1 * sd * generator.standard_normal(evaluations))
    curve = tuple(TrialEvaluation(100 * n, 5.0 * n, {"AP": float(v)}, 130.0 * n) for n, v in enumerate(values, start=1))
    return TrialRecord(
        id=trial.id,
        number=number,
        phase=trial.phase,
        point=trial.point,
        seed=trial.seed,
        status="finished",
        curve=curve,
        final={"AP": float(values[-1])},
        latency_ms=float(4 + 0.03 * trial.point.get("model.reg_max", 32) + 0.05 * generator.standard_normal()),
        cost={"gpu_s": curve[-1].cost_s},
        run_id=f"{number:032x}",
        ap_before_training=0.0123,
    )


def stopped(record: TrialRecord, evaluation: int) -> TrialRecord:
    kept = record.curve[:evaluation]
    cut = {"status": "pruned", "rung": evaluation, "curve": kept, "final": {}, "cost": {"gpu_s": kept[-1].cost_s}}
    return TrialRecord(**{**vars(record), **cut, "latency_ms": None})


def halved(records: Sequence[TrialRecord], rungs: Sequence[int], reduction: int = 3) -> list[TrialRecord]:
    """Successive halving: at each rung the best third continues."""
    result = {record.id: record for record in records}
    running = list(records)
    for rung in rungs:
        running = sorted(running, key=lambda record: -record.curve[rung - 1].metrics["AP"])
        kept = max(1, len(running) // reduction)
        result |= {record.id: stopped(record, rung) for record in running[kept:]}
        running = running[:kept]
    return [result[record.id] for record in records]


def searched_points(sweep: Sweep, count: int, seed: int) -> list[Point]:
    if sweep.searcher.kind == "grid":
        return grid_points(sweep.space)
    return [random_point(sweep.space, [seed, n]) for n in range(count)]


def simulated(
    sweep: Sweep,
    true_mean: TrueMean,
    *,
    sd: float = 0.01,
    seed: int = 0,
    rungs: Sequence[int] = (),
    points: int | None = None,
) -> list[TrialRecord]:
    """Records of all three phases, as after a real sweep."""
    number = 0

    def train(trials: Sequence[Trial]) -> list[TrialRecord]:
        nonlocal number
        first, number = number, number + len(trials)
        return [trained(trial, first + n, true_mean, sd=sd, seed=seed) for n, trial in enumerate(trials)]

    replicates = train(replicate_trials(sweep))
    search: dict[str, Trial] = {}
    for point in searched_points(sweep, points or sweep.trials or 1, seed):
        search |= {trial.id: trial for trial in search_trials(sweep, point)}
    searched = halved(train(list(search.values())), rungs)
    default = default_point(sweep)
    top = top_points(searched, default, sweep.metric, count=sweep.confirm.top)
    return [*replicates, *searched, *train(confirm_trials(sweep, top))]


def phases(records: Sequence[TrialRecord], phase: Phase) -> list[TrialRecord]:
    return [record for record in records if record.phase == phase]
