"""Stages that end early: what counts as an improvement, and runs that are cut short alike with and without a kill."""

import statistics
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from pipeline.config import ConfigError
from pipeline.training import checkpoint
from pipeline.training.early_stop import early_end, evaluations_without_improvement, noise_of
from pipeline.training.evaluator import Evaluator
from pipeline.training.loop import train
from pipeline.training.schedule import Schedule
from pipeline.training.stage_two import EvaluationHistory
from pipeline.training.state import TrainState
from tests.support.training_runs import RecordingConsole, alone, experiment, job, shard_folders
from tests.training.test_training_loop import run_and_kill, tensors_of


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return shard_folders(tmp_path_factory.mktemp("shards"))


@pytest.mark.parametrize(
    ("curve", "idle"),
    [
        ([], 0),
        ([0.0, 0.0, 0.0], 0),  # nothing is learned yet
        ([0.0, 0.2, 0.2, 0.2], 2),
        ([0.2, 0.205, 0.209, 0.21], 3),  # never more than the noise above .2
        ([0.2, 0.206, 0.212, 0.218], 1),  # slow progress adds up: .212 is an improvement
        ([0.3, 0.2, 0.25, 0.29], 3),
        ([0.3, 0.2, 0.32], 0),
    ],
)
def test_evaluations_without_an_improvement_are_counted(curve: list[float], idle: int) -> None:
    assert evaluations_without_improvement(curve, 0.01) == idle


def test_the_noise_is_that_of_the_curve_and_not_its_trend() -> None:
    random = Random(0)
    deviations = [random.gauss(0, 0.004) for _ in range(400)]
    trend = [0.5 - 0.4 * 0.98**n for n in range(400)]
    curve = [rise + deviation for rise, deviation in zip(trend, deviations, strict=True)]
    assert noise_of(curve) == pytest.approx(statistics.stdev(deviations), rel=0.15)
    assert noise_of(trend) < 1e-4
    assert noise_of([0.1, 0.9, 0.1, 0.9]) == 0  # too few to tell


def history_of(curve: list[float], *, every: int, begin: int = 0) -> EvaluationHistory:
    return EvaluationHistory(evaluated=tuple((begin + every * (n + 1), ap) for n, ap in enumerate(curve)))


@pytest.fixture
def schedule(data: dict[str, str], tmp_path: Path) -> Schedule:
    """Four epochs of six steps, the last one is stage two, evaluations after every second step."""
    return job(plateau(tmp_path, data)).schedule


def plateau(folder: Path, data: dict[str, str], **sections: Any) -> Any:
    settings: dict[str, Any] = {
        "schedule": {"steps": 24, "no_aug_epochs": 1},
        "evaluation": {"every_steps": 2, "patience": 2},
        "checkpoints": {"keep": 9},
        "ema": {"warmup_steps": 2, "decay": 0.9},
        **sections,
    }
    return experiment(folder, data, **settings)


def test_a_stage_ends_at_an_evaluation_and_by_its_own_curve(schedule: Schedule) -> None:
    flat = history_of([0.3, 0.3, 0.3, 0.3], every=2)
    assert schedule.stage_two_step == 18
    end = early_end(flat, 8, schedule, 3)
    assert end is not None
    assert end.step == 18
    assert "best 0.3000): 10 steps are left out, stage two begins, as step 18" in end.reason
    assert early_end(flat, 8, schedule, 4) is None
    assert early_end(flat, 8, schedule, None) is None
    assert early_end(flat, 9, schedule, 3) is None  # no evaluation was due
    assert early_end(flat, 18, schedule, 3) is None  # a new stage, without evaluations
    second = replace(flat, evaluated=(*flat.evaluated, (20, 0.3), (22, 0.3)))
    assert early_end(second, 22, schedule, 2) is None
    end = early_end(second, 22, schedule, 1)
    assert end is not None
    assert end.step == schedule.steps
    alone_end = early_end(flat, 8, replace(schedule, stage_two_step=None), 3)
    assert alone_end is not None
    assert alone_end.step == schedule.steps


class PlannedCurve:
    """AP by step in the place of the evaluation's own, as random weights find nothing in a few steps."""

    def __init__(self, curve: dict[int, float]) -> None:
        self.curve = curve

    def __call__(
        self, evaluator: Evaluator, state: TrainState, *, title: str, final: bool = False
    ) -> tuple[float, None]:
        return self.curve.get(state.step, max(self.curve.values())), None


def test_stage_two_is_trained_as_planned_and_a_kill_changes_nothing(
    data: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    curve = PlannedCurve({2: 0.1, 4: 0.3, 6: 0.3, 8: 0.2, 20: 0.35, 22: 0.36, 24: 0.4})
    monkeypatch.setattr(Evaluator, "_evaluate_inline", lambda *given, **named: curve(*given, **named))
    console = RecordingConsole()
    whole = plateau(tmp_path, data, name="whole")
    assert train(job(whole), alone(console))["step"] == 24
    assert len(console.about("10 steps are left out, stage two begins, as step 18")) == 1
    saved = [2, 4, 6, 8, 20, 22, 24]
    assert checkpoint.steps_in(f"{tmp_path}/runs/whole/checkpoints") == saved

    cut = whole.model_copy(update={"name": "cut"})
    run_and_kill(
        job(cut), after=18, written=8
    )  # between the last evaluation of stage one and the first step of stage two
    continued = RecordingConsole()
    train(job(cut), alone(continued))
    assert continued.about("continuing at step 8")
    for step in (20, 24):
        expected, found = (tensors_of(f"{tmp_path}/runs/{run}/checkpoints", step) for run in ("whole", "cut"))
        assert expected.keys() == found.keys()
        assert [key for key, tensor in expected.items() if not torch.equal(tensor, found[key])] == []


def test_a_run_of_one_stage_ends_with_its_best_weights(
    data: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    curve = PlannedCurve({2: 0.3, 4: 0.3, 6: 0.2})
    monkeypatch.setattr(Evaluator, "_evaluate_inline", lambda *given, **named: curve(*given, **named))
    console = RecordingConsole()
    result = train(job(plateau(tmp_path, data, schedule={"steps": 24, "no_aug_epochs": 0})), alone(console))
    assert (result["step"], result["best_ap"]) == (6, 0.3)
    assert console.about("18 steps are left out, the run ends here")


def test_patience_without_evaluations_is_refused(data: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"evaluation.patience \(2\) needs a data.val, or leave it out"):
        plateau(tmp_path, {"train": data["train"]})
