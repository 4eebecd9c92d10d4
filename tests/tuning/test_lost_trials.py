"""Trials whose own process was killed, as by a lack of memory: another one continues them."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from mlflow import MlflowClient
from ray.tune.schedulers import TrialScheduler

from pipeline import storage
from pipeline.config import Cluster, Experiment
from pipeline.config_files import check
from pipeline.training import checkpoint, driver_lock, run_dir
from pipeline.training.context import resolve_data
from pipeline.tuning import driver as sweep_driver
from pipeline.tuning import trial
from pipeline.tuning.callbacks import TrialStatusReporter
from pipeline.tuning.driver import LOST_PROCESSES
from pipeline.tuning.load import load_sweep
from pipeline.tuning.schedulers import SparingMedian
from pipeline.tuning.sweep import Trial
from pipeline.tuning.trial_files import EVALUATION, TrialProgress, TrialSettings, write_progress
from pipeline.tuning.trial_records import TrialEvaluation, TrialRecord, read_records
from pipeline.tuning.trial_store import LOST, TrialStore
from tests.support.finished_runs import assert_equal_weights
from tests.support.processes import descendants, kill_driver, wait_for
from tests.support.synthetic_shards import synthetic_records, write_shards

ROOT = Path(__file__).parents[2]
STEPS = 6


def sweep_file(folder: Path, name: str, **changes: Any) -> Path:
    """One replicate of the default and one point, trained one after the other."""
    if not (folder / "data").exists():
        write_shards(folder / "data", synthetic_records(8))
    experiment = {
        "data": {"train": str(folder / "data"), "val": str(folder / "data"), "decode_in": "worker"},
        "model": {"variant": "n", "input_size": [64, 64], "num_queries": 20},
        "schedule": {"steps": STEPS, "global_batch_size": 4},
        "evaluation": {"every_steps": 1, "num_images": 0},
        "checkpoints": {"every_steps": 1},
    }
    (folder / "experiment.yaml").write_text(yaml.safe_dump(experiment))
    (folder / "cluster.yaml").write_text(yaml.safe_dump({"cpus_per_worker": 0.5, "threads_per_worker": 1}))
    content: dict[str, Any] = {
        "name": name,
        "storage": str(folder / "runs"),
        "experiment": "experiment.yaml",
        "cluster": str(folder / "cluster.yaml"),
        "space": {"loss.ddf": {"grid": [0.0]}},
        "searcher": {"kind": "grid"},
        "scheduler": {"kind": "none"},
        "max_concurrent_trials": 1,
        "replicates": 1,
        "confirm": {"top": 0},
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({**content, **changes}))
    return path


@pytest.fixture
def settings(tmp_path: Path) -> TrialSettings:
    sweep = load_sweep(sweep_file(tmp_path, "sweep", tracking={"experiment": "searches"}))
    cluster = Cluster(workers=1, cpus_per_worker=0.5, gpus_per_worker=0)
    return TrialSettings(sweep, str(tmp_path / "sweep"), cluster, f"sqlite:///{tmp_path}/mlflow.db", None)


def begin(store: TrialStore, number: int, error: str = "") -> Trial:
    begun = Trial(number, "search", {"loss.ddf": float(number)}, seed=0)
    store.begin(begun)
    evaluation = TrialEvaluation(1, 0.5, {"AP": 0.25}, 3.0)
    write_progress(store.settings.folder, begun, TrialProgress((evaluation,), seconds=3.0, error=error))
    return begun


def test_a_trial_failed_by_its_own_error_stays_so_and_a_lost_one_goes_on_at_the_next_start(
    settings: TrialSettings,
) -> None:
    store = TrialStore(settings)
    wrong, lost = begin(store, 0, error="ValueError: too large"), begin(store, 1)
    assert store.finish(wrong, failed=False).reason == "ValueError: too large"  # Tune saw nothing of it
    ended = store.finish(lost, failed=True)
    assert (ended.status, ended.reason, ended.lost) == ("failed", LOST, True)

    again = TrialStore(settings)
    assert [record.status for record in again.ordered()] == ["failed", "interrupted"]
    assert [record.reason for record in again.ordered()] == ["ValueError: too large", ""]
    again.begin(wrong)
    again.begin(lost)
    assert [record.status for record in again.ordered()] == ["failed", "running"]


def test_an_error_that_came_after_the_driver_was_gone_ends_the_trial(settings: TrialSettings) -> None:
    begin(TrialStore(settings), 0, error="ValueError: too large")
    (record,) = TrialStore(settings).ordered()
    assert (record.status, record.reason) == ("failed", "ValueError: too large")


@pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SADeprecationWarning")  # MLflow's own
def test_the_end_of_a_continued_trial_replaces_its_loss_in_mlflow(settings: TrialSettings) -> None:
    def reported(store: TrialStore) -> tuple[str, str]:
        reporter = TrialStatusReporter(store)
        reporter.submit(continued.id)
        assert reporter.drain(timeout=120) == 0
        (run,) = client.search_runs([client.get_experiment_by_name("searches").experiment_id])
        return run.info.status, run.data.tags["trial.reason"]

    client = MlflowClient(settings.tracking_uri)
    store = TrialStore(settings)
    continued = begin(store, 0)
    run_dir.get_or_make_key(f"{settings.folder}/runs/{continued.id}")
    store.note_restart(continued)
    store.finish(continued, failed=True)
    assert reported(store) == ("FAILED", LOST)

    again = TrialStore(settings)
    again.begin(continued)
    assert again.finish(continued, failed=False).restarts == 1
    assert reported(again) == ("KILLED", "")


def begin_and_die(path: Path, folder: Path, writes: int) -> None:
    """Begin the sweep of a file, and die before one of its writes."""
    write, count = storage.write_atomic, 0

    def counted(*arguments: Any, **keywords: Any) -> None:
        nonlocal count
        if count == writes:
            os.kill(os.getpid(), signal.SIGKILL)
        count += 1
        write(*arguments, **keywords)

    storage.write_atomic = counted
    begin_sweep(path, folder)


def begin_sweep(path: Path, folder: Path) -> str:
    sweep = load_sweep(path)
    data = resolve_data(check(Experiment, sweep.base, source=sweep.experiment).data)
    with driver_lock.driver_lock(str(folder)):
        return sweep_driver._begin_or_continue(str(folder), sweep, data)


@pytest.mark.slow  # four processes that import everything
def test_a_sweep_killed_at_any_write_of_its_start_begins_again(tmp_path: Path) -> None:
    path, folder = sweep_file(tmp_path, "sweep"), tmp_path / "runs" / "sweep"
    for writes in range(3):
        child = get_context("spawn").Process(target=begin_and_die, args=(path, folder, writes))
        child.start()
        child.join()
        if child.exitcode == 0:
            break
        assert child.exitcode == -signal.SIGKILL
    assert writes > 1  # the note of the driver, and the start of the sweep
    first = begin_sweep(path, folder)
    assert begin_sweep(path, folder) == first
    assert json.loads((folder / "sweep.json").read_text())["tracking_key"] == first


def test_evaluations_that_are_reported_again_count_once_in_the_median_rule() -> None:
    """The others have a mean of 0.45 after two evaluations; it would be 0.6, if their first one counted twice."""

    class TuneTrial:
        def __init__(self, name: str) -> None:
            self.trial_id, self.config = name, {"trial": {"phase": "search"}}

    rule = SparingMedian(time_attr=EVALUATION, grace_period=1, min_samples_required=3)
    rule.set_search_properties("AP", "max")
    controller = SimpleNamespace(get_live_trials=list)
    for name in "abc":
        other = TuneTrial(name)
        for evaluation, ap in ((1, 0.9), (1, 0.9), (2, 0.0)):
            rule.on_trial_result(controller, other, {"AP": ap, EVALUATION: evaluation})
    judged = TuneTrial("d")
    assert rule.on_trial_result(controller, judged, {"AP": 0.5, EVALUATION: 2}) == TrialScheduler.CONTINUE
    worse = TuneTrial("e")
    assert rule.on_trial_result(controller, worse, {"AP": 0.4, EVALUATION: 2}) == TrialScheduler.STOP


def test_a_trial_waits_until_its_driver_on_a_dead_node_is_stale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver_lock, "STALE_SECONDS", 1.0)
    monkeypatch.setattr(trial, "RETRY_S", 0.1)
    note = {"host": "another-node", "pid": 7, "at": time.time()}
    (tmp_path / driver_lock.DRIVER).write_text(json.dumps(note))

    def start() -> float:
        with driver_lock.driver_lock(str(tmp_path)):
            return time.time()

    assert trial.when_free(start) > note["at"] + 1.0

    monkeypatch.setattr(driver_lock, "HEARTBEAT_SECONDS", 0.5)
    (tmp_path / driver_lock.DRIVER).write_text(json.dumps({**note, "at": time.time() + 3600}))
    with pytest.raises(driver_lock.RunTakenError, match="process 7 on another-node"):
        trial.when_free(start)


@pytest.fixture
def sweeps() -> Iterator[list[subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []
    yield started
    for process in started:
        if process.poll() is None:
            kill_driver(process)


def start(module: str, path: Path, log: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_TMPDIR": "/tmp"}
    environment.pop("RAY_ADDRESS", None)
    with log.open("a") as stream:
        return subprocess.Popen(
            [sys.executable, "-m", module, str(path)],
            cwd=ROOT,
            env=environment,
            stdout=stream,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )


def trial_processes(driver: subprocess.Popen[str]) -> list[int]:
    return [pid for pid, title in descendants(driver.pid).items() if title.startswith("ray::ImplicitFunc")]


def record_of(folder: Path, phase: str) -> TrialRecord:
    (record,) = [record for record in read_records(folder / "records.json") if record.phase == phase]
    return record


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_trial_whose_process_is_killed_ends_as_if_nothing_had_happened(
    tmp_path: Path, sweeps: list[subprocess.Popen[str]]
) -> None:
    for name in ("undisturbed", "killed"):
        log, folder = tmp_path / f"{name}.log", tmp_path / "runs" / name
        driver = start("jobs.tune", sweep_file(tmp_path, name), log)
        sweeps.append(driver)
        if name == "killed":
            (trial_id,) = [
                r.id for r in read_records(tmp_path / "runs/undisturbed/records.json") if r.phase == "search"
            ]
            checkpoints = str(folder / "runs" / trial_id / "checkpoints")
            wait_for(lambda at=checkpoints: len(checkpoint.steps_in(at)) >= 2, driver, log)  # type: ignore[misc]
            (process,) = trial_processes(driver)
            os.kill(process, signal.SIGKILL)
        assert driver.wait(timeout=400) == 0, log.read_text()[-4000:]

    assert f"{trial_id}: its process was killed; it continues from its last checkpoint" in log.read_text()
    expected, found = (record_of(tmp_path / "runs" / name, "search") for name in ("undisturbed", "killed"))
    assert (found.status, found.restarts, expected.restarts) == ("finished", 1, 0)
    assert found.final == expected.final
    assert [(e.step, e.metrics) for e in found.curve] == [(e.step, e.metrics) for e in expected.curve]
    runs = (tmp_path / "runs" / name / "runs" / trial_id for name in ("undisturbed", "killed"))
    assert_equal_weights(*runs, step=STEPS)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_trial_whose_process_is_killed_every_time_is_given_up_until_the_next_start(
    tmp_path: Path, sweeps: list[subprocess.Popen[str]]
) -> None:
    path, log, folder = sweep_file(tmp_path, "sweep"), tmp_path / "log.txt", tmp_path / "runs" / "sweep"
    driver = start("tests.support.sweep_driver", path, log)
    sweeps.append(driver)
    killed: set[int] = set()
    while driver.poll() is None:
        status = {record["phase"]: record["status"] for record in trials_in(folder)}
        if status.get("search") == "running":
            for pid in set(trial_processes(driver)) - killed:
                os.kill(pid, signal.SIGKILL)
                killed.add(pid)
        time.sleep(0.05)
    assert driver.returncode == 0, log.read_text()[-4000:]
    record = record_of(folder, "search")
    assert (record.status, record.reason, record.restarts) == ("failed", LOST, LOST_PROCESSES)

    again = start("tests.support.sweep_driver", path, log)
    sweeps.append(again)
    assert again.wait(timeout=300) == 0, log.read_text()[-4000:]
    record = record_of(folder, "search")
    assert (record.status, record.reason, len(record.curve)) == ("finished", "", STEPS)
    assert record_of(folder, "replicate").restarts == 0


def trials_in(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in (folder / "trials").glob("*.json")]
