"""Running sweeps: searchers, records, MLflow, and a driver that is killed in the middle."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow import MlflowClient
from ray import cloudpickle

from pipeline.config import Cluster
from pipeline.training import run_dir
from pipeline.tuning.callbacks import ProgressCallback, TrialStatusReporter, summary_line, trial_lines
from pipeline.tuning.load import load_sweep
from pipeline.tuning.searcher import FixedTrials, SpaceSearcher
from pipeline.tuning.sweep import Sweep, Trial, replicate_trials
from pipeline.tuning.trial import experiment_of_trial, schedule_of
from pipeline.tuning.trial_files import TrialProgress, TrialSettings, write_progress
from pipeline.tuning.trial_records import TrialEvaluation, TrialRecord, read_records
from pipeline.tuning.trial_store import TrialStore
from tests.support.mlflow_server import Server
from tests.support.synthetic_shards import synthetic_records, write_shards

ROOT = Path(__file__).parents[2]
EVALUATIONS = 4
PASSWORD = "hunter2-of-bob"


def sweep_file(folder: Path, **changes: Any) -> Path:
    if not (folder / "data").exists():
        write_shards(folder / "data", synthetic_records(8))
    experiment = {
        "data": {"train": str(folder / "data"), "val": str(folder / "data"), "decode_in": "worker"},
        "model": {"variant": "n", "input_size": [64, 64], "num_queries": 20},
        "schedule": {"steps": EVALUATIONS, "global_batch_size": 4},
        "evaluation": {"every_steps": 1},
    }
    (folder / "experiment.yaml").write_text(yaml.safe_dump(experiment))
    content: dict[str, Any] = {
        "name": "sweep",
        "storage": str(folder / "runs"),
        "experiment": "experiment.yaml",
        "space": {"optimizer.lr": {"grid": [0.001, 0.1]}, "loss.ddf": {"grid": [0.0, 1.5, 3.0]}},
        "searcher": {"kind": "grid"},
        "scheduler": {"kind": "asha", "reduction": 2, "grace": 1},
        "cpus_per_worker": 0.5,
        "max_concurrent_trials": 2,
        "replicates": 2,
        "confirm": {"top": 1, "seeds": 2},
    }
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump({**content, **changes}))
    return path


def settings_of(sweep: Sweep, folder: Path) -> TrialSettings:
    return TrialSettings(
        sweep, str(folder / "sweep"), Cluster(workers=2, cpus_per_worker=0.5, gpus_per_worker=0), "sqlite:///x", None
    )


def finish_with(value: float) -> Any:
    """Function that records every trial as finished; AP grows with the loss weight from `value`."""

    def finish(trial: Trial, _: bool) -> TrialRecord:
        record = TrialRecord(
            id=trial.id, number=1, phase="search", point=trial.point, seed=trial.seed, status="finished"
        )
        return replace(record, final={"AP": value + 0.1 * trial.point["loss.ddf"]})

    return finish


def suggested(searcher: SpaceSearcher, count: int, first: int = 0) -> list[dict[str, Any]]:
    """Configs of the next trials, each ended before the next begins."""
    configs = []
    for number in range(first, first + count):
        config = searcher.suggest(f"tune-{number}")
        assert isinstance(config, dict)
        configs.append(config)
        searcher.on_trial_complete(f"tune-{number}", {})
    return configs


def test_a_grid_is_tried_once_and_then_the_search_is_exhausted(tmp_path: Path) -> None:
    searcher = SpaceSearcher(load_sweep(sweep_file(tmp_path)), [], [], finish_with(0), float("inf"))
    tried = [config["trial"]["point"] for config in suggested(searcher, 6)]
    assert len({json.dumps(point) for point in tried}) == 6
    assert searcher.suggest("seventh") == SpaceSearcher.FINISHED
    assert searcher.exhausted


def test_every_seed_of_a_point_is_trained_and_the_budget_counts_points(tmp_path: Path) -> None:
    changes = {
        "searcher": {"kind": "random"},
        "trials": 2,
        "seeds_per_point": 3,
        "space": {"loss.ddf": {"uniform": [0, 5]}},
    }
    searcher = SpaceSearcher(load_sweep(sweep_file(tmp_path, **changes)), [], [], finish_with(0), float("inf"))
    trials = [config["trial"] for config in suggested(searcher, 6)]
    assert searcher.suggest("seventh") == SpaceSearcher.FINISHED
    assert [trial["point"] for trial in trials[:3]] == [trials[0]["point"]] * 3
    assert len({trial["seed"] for trial in trials[:3]}) == 3
    assert trials[0]["point"] != trials[3]["point"]


def test_the_default_is_trained_before_any_point(tmp_path: Path) -> None:
    sweep = load_sweep(sweep_file(tmp_path))
    searcher = SpaceSearcher(sweep, replicate_trials(sweep), [], finish_with(0), float("inf"))
    phases = [config["trial"]["phase"] for config in suggested(searcher, 8)]
    assert phases == ["replicate"] * 2 + ["search"] * 6
    assert searcher.suggest("ninth") == SpaceSearcher.FINISHED


def test_no_point_begins_after_the_time_limit(tmp_path: Path) -> None:
    searcher = SpaceSearcher(load_sweep(sweep_file(tmp_path)), [], [], finish_with(0), time.time() - 1)
    assert searcher.suggest("first") == SpaceSearcher.FINISHED


def test_optuna_learns_the_results_of_earlier_starts_too(tmp_path: Path) -> None:
    changes = {"searcher": {"kind": "optuna"}, "trials": 60, "space": {"loss.ddf": {"uniform": [0, 5]}}}
    sweep = load_sweep(sweep_file(tmp_path, **changes))
    first = SpaceSearcher(sweep, [], [], finish_with(0), float("inf"))
    begun = [Trial(**config["trial"]) for config in suggested(first, 30)]
    known = [replace(finish_with(0)(trial, False), number=n) for n, trial in enumerate(begun)]

    second = SpaceSearcher(sweep, [], known, finish_with(0), float("inf"))
    again = suggested(second, 30)
    assert [config["trial"]["point"] for config in again] == [trial.point for trial in begun]
    assert all(config["ended"] for config in again)
    later = [config["trial"]["point"]["loss.ddf"] for config in suggested(second, 30, first=30)]
    assert sum(value > 4 for value in later) > 15  # 6 expected by chance; the optimum is 5
    assert second.suggest("end") == SpaceSearcher.FINISHED


def test_a_pickled_searcher_or_callback_holds_no_password(tmp_path: Path) -> None:
    """Tune writes both into the sweep's folder."""
    uri = f"http://bob:{PASSWORD}@127.0.0.1:1"
    sweep = load_sweep(sweep_file(tmp_path, tracking={"uri": uri}))
    store = TrialStore(replace(settings_of(sweep, tmp_path), tracking_uri=uri))
    assert PASSWORD.encode() in cloudpickle.dumps(store)  # the search below would find it
    reporter = TrialStatusReporter(store)
    for written in (
        SpaceSearcher(sweep, [], [], store.finish, float("inf")),
        FixedTrials(replicate_trials(sweep), store.finish),
        ProgressCallback(store, reporter, total="1"),
    ):
        assert PASSWORD.encode() not in cloudpickle.dumps(written)
    reporter.drain(0)


