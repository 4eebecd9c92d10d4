"""Several drivers that claim one folder at the same time: at most one holds it."""

import json
import multiprocessing
import os
import socket
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from pipeline import storage
from pipeline.config import ConfigError
from pipeline.training import driver_lock
from tests.support.s3_server import s3_bucket

PROCESSES, ROUNDS = 8, 5
Lock = Callable[[str], AbstractContextManager[Any]]


def by_claim(run: str) -> AbstractContextManager[Any]:
    """The lock of an object store."""
    return driver_lock.claimed(run, {"host": socket.gethostname(), "pid": os.getpid()})


def claim_in_rounds(lock: Lock, folder: str, barrier: Any, outcomes: Any) -> None:
    for number in range(ROUNDS):
        run = f"{folder}/{number}"
        marker = Path(f"{folder}/inside-{number}")
        barrier.wait(60)
        try:
            with lock(run):
                with marker.open("x"):  # FileExistsError: two are inside
                    time.sleep(0.1)
                marker.unlink()
                outcomes.put((number, "inside"))
                barrier.wait(60)  # it holds the folder until all have tried
        except ConfigError:
            outcomes.put((number, "refused"))
            barrier.wait(60)
        except FileExistsError:
            outcomes.put((number, "two inside"))
            barrier.abort()


@pytest.mark.parametrize("lock", [driver_lock.driver_lock, by_claim], ids=["flock", "claims"])
def test_of_eight_processes_at_most_one_holds_a_run(
    lock: Lock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver_lock, "BACKOFF_SECONDS", 0.2)
    context = multiprocessing.get_context("fork")
    barrier, outcomes = context.Barrier(PROCESSES), context.Queue()
    arguments = (lock, str(tmp_path), barrier, outcomes)
    processes = [context.Process(target=claim_in_rounds, args=arguments) for _ in range(PROCESSES)]
    for process in processes:
        process.start()
    found = [outcomes.get(timeout=120) for _ in range(PROCESSES * ROUNDS)]
    for process in processes:
        process.join()
    inside = [sum(pair == (number, "inside") for pair in found) for number in range(ROUNDS)]
    assert len(found) == PROCESSES * ROUNDS
    assert max(inside) <= 1
    assert not [number for number, outcome in found if outcome == "two inside"]
    if lock is driver_lock.driver_lock:
        assert inside == [1] * ROUNDS


def test_a_lock_ends_with_its_process(tmp_path: Path) -> None:
    run = str(tmp_path / "run")
    context = multiprocessing.get_context("fork")
    entered = context.Event()

    def hold() -> None:
        with driver_lock.driver_lock(run):
            entered.set()
            time.sleep(60)

    process = context.Process(target=hold)
    process.start()
    assert entered.wait(30)
    with pytest.raises(ConfigError, match=f"by process {process.pid}"), driver_lock.driver_lock(run):
        pass
    process.kill()
    process.join()
    with driver_lock.driver_lock(run):
        assert json.loads((tmp_path / "run" / driver_lock.DRIVER).read_text())["pid"] == os.getpid()


def test_a_run_in_an_object_store_has_one_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver_lock, "BACKOFF_SECONDS", 0.05)
    with s3_bucket() as bucket:
        run = f"{bucket}/runs/one"
        held = driver_lock.driver_lock(run)
        refused = pytest.raises(ConfigError, match="is being trained by process")
        with held, refused, driver_lock.driver_lock(run):
            pass
        with driver_lock.driver_lock(run):
            (claim,) = storage.names(f"{run}/{driver_lock.CLAIMS}")
            assert storage.read_json(f"{run}/{driver_lock.CLAIMS}/{claim}")["pid"] == os.getpid()
        # A claim whose process has died.
        dead = json.dumps({"host": socket.gethostname(), "pid": 2**22 + 1}).encode()
        storage.write_atomic(f"{run}/{driver_lock.CLAIMS}/dead.json", dead)
        with driver_lock.driver_lock(run):
            pass
