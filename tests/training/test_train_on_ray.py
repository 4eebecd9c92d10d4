"""The command itself, on a Ray of its own: killed as the world would, and compared with a run that was left alone."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from pipeline.config_files import load_experiment
from pipeline.training import checkpoint
from tests.support.processes import descendants, free_port, kill_driver, one_thread, wait_for
from tests.support.teachers import detector_folder, tiny_vit
from tests.support.training_runs import SteppedRun, job, shard_folders

ROOT = Path(__file__).parents[2]
STEPS = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ray")
    content = {
        "storage": str(folder / "runs"),
        "data": shard_folders(folder, images=48),
        "model": {"variant": "n", "input_size": [64, 64], "num_queries": 20, "num_denoising": 10},
        "schedule": {"steps": STEPS, "global_batch_size": 8, "no_aug_epochs": 0, "micro_batch_size": 4},
        "evaluation": {"every_steps": 1000, "num_images": 1},
        "checkpoints": {"every_steps": 2},
        "tracking": {"every_steps": 1},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(content))
    for workers in (1, 2):
        cluster = {"workers": workers, "gpus_per_worker": 0, "cpus_per_worker": 0.5, "threads_per_worker": 1}
        (folder / f"{workers}.yaml").write_text(yaml.safe_dump(cluster))
    return folder


def start(folder: Path, name: str, *, workers: int = 2, experiment: str = "run.yaml") -> subprocess.Popen[str]:
    command = [
        sys.executable,
        "-m",
        "jobs.train",
        folder / experiment,
        "--cluster",
        folder / f"{workers}.yaml",
        "--name",
        name,
    ]
    environment = {**os.environ, "RAY_TMPDIR": "/tmp"}
    environment.pop("RAY_ADDRESS", None)
    with (folder / f"{name}.log").open("a") as log:
        return subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )


def finish(folder: Path, name: str, *, workers: int = 2, experiment: str = "run.yaml") -> None:
    process = start(folder, name, workers=workers, experiment=experiment)
    code = process.wait(timeout=400)
    assert code == 0, (folder / f"{name}.log").read_text()[-4000:]


def wait_for_step(folder: Path, name: str, step: int, process: subprocess.Popen[str]) -> None:
    checkpoints = str(folder / "runs" / name / "checkpoints")
    wait_for(lambda: bool([s for s in checkpoint.steps_in(checkpoints) if s >= step]), process, folder / f"{name}.log")


def kill_one_worker(driver: subprocess.Popen[str]) -> None:
    workers = [pid for pid, title in descendants(driver.pid).items() if title.startswith("ray::RayTrainWorker")]
    assert len(workers) == 2, descendants(driver.pid)
    os.kill(workers[-1], signal.SIGKILL)


def listening_addresses(driver: subprocess.Popen[str]) -> set[str]:
    """Addresses on which any process of a command listens, the workers' process group among them."""
    listening = {
        (connection.pid, connection.laddr.ip.removeprefix("::ffff:"))
        for connection in psutil.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    }
    titles = descendants(driver.pid)
    assert [pid for pid, _ in listening if titles.get(pid, "").startswith("ray::RayTrainWorker")]
    return {address for pid, address in listening if pid in titles}


def tensors_of(folder: Path, name: str, step: int = STEPS) -> dict[str, Tensor]:
    place = folder / "runs" / name / "checkpoints" / checkpoint.step_folder(step)
    return {f"{file}/{k}": v for file in checkpoint.FILES for k, v in load_file(place / f"{file}.safetensors").items()}


def losses_of(folder: Path, name: str) -> list[tuple[int, float]]:
    """As the tracking database has them, in the order in which they were stored."""
    with sqlite3.connect(folder / "runs" / "mlflow.db") as database:
        (run,) = database.execute("select run_uuid, status from runs where name = ?", (name,)).fetchall()
        assert run[1] == "FINISHED"
        query = "select step, value from metrics where run_uuid = ? and key = 'train/loss' order by step, rowid"
        return database.execute(query, (run[0],)).fetchall()


