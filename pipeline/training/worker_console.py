"""A worker's side of the progress board: its console, its heartbeats, and the requests that reach it."""

import os
import pickle
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import ray
from ray.exceptions import RayError

from pipeline.errors import UserError
from pipeline.training.heartbeat import FOR_OTHERS, REPLY_SECONDS
from pipeline.training.stop_request import StopRequest

P = ParamSpec("P")
T = TypeVar("T")
STOP_POLL_SECONDS = 0.25  # `ray job stop` leaves three seconds
HEARTBEAT_SECONDS = 1.0  # a worker sends at most one heartbeat in this time


def last_heartbeat_before_restart(board: Any) -> float | None:
    """Time of the previous workers' last heartbeat; None at the first start. Rank 0 calls it as it starts."""
    try:
        at: float | None = ray.get(board.restart.remote(), timeout=REPLY_SECONDS)
    except RayError:
        return None
    return at


@contextmanager
def final_errors(board: Any) -> Iterator[None]:
    """End the run by an error of the block that would recur; Ray Train starts the workers again after any error.

    Workers that are started after such an error raise it at once, instead of repeating the steps before it.
    """
    with suppress(RayError):
        if (error := ray.get(board.final_error.remote(), timeout=REPLY_SECONDS)) is not None:
            raise pickle.loads(error)  # written by a worker of this run
    try:
        yield
    except UserError as error:
        if error.recurs:
            cause = getattr(error, "cause", error)  # Ray wraps the exception of its task
            with suppress(RayError):
                ray.get(board.fail.remote(pickle.dumps(cause)), timeout=REPLY_SECONDS)
        raise


def watch_stop_request(board: Any) -> StopRequest:
    """Stop request of rank 0: a thread asks the board for it until it is made."""
    request = StopRequest()

    def watch() -> None:
        while not request.made:
            with suppress(RayError):  # the board's process is starting again
                request.made = ray.get(board.stop_requested.remote(), timeout=REPLY_SECONDS)
            time.sleep(STOP_POLL_SECONDS)

    threading.Thread(target=watch, daemon=True, name="stop request").start()
    return request


class WorkerConsole:
    """Console of a worker: a thread sends its latest heartbeat once a second, if it is new.

    Only the training thread makes heartbeats, so a training that hangs falls silent although the thread runs on. The thread then
    reports that the process responds, and ends it where the driver asks for that.

    Args:
        place: process and node of this worker.
    """

    def __init__(self, board: Any, rank: int, place: str = "") -> None:
        self._board, self._rank, self._place = board, rank, place
        self._current: tuple[int, str] | None = None  # step and activity of the last heartbeat
        self._latest: tuple[int, str] | None = None  # one that was not sent yet
        self._working: tuple[int, str] | None = None  # during work without heartbeats of its own
        self._sender: threading.Thread | None = None
        self._trains_in = threading.get_ident()
        self._lock = threading.Lock()

    def heartbeat(self, step: int, activity: str) -> None:
        """Note a heartbeat; at most one message a second is sent, with the latest one."""
        with self._lock:
            self._current = self._latest = step, activity
        if self._sender is None:
            self._trains_in = threading.get_ident()
            self._sender = threading.Thread(target=self._send, daemon=True, name="heartbeat")
            self._sender.start()

    @contextmanager
    def working(self, step: int, activity: str) -> Iterator[None]:
        """Keep sending heartbeats while the block computes for long without making any."""
        outer, before = self._working, self._current
        self._working = step, activity
        self.heartbeat(step, activity)
        try:
            yield
        finally:
            self._working = outer
            if before is not None:
                self.heartbeat(*before)

    def waiting(self, collective: Callable[P, T]) -> Callable[P, T]:
        """Wrap a collective of Ray Train: this worker sends heartbeats while it waits for the others, from its first step on."""

        @wraps(collective)
        def wait(*args: P.args, **kwargs: P.kwargs) -> T:
            if self._current is None:
                return collective(*args, **kwargs)
            with self.working(self._current[0], FOR_OTHERS):
                return collective(*args, **kwargs)

        return wait

    def print(self, text: str) -> None:
        """Send a message."""
        self._board.print.remote(text)

    def progress(self, step: int, note: str) -> None:
        """Send the progress of the run."""
        self._board.progress.remote(step, note)

    def _send(self) -> None:
        while True:
            with self._lock:
                latest, self._latest = self._latest or self._working, None
            if latest is not None:
                self._board.heartbeat.remote(self._rank, *latest, self._place)
            elif self._is_to_end():
                self._end()
            time.sleep(HEARTBEAT_SECONDS)

    def _is_to_end(self) -> bool:
        with suppress(RayError):  # the board's process is starting again
            asked: bool = ray.get(self._board.respond.remote(self._rank), timeout=REPLY_SECONDS)
            return asked
        return False

    def _end(self) -> None:
        """End this process, whose training thread hangs, and print where; Ray starts the workers again."""
        frame = traceback.extract_stack(sys._current_frames()[self._trains_in])[-1]
        text = f"worker {self._rank} ({self._place}) hung in {frame.name}, {frame.filename}:{frame.lineno}"
        with suppress(RayError):
            ray.get(self._board.print.remote(text), timeout=REPLY_SECONDS)
        os._exit(1)