def write_result(settings: TrialSettings, trial: Trial) -> None:
    path = Path(settings.folder) / "runs" / trial.id / "result.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"numbers": {"AP": 0.5}, "latency_ms": None}))


def test_after_a_restart_the_store_has_ended_and_interrupted_trials(tmp_path: Path) -> None:
    settings = settings_of(load_sweep(sweep_file(tmp_path)), tmp_path)
    trials = [Trial(n, "search", {"loss.ddf": float(n)}, seed=0) for n in range(4)]
    store = TrialStore(settings)
    for trial in trials:
        store.begin(trial)
        write_progress(
            settings.folder, trial, TrialProgress((TrialEvaluation(1, 0.5, {"AP": 0.25}, 3.0),), seconds=3.0)
        )
    write_result(settings, trials[0])
    write_progress(settings.folder, trials[2], TrialProgress(seconds=3.0, error="ValueError: a mistake"))
    assert [store.finish(trials[n], failed=False).status for n in range(3)] == [
        "finished",
        "pruned",
        "failed",
    ]
    again = TrialStore(settings)
    assert [record.status for record in again.ordered()] == ["finished", "pruned", "failed", "interrupted"]
    assert again.records[trials[1].id].rung == 1
    assert again.records[trials[0].id].cost == {"cpu_s": 3.0 * 2 * 0.5}
    assert again.finish(trials[1], failed=True).status == "pruned"  # what has ended stays
    assert "1 finished, 1 pruned, 1 failed" in summary_line(again.ordered(), "AP", "4", 60)
    assert len(trial_lines(again.ordered(), "AP")) == 4


