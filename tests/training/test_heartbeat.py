"""Heartbeats of the workers, and what the driver concludes from them."""

import time
from types import SimpleNamespace

import pytest

from pipeline.training import heartbeat, worker_console
from pipeline.training.heartbeat import FOR_OTHERS, Heartbeat, ProgressBoard, awaited_workers, silent_workers
from pipeline.training.worker_console import WorkerConsole
from tests.support.processes import wait_until


def at(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    monkeypatch.setattr(heartbeat.time, "time", lambda: seconds)


def test_a_worker_without_heartbeat_is_named_once(monkeypatch: pytest.MonkeyPatch) -> None:
    board = ProgressBoard()
    at(monkeypatch, 900)
    board.heartbeat(1, 12, "waiting for data")
    at(monkeypatch, 1000)
    board.heartbeat(0, 13, "training")
    named: dict[int, Heartbeat] = {}
    line = silent_workers(board.poll(), 60, named)
    assert line == (
        "no progress: worker 1 (waiting for data at step 12 for 100 s); other workers: 1 training at step 13"
    )
    assert silent_workers(board.poll(), 60, named) is None
    board.heartbeat(1, 13, "training")
    assert silent_workers(board.poll(), 60, named) is None


def test_silent_workers_fit_one_line_however_many_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    board = ProgressBoard()
    at(monkeypatch, 1000)
    for rank in range(256):
        board.heartbeat(rank, 12, "evaluating")
    at(monkeypatch, 1100)
    line = silent_workers(board.poll(), 60, {})
    assert line is not None
    assert len(line) < 700
    assert "248 more" in line


class ResponsiveConsole(WorkerConsole):
    """A console that is never asked to end."""

    def _is_to_end(self) -> bool:
        return False


class CountingBoard:
    """A board in this process: counts the messages that a worker sends."""

    def __init__(self) -> None:
        self.sent: list[tuple[int, int, str]] = []
        self.heartbeat = SimpleNamespace(
            remote=lambda rank, step, activity, _: self.sent.append((rank, step, activity))
        )


def test_a_worker_sends_its_latest_heartbeat_at_most_once_in_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_console, "HEARTBEAT_SECONDS", 0.2)
    board = CountingBoard()
    console = ResponsiveConsole(board, rank=3)
    started_at = time.monotonic()
    for step in range(1000):
        console.heartbeat(step, "training")
        console.heartbeat(step, "waiting for data")
    wait_until(lambda: bool(board.sent) and board.sent[-1] == (3, 999, "waiting for data"))
    assert len(board.sent) <= 2 + (time.monotonic() - started_at) / 0.2
    sent = len(board.sent)
    time.sleep(0.5)
    assert len(board.sent) == sent  # a training that hangs is silent
    with console.working(1000, "evaluating"):
        wait_until(lambda: board.sent.count((3, 1000, "evaluating")) >= 3)


def test_restarted_workers_learn_the_time_of_the_last_heartbeat(monkeypatch: pytest.MonkeyPatch) -> None:
    board = ProgressBoard()
    assert board.restart() is None
    at(monkeypatch, 1000)
    board.heartbeat(0, 13, "training")
    at(monkeypatch, 2000)
    assert board.restart() == 1000
    assert silent_workers(board.poll(), 60, {}) is None  # the workers before are not missed


def test_messages_are_delivered_once() -> None:
    board = ProgressBoard()
    board.print("one")
    board.progress(3, "loss 1")
    update = board.poll()
    assert (update.messages, update.step, update.note) == (("one",), 3, "loss 1")
    update = board.poll()
    assert (update.messages, update.step) == ((), None)


def test_of_workers_that_wait_for_each_other_the_one_that_is_behind_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    board = ProgressBoard()
    at(monkeypatch, 1000)
    board.heartbeat(0, 13, "training")
    board.heartbeat(1, 13, "waiting for data", "process 7 on 10.0.0.2")
    board.heartbeat(2, 13, "training")
    at(monkeypatch, 1090)
    for rank in range(3):
        board.respond(rank)
    at(monkeypatch, 1100)
    line = silent_workers(board.poll(), 60, {})
    assert line == (
        "no progress: worker 1 (process 7 on 10.0.0.2, waiting for data at step 13 for 100 s); other workers: 2 training at"
        " step 13"
    )


def test_a_process_that_does_not_respond_is_named_before_those_that_do(monkeypatch: pytest.MonkeyPatch) -> None:
    board = ProgressBoard()
    at(monkeypatch, 1000)
    for rank in range(3):
        board.heartbeat(rank, 13, "training", f"process {rank} on 10.0.0.2")
    at(monkeypatch, 1095)
    for rank in (0, 2):
        board.respond(rank)
    at(monkeypatch, 1100)
    named: dict[int, Heartbeat] = {}
    line = silent_workers(board.poll(), 60, named)
    assert line == (
        "no progress: worker 1 (process 1 on 10.0.0.2, training at step 13 for 100 s, its process does not respond);"
        " other workers: 2 training at step 13"
    )
    assert silent_workers(board.poll(), 60, named) is None


def test_a_silent_worker_is_ended_only_while_another_waits_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    board = ProgressBoard()
    at(monkeypatch, 1000)
    board.heartbeat(1, 13, "training")
    at(monkeypatch, 1100)
    board.heartbeat(0, 13, "evaluating")
    assert awaited_workers(board.poll(), 60) == {}
    board.heartbeat(0, 13, FOR_OTHERS)
    assert [*awaited_workers(board.poll(), 60)] == [1]
    assert awaited_workers(board.poll(), 110) == {}
    board.end(1)
    assert [board.respond(rank) for rank in (0, 1)] == [False, True]
    board.heartbeat(1, 13, "saving")
    assert not board.respond(1)  # it was slow
    board.end(1)
    board.restart()
    assert not board.respond(1)  # the next process of this rank


def test_a_worker_that_waits_for_others_sends_heartbeats_from_its_first_step_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(worker_console, "HEARTBEAT_SECONDS", 0.02)
    board = CountingBoard()
    console = ResponsiveConsole(board, rank=0)

    def collective(seconds: float) -> float:
        time.sleep(seconds)
        return seconds

    assert console.waiting(collective)(0.2) == 0.2
    assert board.sent == []
    with console.working(5, "evaluating"):
        console.waiting(collective)(0.3)
        assert board.sent.count((0, 5, FOR_OTHERS)) >= 3
        wait_until(lambda: board.sent[-1] == (0, 5, "evaluating"))
