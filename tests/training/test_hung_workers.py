"""Workers that hang while the others wait for them in a collective of Ray Train, and the real command with a stopped one."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import ray.train
from ray.train.collective import broadcast_from_rank_zero

from pipeline.config import Cluster
from pipeline.ray_cluster import start_ray
from pipeline.training import on_ray
from pipeline.training.preflight import Request
from pipeline.training.worker_console import WorkerConsole, last_heartbeat_before_restart
from tests.support.training_runs import experiment, job, shard_folders

TIMEOUT_S = 24.0
CLUSTER = Cluster(workers=2, cpus_per_worker=0.5, heartbeat_timeout_s=10, collective_timeout_s=TIMEOUT_S)


def stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def hang() -> None:
    threading.Event().wait()


def hanging_worker(config: dict[str, Any]) -> dict[str, Any]:
    """Wait for the other worker at a barrier of Ray Train; rank 1 never comes to it in its first attempt."""
    rank, board = ray.train.get_context().get_world_rank(), config["board"]
    if rank == 0:
        last_heartbeat_before_restart(board)
    console = WorkerConsole(board, rank, f"process {os.getpid()} on this node")
    console.heartbeat(3, "training")
    hung = Path(config["job"].run) / "hung"
    if rank == 1 and not hung.exists():
        for _ in range(5):
            time.sleep(1)
            console.heartbeat(3, "training")
        hung.parent.mkdir(parents=True, exist_ok=True)
        hung.write_text(str(os.getpid()))
        {"stopped": stop, "hanging": hang}[config["job"].experiment.name]()
    step = console.waiting(broadcast_from_rank_zero)(7 if rank == 0 else None)
    return {"step": step}


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    start_ray(num_cpus=2)
    yield
    ray.shutdown()


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Ray about its own code
@pytest.mark.parametrize("how", ["stopped", "hanging"])
def test_a_worker_that_others_wait_for_is_named_and_replaced_within_the_collective_timeout(
    how: str, cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(on_ray, "train_worker", hanging_worker)
    monkeypatch.setenv(on_ray.RESPONSE_TIMEOUT, "7")  # taken back after the test
    setting = experiment(tmp_path, shard_folders(tmp_path)).model_copy(update={"name": how})
    task = job(setting)
    hung = Path(task.run) / "hung"
    request = Request(2, 2, 0.0, {"CPU": 0.5})
    value = on_ray.train_on_ray(task, CLUSTER, request, ())
    seconds = time.time() - hung.stat().st_mtime
    assert value == {"step": 7}
    assert TIMEOUT_S < seconds < TIMEOUT_S + 60  # and the start of new workers
    said = "".join(capfd.readouterr())
    silent = f"no progress: worker 1 (process {hung.read_text()} on this node, training at step 3 for "
    line = next(line for line in said.splitlines() if line.startswith(silent))
    assert "its process does not respond" in line or how == "hanging"
    assert line.endswith("other workers: 1 waiting for the other workers at step 3")
    if how == "hanging":
        assert f"worker 1 (process {hung.read_text()} on this node) hung in wait, " in said
    assert not Path(f"/proc/{hung.read_text()}").exists()