def test_a_training_with_a_result_is_finished_even_if_its_process_failed(tmp_path: Path) -> None:
    settings = settings_of(load_sweep(sweep_file(tmp_path)), tmp_path)
    store = TrialStore(settings)
    trials = [Trial(n, "search", {"loss.ddf": float(n)}, seed=0) for n in range(2)]
    for trial in trials:
        store.begin(trial)
        write_progress(settings.folder, trial, TrialProgress((TrialEvaluation(1, 0.5, {"AP": 0.5}, 3.0),), seconds=3.0))
        write_result(settings, trial)
    assert store.finish(trials[0], failed=True).status == "finished"
    again = TrialStore(settings)  # killed before the second was noted
    assert [(record.status, record.final) for record in again.ordered()] == [("finished", {"AP": 0.5})] * 2
    assert [record.status for record in TrialStore(settings).ordered()] == ["finished"] * 2
    assert again.records[trials[1].id].cost == {"cpu_s": 3.0 * 2 * 0.5}


def ended_trials(settings: TrialSettings, count: int) -> TrialStore:
    """Pruned after one evaluation, each with a run of its own."""
    store = TrialStore(settings)
    for number in range(count):
        trial = Trial(number, "search", {"loss.ddf": float(number)}, seed=0)
        store.begin(trial)
        write_progress(
            settings.folder, trial, TrialProgress((TrialEvaluation(1, 0.5, {"AP": 0.25}, 3.0),), seconds=3.0)
        )
        run_dir.get_or_make_key(f"{settings.folder}/runs/{trial.id}")
        store.finish(trial, failed=False)
    return store


@pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SADeprecationWarning")  # MLflow's own
def test_final_statuses_reach_mlflow_those_of_an_earlier_start_too(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    sweep = load_sweep(sweep_file(tmp_path, tracking={"experiment": "searches"}))
    settings = replace(settings_of(sweep, tmp_path), tracking_uri=uri)
    ended_trials(settings, 2)  # their status is not reported
    again = TrialStore(settings)
    reporter = TrialStatusReporter(again)
    reporter.submit(again.ordered()[0].id)
    assert reporter.drain(timeout=120) == 0
    client = MlflowClient(uri)
    runs = client.search_runs([client.get_experiment_by_name("searches").experiment_id])
    assert {run.info.run_name: run.info.status for run in runs} == dict.fromkeys(again.records, "KILLED")
    assert {run.data.tags["trial.rung"] for run in runs} == {"1"}
    assert {record.run_id for record in TrialStore(settings).ordered()} == {run.info.run_id for run in runs}


def test_a_server_that_is_down_blocks_no_trial(tmp_path: Path) -> None:
    settings = replace(
        settings_of(load_sweep(sweep_file(tmp_path)), tmp_path), tracking_uri=f"http://127.0.0.1:{closed_port()}"
    )
    store = ended_trials(settings, 20)
    began = time.monotonic()
    reporter = TrialStatusReporter(store)
    for record in store.ordered():
        reporter.submit(record.id)
    cloudpickle.dumps(ProgressCallback(store, reporter, total="20"))  # as Tune does before it starts
    assert reporter.drain(timeout=0.5) == 20
    assert time.monotonic() - began < 5


def closed_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


def test_a_trial_trains_the_point_with_its_seed_and_has_the_tags_of_its_sweep(tmp_path: Path) -> None:
    sweep = load_sweep(sweep_file(tmp_path, init="models:/pretrained@champion"))
    settings = settings_of(sweep, tmp_path)
    trial = Trial(0, "search", {"loss.ddf": 3.0, "optimizer.lr": 0.1}, seed=17)
    experiment = experiment_of_trial(settings, trial)
    assert (experiment.loss.ddf, experiment.optimizer.lr, experiment.seed) == (3.0, 0.1, 17)
    assert experiment.init == "models:/pretrained@champion"
    assert experiment.evaluation.before_training
    assert experiment.name == trial.id
    assert experiment.tracking.tags["sweep"] == "sweep"
    assert schedule_of(experiment, settings.cluster).evaluations == EVALUATIONS


def start(path: Path, log: Path) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with log.open("ab") as stream:
        return subprocess.Popen(
            [sys.executable, "-m", "tests.support.sweep_driver", str(path)],
            cwd=ROOT,
            env=environment,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def ended(folder: Path) -> int:
    statuses = [json.loads(path.read_text())["status"] for path in (folder / "trials").glob("*.json")]
    return sum(status in ("finished", "pruned", "failed") for status in statuses)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT], ids=["kill", "ctrl-c"])
