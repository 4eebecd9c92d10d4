"""A training in one process without Ray: when it is chosen, and that it is the training that Ray would run."""

import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from pipeline.training import checkpoint, in_process
from tests.support.finished_runs import assert_equal_runs, metrics_of
from tests.support.processes import wait_for
from tests.support.training_runs import experiment, shard_folders

ROOT = Path(__file__).parents[2]
STEPS = 6
# The command, and the packages that it must do without.
TRAIN = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background processes ignore it
from jobs.train import main
main(sys.argv[1:])
print("imported:", *sorted({"ray", "optuna", "transformers"} & set(sys.modules)))
"""


@pytest.mark.parametrize(
    ("asynchronous", "gpu", "address", "job", "enough"),
    [
        (False, False, None, None, True),
        (True, False, None, None, False),
        (False, True, None, None, False),
        (False, False, "auto", None, False),
        (False, False, None, '{"metadata": {"job_submission_id": "raysubmit_1"}}', False),
    ],
)
def test_one_process_is_enough_on_a_cpu_without_a_cluster_to_join(
    asynchronous: bool,
    gpu: bool,
    address: str | None,
    job: str | None,
    enough: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    for name, value in (("RAY_ADDRESS", address), ("RAY_JOB_CONFIG_JSON_ENV_VAR", job)):
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    setting = experiment(tmp_path, shard_folders(tmp_path), evaluation={"asynchronous": asynchronous})
    assert in_process.is_enough(setting) == enough


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    content = {
        "storage": str(folder / "runs"),
        "data": shard_folders(folder, images=48),
        "model": {"variant": "n", "input_size": [64, 64], "num_queries": 20, "num_denoising": 10},
        "schedule": {"steps": STEPS, "global_batch_size": 8, "no_aug_epochs": 0, "micro_batch_size": 4},
        "evaluation": {"every_steps": 3, "num_images": 1},
        "checkpoints": {"every_steps": 2},
        "tracking": {"every_steps": 1},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(content))
    cluster = {"workers": 1, "gpus_per_worker": 0, "threads_per_worker": os.cpu_count()}
    (folder / "ray.yaml").write_text(yaml.safe_dump(cluster))
    return folder


def start(folder: Path, name: str, *flags: str) -> subprocess.Popen[str]:
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    command = [sys.executable, "-c", TRAIN, str(folder / "run.yaml"), "--name", name, *flags]
    with (folder / f"{name}.log").open("a") as log:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, text=True)


def finish(folder: Path, name: str, *flags: str) -> str:
    """Run to the end; what it printed."""
    code = start(folder, name, *flags).wait(timeout=400)
    said = (folder / f"{name}.log").read_text()
    assert code == 0, said[-4000:]
    return said


def assert_equal(folder: Path, one: str, other: str) -> None:
    assert_equal_runs(folder / "runs", one, other, step=STEPS)


def test_a_killed_training_in_one_process_continues_bitwise_and_needs_no_ray(folder: Path) -> None:
    said = finish(folder, "undisturbed")
    assert "in this process, on the CPU" in said
    assert said.splitlines()[-1].strip() == "imported:"

    killed = start(folder, "killed")
    checkpoints = str(folder / "runs" / "killed" / "checkpoints")
    for _ in range(2000):
        if checkpoint.steps_in(checkpoints) or killed.poll() is not None:
            break
        time.sleep(0.05)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL, (folder / "killed.log").read_text()[-4000:]
    assert "continuing at step" in finish(folder, "killed")
    assert_equal(folder, "undisturbed", "killed")


def test_a_run_killed_once_its_result_is_there_is_recorded_by_the_same_command(folder: Path) -> None:
    killed = start(folder, "at-the-end")
    result = folder / "runs" / "at-the-end" / "result.json"
    while not result.exists():
        assert killed.poll() is None, (folder / "at-the-end.log").read_text()[-4000:]
        time.sleep(0.002)
    killed.kill()
    assert killed.wait() == -signal.SIGKILL
    assert "MLflow has now the rest of it" in finish(folder, "at-the-end")
    metrics_of(folder / "runs" / "mlflow.db", "at-the-end")
    assert start(folder, "at-the-end").wait(timeout=100) == 1
    assert "run 'at-the-end' is finished" in (folder / "at-the-end.log").read_text()


def start_and_wait_for_a_checkpoint(folder: Path, name: str, *flags: str) -> subprocess.Popen[str]:
    process = start(folder, name, *flags)
    checkpoints = str(folder / "runs" / name / "checkpoints")
    wait_for(lambda: bool(checkpoint.steps_in(checkpoints)), process, folder / f"{name}.log")
    return process


def status_of(folder: Path, name: str) -> list[tuple[str]]:
    with sqlite3.connect(folder / "runs" / "mlflow.db") as database:
        return database.execute("select status from runs where name = ?", (name,)).fetchall()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_stop_signal_saves_after_the_step_and_the_printed_command_continues_bitwise(
    folder: Path, number: signal.Signals
) -> None:
    if not (folder / "runs" / "undisturbed").exists():
        finish(folder, "undisturbed")
    name = number.name
    process = start_and_wait_for_a_checkpoint(folder, name)
    process.send_signal(number)
    code = process.wait(timeout=60)
    lines = (folder / f"{name}.log").read_text().splitlines()
    assert code == 130, lines
    saved = checkpoint.steps_in(str(folder / "runs" / name / "checkpoints"))[-1]
    assert lines[-1].startswith(f"stopped at step {saved}, saved in {folder}/runs/{name}/checkpoints/")
    assert lines[-1].endswith(f"to continue: -c {folder}/run.yaml --name {name}")
    assert not [line for line in lines if "Traceback" in line]
    assert status_of(folder, name) == [("KILLED",)]
    assert f"continuing at step {saved} " in finish(folder, name)
    assert_equal(folder, "undisturbed", name)


def test_a_second_stop_signal_ends_at_once(folder: Path) -> None:
    settings = [
        "schedule.steps=400",
        "schedule.global_batch_size=48",
        "schedule.micro_batch_size=1",
    ]  # steps of seconds
    process = start_and_wait_for_a_checkpoint(folder, "twice", "--set", *settings, "checkpoints.every_steps=1")
    log = folder / "twice.log"
    process.send_signal(signal.SIGINT)
    wait_for(lambda: "a second Ctrl-C ends at once" in log.read_text(), process, log)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    lines = log.read_text().splitlines()
    assert lines[-1] == "interrupted"
    assert not [line for line in lines if "Traceback" in line]
    assert status_of(folder, "twice") == [("KILLED",)]


@pytest.mark.slow
def test_it_is_the_training_that_one_worker_of_ray_runs(folder: Path) -> None:
    finish(folder, "here")
    assert "imported: ray" in finish(folder, "on-ray", "--cluster", str(folder / "ray.yaml"))
    assert_equal(folder, "here", "on-ray")