def test_a_killed_worker_loses_nothing(folder: Path) -> None:
    """Against the same steps in this process: one worker that accumulates, no Ray, nothing killed."""
    driver = start(folder, "worker-killed")
    wait_for_step(folder, "worker-killed", 2, driver)
    assert listening_addresses(driver) == {"127.0.0.1"}
    kill_one_worker(driver)
    log = folder / "worker-killed.log"
    assert driver.wait(timeout=400) == 0, log.read_text()[-4000:]
    said = log.read_text()
    assert "Actor with class name" not in said
    assert "continuing at step" in said
    assert "after the launch" in said.partition("continuing")[0]
    assert "after the workers' last heartbeat" in said.partition("continuing")[2]

    setting = load_experiment(folder / "run.yaml", {"data.decode_in": "inline", "name": "alone"})
    run = SteppedRun.begin(job(setting))
    with one_thread():
        losses = run.losses(STEPS)
    expected = [(step, pytest.approx(loss, rel=1e-4)) for step, loss in enumerate(losses, start=1)]
    assert losses_of(folder, "worker-killed") == expected


@pytest.mark.slow  # starts the workers four times
def test_an_error_that_would_recur_ends_the_run_at_once(folder: Path) -> None:
    """Workers that Ray Train starts again do not repeat the steps that lead to it."""
    content = yaml.safe_load((folder / "run.yaml").read_text())
    content |= {"optimizer": {"lr": 1e38, "backbone_lr": 1e38}, "non_finite": {"max_consecutive": 1}, "checkpoints": {}}
    content["schedule"]["warmup_steps"] = 0
    (folder / "diverges.yaml").write_text(yaml.safe_dump(content))
    process = start(folder, "diverged", experiment="diverges.yaml")
    assert process.wait(timeout=400) == 1
    said = (folder / "diverged.log").read_text()
    assert said.count("worker 0 skipped step 1:") == 1, said[-4000:]
    assert "were not finite, and there is no checkpoint to rewind to" in said


@pytest.mark.slow  # `test_run_folder` has the same without starting Ray
def test_a_job_that_never_fits_is_refused_before_anything_starts(folder: Path) -> None:
    (folder / "64.yaml").write_text(yaml.safe_dump({"workers": 64, "gpus_per_worker": 0}))
    process = start(folder, "large", workers=64)
    assert process.wait(timeout=120) == 1
    assert "CPU: 64 x 0.5 and 1 for decoding are requested" in (folder / "large.log").read_text()


@pytest.mark.slow
def test_killed_worker_and_killed_driver_give_the_same_bits(folder: Path) -> None:
    finish(folder, "whole")
    driver = start(folder, "killed")
    wait_for_step(folder, "killed", 2, driver)
    kill_one_worker(driver)
    wait_for_step(folder, "killed", 6, driver)
    kill_driver(driver)
    finish(folder, "killed")

    expected, found = tensors_of(folder, "whole"), tensors_of(folder, "killed")
    assert len(expected) > 1000
    assert [key for key, tensor in expected.items() if not torch.equal(tensor, found[key])] == []
    assert losses_of(folder, "killed") == losses_of(folder, "whole")
    assert [step for step, _ in losses_of(folder, "killed")] == list(range(1, STEPS + 1))

    again = start(folder, "whole")
    assert again.wait(timeout=120) == 1
    assert "run 'whole' is finished" in (folder / "whole.log").read_text()


