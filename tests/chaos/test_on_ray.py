"""A training by two workers of Ray, and a sweep, under blows on every kind of their processes."""

import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.training import checkpoint
from pipeline.tuning.trial_records import TrialRecord, read_records
from tests.support.chaos import Attempt, Command, Disturbance, chaos_seed, report_landed
from tests.support.finished_runs import assert_equal_runs, assert_equal_weights
from tests.support.processes import descendants
from tests.support.training_runs import shard_folders

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
ROOT = Path(__file__).parents[2]
STEPS = 48
TITLES = {
    "worker": "ray::RayTrainWorker",
    "controller": "ray::TrainController",
    "trial": "ray::ImplicitFunc",
    "board": "ray::ProgressBoard",
}
SERVICES = {"raylet": "/raylet/raylet", "gcs": "gcs_server"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("on-ray")
    content = {
        "storage": str(folder / "runs"),
        "data": shard_folders(folder, images=48),
        "model": {"variant": "n", "input_size": [64, 64], "num_queries": 20, "num_denoising": 10},
        "schedule": {"steps": STEPS, "global_batch_size": 8, "no_aug_epochs": 0, "micro_batch_size": 4},
        "evaluation": {"every_steps": 24, "num_images": 0},
        "checkpoints": {"every_steps": 1},
        "tracking": {"every_steps": 1},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(content))
    cluster = {"workers": 2, "gpus_per_worker": 0, "cpus_per_worker": 0.5, "threads_per_worker": 1, "max_failures": 10}
    (folder / "two.yaml").write_text(yaml.safe_dump(cluster))
    (folder / "one.yaml").write_text(yaml.safe_dump({**cluster, "workers": 1}))
    return folder


def processes(name: str) -> Callable[[int], Sequence[int]]:
    """Processes of one kind below a command; of several, one."""

    def found(pid: int) -> Sequence[int]:
        titles = descendants(pid)
        if name in SERVICES:
            return [p for p, title in titles.items() if title.split(" ")[0].endswith(SERVICES[name])]
        return sorted(p for p, title in titles.items() if title.startswith(TITLES[name]))[-1:]

    return found


def newest(run: Path) -> int:
    return max(checkpoint.steps_in(str(run / "checkpoints")), default=0)


def on_ray(folder: Path, words: list[str], log: str, progress: Callable[[], int], total: int) -> Command:
    return Command(
        words=[sys.executable, "-m", *words],
        folder=ROOT,
        log=folder / log,
        progress=progress,
        moments={
            "begin": lambda _: True,
            "step": lambda attempt: advanced(attempt, progress),
            "last step": lambda _: progress() >= total,
        },
        targets={name: processes(name) for name in (*TITLES, *SERVICES)},
        may_hang=("gcs", "raylet"),
    )


def advanced(attempt: Attempt, progress: Callable[[], int]) -> bool:
    return progress() > attempt.progress_before


def drawn_plan(seed: int, blows: Sequence[tuple[str, str]]) -> list[Disturbance]:
    """Blows on all these (target, blow) in random order, each after another step."""
    drawn = random.Random(seed)
    shuffled = drawn.sample(blows, len(blows))
    return [
        Disturbance("step", drawn.uniform(0, 0.3), blow, target, pause_s=drawn.uniform(0.5, 3))  # type: ignore[arg-type]
        for target, blow in shuffled
    ]


def test_a_training_on_ray_under_blows_ends_as_one_that_was_left_alone(
    folder: Path, record_property: Callable[[str, object], None]
) -> None:
    def training(name: str) -> Command:
        words = ["jobs.train", str(folder / "run.yaml"), "--cluster", str(folder / "two.yaml"), "--name", name]
        return on_ray(folder, words, f"{name}.log", lambda: newest(folder / "runs" / name), STEPS)

    training("undisturbed").run([])
    disturbed = training("disturbed")
    blows = [("worker", "kill"), ("worker", "pause"), ("controller", "kill"), ("raylet", "kill"), ("gcs", "kill")]
    plan = drawn_plan(chaos_seed() + 200, [*blows, ("board", "kill"), ("command", "kill"), ("command", "term")])
    disturbed.run([*plan, Disturbance("last step", 0.5, "kill", "machine")])
    report_landed(disturbed.landed, record_property, least=len(plan))
    assert disturbed.landed[: len(plan)] == plan
    assert_equal_runs(folder / "runs", "undisturbed", "disturbed", step=STEPS)


def test_a_sweep_under_blows_has_the_results_of_one_that_was_left_alone(
    folder: Path, record_property: Callable[[str, object], None]
) -> None:
    steps = 4

    def sweep(name: str) -> Command:
        content: dict[str, Any] = {
            "name": name,
            "storage": str(folder / "runs"),
            "experiment": str(folder / "run.yaml"),
            "cluster": str(folder / "one.yaml"),
            "set": {"schedule.steps": steps, "evaluation.every_steps": 2},
            "space": {"loss.ddf": {"grid": [0.0]}},
            "searcher": {"kind": "grid"},
            "scheduler": {"kind": "none"},
            "max_concurrent_trials": 1,
            "replicates": 1,
            "confirm": {"top": 0},
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content))
        runs = folder / "runs" / name / "runs"
        words = ["jobs.tune", str(folder / f"{name}.yaml")]
        return on_ray(folder, words, f"{name}.log", lambda: sum(map(newest, runs.glob("*"))), 2 * steps)

    def records(name: str) -> dict[str, TrialRecord]:
        return {record.id: record for record in read_records(folder / "runs" / name / "records.json")}

    sweep("calm").run([])
    disturbed = sweep("stormy")
    blows = [("trial", "kill"), ("machine", "kill"), ("command", "kill")]
    disturbed.run([*drawn_plan(chaos_seed() + 300, blows), Disturbance("last step", 0.2, "kill", "machine")])
    report_landed(disturbed.landed, record_property, least=3)
    expected, found = records("calm"), records("stormy")
    assert expected.keys() == found.keys()
    assert len(expected) == 2
    for name, record in expected.items():
        assert (found[name].status, found[name].final) == ("finished", record.final), found[name]
        assert [(e.step, e.metrics) for e in found[name].curve] == [(e.step, e.metrics) for e in record.curve]
        runs = (folder / "runs" / sweep / "runs" / name for sweep in ("calm", "stormy"))
        assert_equal_weights(*runs, step=steps)