def test_a_stopped_sweep_continues_prunes_bad_trials_and_repeats_no_ended_one(how: int, tmp_path: Path) -> None:
    path, log, folder = sweep_file(tmp_path), tmp_path / "log.txt", tmp_path / "runs" / "sweep"
    driver = start(path, log)
    while ended(folder) < 2:
        assert driver.poll() is None, log.read_text()[-3000:]
        time.sleep(0.2)
    os.killpg(driver.pid, how) if how == signal.SIGKILL else driver.send_signal(how)
    code = driver.wait(timeout=120)
    assert code == (130 if how == signal.SIGINT else -signal.SIGKILL), log.read_text()[-3000:]

    again = start(path, log)
    assert again.wait(timeout=600) == 0, log.read_text()[-3000:]
    records = {record.id: record for record in read_records(folder / "records.json")}
    search = [record for record in records.values() if record.phase == "search"]
    assert len(search) == 6
    for record in search:
        if record.point["loss.ddf"] == 3.0:
            assert (record.status, record.reason) == ("failed", "RuntimeError: the disk is full")
        elif record.point["optimizer.lr"] == 0.1:
            assert (record.status, record.rung) == ("pruned", 1)
    survivors = [record.point for record in search if record.status == "finished"]
    assert {"optimizer.lr": 0.001, "loss.ddf": 1.5} in survivors
    phases = Counter(record.phase for record in records.values() if record.status == "finished")
    assert (phases["replicate"], phases["confirm"]) == (2, 2)
    begun = Counter(line.split()[0] for line in (folder / "begun.txt").read_text().splitlines())
    assert max(begun.values()) <= 2
    assert sum(count - 1 for count in begun.values()) <= 2  # only what ran when it was stopped
    assert "<html" in (folder / "report.html").read_text()[:200]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_trials_with_one_evaluation_end_and_more_of_them_are_added_later(tmp_path: Path) -> None:
    """Tune receives no metric from them, nor from one that failed before its first."""
    changes = {
        "set": {"schedule.steps": 1},
        "space": {"loss.ddf": {"grid": [0.0, 1.5, 3.0]}},
        "scheduler": {"kind": "none"},
    }
    log, folder = tmp_path / "log.txt", tmp_path / "runs" / "sweep"
    for seeds in (1, 2):
        path = sweep_file(tmp_path, **changes, confirm={"top": 1, "seeds": seeds})
        assert start(path, log).wait(timeout=250) == 0, log.read_text()[-3000:]
        ended = Counter((r.phase, r.status) for r in read_records(folder / "records.json"))
        assert ended == {
            ("replicate", "finished"): 2,
            ("search", "finished"): 2,
            ("search", "failed"): 1,
            ("confirm", "finished"): seeds,
        }
    begun = [line.split()[0] for line in (folder / "begun.txt").read_text().splitlines()]
    assert len(begun) == len(set(begun))  # what ended did not run again


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_no_file_of_a_sweep_holds_the_password_of_its_server(tmp_path: Path) -> None:
    server = Server(tmp_path)
    server.start()
    try:
        path = sweep_file(
            tmp_path,
            tracking={"uri": server.uri.replace("://", f"://bob:{PASSWORD}@"), "experiment": "sweeps"},
            set={"schedule.steps": 1},
            space={"loss.ddf": {"grid": [1.5]}},
            scheduler={"kind": "none"},
            replicates=1,
            confirm={"top": 1, "seeds": 1},
        )
        command = [sys.executable, "-m", "jobs.tune", str(path)]
        environment = {name: value for name, value in os.environ.items() if name != "MLFLOW_TRACKING_URI"}
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500, check=False
        )
    finally:
        server.kill()
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert PASSWORD not in done.stdout + done.stderr
    folder = tmp_path / "runs"
    files = [file for file in folder.rglob("*") if file.is_file()]
    names = {file.name for file in files}
    assert {"tuner.pkl", "run.json", "sweep.json", "report.html"} <= names
    assert not [file for file in files if PASSWORD.encode() in file.read_bytes()]