@pytest.mark.slow
def test_a_killed_worker_leaves_to_the_bit_what_a_teacher_adapts_and_trains(folder: Path, tmp_path: Path) -> None:
    """The weight follows the gradients at the end of every epoch of six steps; the worker dies in the second epoch."""
    adapt = {"share": 0.05, "tolerance": 0.001}
    teacher = {
        "features": {"model": tiny_vit(tmp_path / "vit"), "weight": 5, "adapt": adapt},
        "detector": {"weights": detector_folder(tmp_path / "detector")},
    }
    content = yaml.safe_load((folder / "run.yaml").read_text()) | {"teacher": teacher}
    content["schedule"] |= {"steps": 14}
    (folder / "taught.yaml").write_text(yaml.safe_dump(content))
    finish(folder, "taught", experiment="taught.yaml")
    driver = start(folder, "taught-killed", experiment="taught.yaml")
    wait_for_step(folder, "taught-killed", 8, driver)
    kill_one_worker(driver)
    log = folder / "taught-killed.log"
    assert driver.wait(timeout=400) == 0, log.read_text()[-4000:]
    assert "continuing at step" in log.read_text()

    expected, found = tensors_of(folder, "taught", 14), tensors_of(folder, "taught-killed", 14)
    assert {"optimizer/teachers.features.weight", "optimizer/teachers.detector.weight"} <= expected.keys()
    assert expected.keys() == found.keys()
    assert [key for key, tensor in expected.items() if not torch.equal(tensor, found[key])] == []
    assert float(expected["optimizer/teachers.weight"]) != 5  # adapted
    assert losses_of(folder, "taught-killed") == losses_of(folder, "taught")


def status_of(folder: Path, name: str) -> str | None:
    with sqlite3.connect(folder / "runs" / "mlflow.db") as database:
        row = database.execute("select status from runs where name = ?", (name,)).fetchone()
    return row[0] if row else None


@pytest.mark.slow
def test_ctrl_c_ends_the_run_as_killed(folder: Path) -> None:
    (folder / "long.yaml").write_text((folder / "run.yaml").read_text().replace(f"steps: {STEPS}", "steps: 2000"))
    driver = start(folder, "interrupted", experiment="long.yaml")
    wait_for_step(folder, "interrupted", 2, driver)
    driver.send_signal(signal.SIGINT)
    code = driver.wait(timeout=100)
    said = (folder / "interrupted.log").read_text()
    assert code == 130, said[-4000:]
    assert "could not be recorded" not in said
    assert "not in MLflow yet" not in said
    assert status_of(folder, "interrupted") == "KILLED"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_a_stop_signal_saves_on_all_workers_and_ends(folder: Path, number: signal.Signals) -> None:
    (folder / "long.yaml").write_text((folder / "run.yaml").read_text().replace(f"steps: {STEPS}", "steps: 2000"))
    driver = start(folder, number.name, experiment="long.yaml")
    wait_for_step(folder, number.name, 2, driver)
    driver.send_signal(number)
    code = driver.wait(timeout=100)
    lines = (folder / f"{number.name}.log").read_text().splitlines()
    assert code == 130, lines
    saved = checkpoint.steps_in(str(folder / "runs" / number.name / "checkpoints"))[-1]
    (line,) = [line for line in lines if line.startswith("stopped at step")]
    assert line.startswith(f"stopped at step {saved}, saved in {folder}/runs/{number.name}/checkpoints/")
    assert line.endswith(f"--name {number.name}")
    assert not [line for line in lines if "Traceback" in line]
    with sqlite3.connect(folder / "runs" / "mlflow.db") as database:
        assert database.execute("select status from runs where name = ?", (number.name,)).fetchall() == [("KILLED",)]


@pytest.mark.slow
def test_two_workers_then_one_then_two_make_the_same_run(folder: Path) -> None:
    if not (folder / "runs" / "whole").exists():
        finish(folder, "whole")
    for workers, until in ((2, 2), (1, 6)):
        driver = start(folder, "resized", workers=workers)
        wait_for_step(folder, "resized", until, driver)
        kill_driver(driver)
    finish(folder, "resized", workers=2)
    for (step, loss), (other_step, other) in zip(losses_of(folder, "resized"), losses_of(folder, "whole"), strict=True):
        assert step == other_step
        assert loss == pytest.approx(other, rel=1e-4)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("recipe", "least"), [("dfine", 0.4), ("deim", 0.15)])  # mosaics show these images smaller
def test_the_demo_learns_its_images(recipe: str, least: float, tmp_path: Path) -> None:
    shards, runs = str(tmp_path / "shards"), str(tmp_path / "runs")
    drawing = [
        "synthetic",
        "--images",
        "12",
        "--image-side",
        "128",
        "--max-shapes",
        "4",
        "--split",
        "drawn",
        "--out",
        shards,
    ]
    settings = [f"storage={runs}", f"data.train={shards}", f"data.val={shards}", f"recipe={recipe}"]
    training = ["configs/demo.yaml", "--cluster", "configs/clusters/laptop.yaml", "--set", *settings]
    for module, arguments in (("jobs.prepare", drawing), ("jobs.train", training)):
        subprocess.run([sys.executable, "-m", module, *arguments], cwd=ROOT, check=True, timeout=1500)
    result = json.loads((tmp_path / "runs" / "demo" / "result.json").read_text())
    assert result["numbers"]["AP"] > least
    assert len(list((tmp_path / "runs" / "demo" / "evaluation" / "final").glob("images_*.png"))) == 4


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[str]:
    """A head as the README starts it; the address to submit to."""
    port = free_port()
    command = ["ray", "start", "--head", "--num-cpus=2", f"--port={free_port()}", f"--dashboard-port={port}"]
    command += ["--disable-usage-stats", "--block", "--ray-client-server-port", str(free_port())]
    binaries = Path(sys.executable).parent
    environment = {**os.environ, "PATH": f"{binaries}:{os.environ['PATH']}", "RAY_AUTH_MODE": "disabled"}
    with (tmp_path / "head.log").open("w") as log:
        head = subprocess.Popen(
            [str(binaries / command[0]), *command[1:]], env=environment, stdout=log, stderr=log, start_new_session=True
        )
    try:
        address = f"http://127.0.0.1:{port}"
        wait_for(lambda: answers(f"{address}/api/version"), head, tmp_path / "head.log")
        yield address
    finally:
        kill_driver(head)


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False


@pytest.mark.slow
def test_a_job_is_submitted_as_the_readme_says(folder: Path, cluster: str) -> None:
    binary = str(Path(sys.executable).parent / "ray")
    submit = [
        binary,
        "job",
        "submit",
        "--working-dir",
        ".",
        "--",
        "python",
        "-m",
        "jobs.train",
        str(folder / "run.yaml"),
    ]
    submit += ["--cluster", str(folder / "2.yaml"), "--name", "submitted"]
    environment = {**os.environ, "RAY_ADDRESS": cluster, "RAY_AUTH_MODE": "disabled"}
    done = subprocess.run(submit, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert f"finished at step {STEPS}" in done.stdout
    assert len(losses_of(folder, "submitted")) == STEPS
    with sqlite3.connect(folder / "runs" / "mlflow.db") as database:
        (tag,) = database.execute("select value from tags where key = 'ray.job'").fetchall()
    assert tag[0] in done.stdout


@pytest.mark.slow
def test_ray_job_stop_ends_the_run_as_killed(folder: Path, cluster: str) -> None:
    """Ray kills the job three seconds after SIGTERM."""
    (folder / "long.yaml").write_text((folder / "run.yaml").read_text().replace(f"steps: {STEPS}", "steps: 2000"))
    binary = str(Path(sys.executable).parent / "ray")
    environment = {**os.environ, "RAY_ADDRESS": cluster, "RAY_AUTH_MODE": "disabled"}

    def job(*words: str) -> str:
        done = subprocess.run(
            [binary, "job", *words], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
        return done.stdout

    training = ["python", "-m", "jobs.train", str(folder / "long.yaml"), "--cluster", str(folder / "2.yaml")]
    job("submit", "--no-wait", "--submission-id", "stopped", "--working-dir", ".", "--", *training, "--name", "stopped")
    checkpoints = str(folder / "runs" / "stopped" / "checkpoints")
    until = time.monotonic() + 300
    while not [step for step in checkpoint.steps_in(checkpoints) if step >= 2] or not status_of(folder, "stopped"):
        assert time.monotonic() < until, job("logs", "stopped")[-4000:]
        time.sleep(0.2)
    assert status_of(folder, "stopped") == "RUNNING"
    job("stop", "stopped")
    until = time.monotonic() + 20
    while status_of(folder, "stopped") != "KILLED":
        assert time.monotonic() < until, job("logs", "stopped")[-4000:]
        time.sleep(0.2)
