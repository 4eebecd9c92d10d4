"""Progress and heartbeats of the workers, shown by the driver while they train.

Workers send to one small actor and never wait for it. A thread of the driver polls the actor once a second: it moves the
progress line, prints messages, and names a worker that has been silent for too long.
"""

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError

from pipeline.progress import Progress, StepProgress
from pipeline.training.stop_request import StopRequest

POLL_SECONDS = 1.0
REPLY_SECONDS = 10.0
STOP_POLL_SECONDS = 0.25  # `ray job stop` leaves three seconds
HEARTBEAT_SECONDS = 1.0  # a worker sends at most one heartbeat in this time
WAITING_SECONDS = 30.0  # between two lines about a start that waits for nodes
NAMED_WORKERS = 8  # of those without a heartbeat, in one line


@dataclass(frozen=True)
class Heartbeat:
    """Last sign of life of one worker."""

    step: int
    activity: str
    at: float  # seconds since 1970, by the actor's clock


@dataclass(frozen=True)
class ProgressUpdate:
    """Everything that arrived since the previous poll."""

    messages: tuple[str, ...]
    step: int | None  # None: no progress since then
    note: str
    heartbeats: dict[int, Heartbeat]  # latest one of every rank
    now: float


class ProgressBoard:
    """The actor that workers write to and the driver polls."""

    def __init__(self) -> None:
        self._messages: list[str] = []
        self._step: int | None = None
        self._note = ""
        self._heartbeats: dict[int, Heartbeat] = {}
        self._stop_requested = False

    def request_stop(self) -> None:
        """Ask the workers to save after their step and end."""
        self._stop_requested = True

    def stop_requested(self) -> bool:
        """Whether the driver has asked for a stop."""
        return self._stop_requested

    def heartbeat(self, rank: int, step: int, activity: str) -> None:
        """Store the latest heartbeat of a rank."""
        self._heartbeats[rank] = Heartbeat(step, activity, time.time())

    def print(self, text: str) -> None:
        """Queue a message for the driver."""
        self._messages.append(text)

    def progress(self, step: int, note: str) -> None:
        """Store the latest progress."""
        self._step, self._note = step, note

    def restart(self) -> float | None:
        """Forget the heartbeats; return the time of rank 0's last one, if there was any."""
        last = self._heartbeats.get(0)
        self._heartbeats.clear()
        return last.at if last else None

    def poll(self) -> ProgressUpdate:
        """Return everything new since the last poll."""
        update = ProgressUpdate(tuple(self._messages), self._step, self._note, dict(self._heartbeats), time.time())
        self._messages.clear()
        self._step = None
        return update


def start_progress_board() -> Any:
    """Start the actor; it survives the death of its process with an empty state."""
    actor: Any = ray.remote(num_cpus=0, max_restarts=3)(ProgressBoard)
    return actor.remote()


def last_heartbeat_before_restart(board: Any) -> float | None:
    """Time of the previous workers' last heartbeat; None at the first start. Rank 0 calls it as it starts."""
    try:
        at: float | None = ray.get(board.restart.remote(), timeout=REPLY_SECONDS)
    except RayError:
        return None
    return at


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

    Only the training thread makes heartbeats, so a training that hangs falls silent although the thread runs on.
    """

    def __init__(self, board: Any, rank: int) -> None:
        self._board, self._rank = board, rank
        self._latest: tuple[int, str] | None = None  # step and activity that were not sent yet
        self._working: tuple[int, str] | None = None  # during work without heartbeats of its own
        self._sender: threading.Thread | None = None
        self._lock = threading.Lock()

    def heartbeat(self, step: int, activity: str) -> None:
        """Note a heartbeat; at most one message a second is sent, with the latest one."""
        with self._lock:
            self._latest = step, activity
        if self._sender is None:
            self._sender = threading.Thread(target=self._send, daemon=True, name="heartbeat")
            self._sender.start()

    @contextmanager
    def working(self, step: int, activity: str) -> Iterator[None]:
        """Keep sending heartbeats while the block computes for long without making any."""
        self._working = step, activity
        self.heartbeat(step, activity)
        try:
            yield
        finally:
            self._working = None

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
                self._board.heartbeat.remote(self._rank, *latest)
            time.sleep(HEARTBEAT_SECONDS)


class ProgressMonitor:
    """Thread of the driver that polls the board while the block runs.

    Args:
        timeout_s: a worker without a heartbeat for longer is named.
        waits_for: names what a start of the workers waits for, if it does. The argument is whether workers ran before.
    """

    def __init__(
        self, board: Any, *, name: str, steps: int, timeout_s: float, waits_for: Callable[[bool], str | None]
    ) -> None:
        self._board, self._timeout_s, self._waits_for = board, timeout_s, waits_for
        self._started = False
        self._training = False  # a worker sent a heartbeat lately
        self._quiet_since = time.monotonic()  # without heartbeats, or since the last line about a start
        self._progress = StepProgress(name, total=steps)
        self._named: dict[int, Heartbeat] = {}
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="progress")

    @property
    def step(self) -> int:
        """Steps that the run has reached."""
        return self._progress.step

    def request_stop(self) -> bool:
        """Ask the workers to save after their step and end; False if none is training, so that none would see it for long."""
        if not self._training:
            return False
        self._board.request_stop.remote()
        return True

    def __enter__(self) -> "ProgressMonitor":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join(timeout=10)
        self._progress.__exit__()

    def _run(self) -> None:
        while True:
            last = self._stopped.wait(POLL_SECONDS)
            try:
                self._show(ray.get(self._board.poll.remote(), timeout=REPLY_SECONDS))
            except Exception:  # noqa: BLE001 - the cluster is busy or going down: training itself fails with the reason
                if last:
                    return
                continue
            if last:
                return

    def _show(self, update: ProgressUpdate) -> None:
        for text in update.messages:
            Progress.write(text)
        if update.step is not None:
            self._progress.show(update.step, update.note)
        if silent := silent_workers(update, self._timeout_s, self._named):
            Progress.write(silent)
        self._show_waiting(update)

    def _show_waiting(self, update: ProgressUpdate) -> None:
        self._training = any(update.now - beat.at < WAITING_SECONDS for beat in update.heartbeats.values())
        if self._training:
            self._started, self._quiet_since = True, time.monotonic()
        elif time.monotonic() - self._quiet_since >= WAITING_SECONDS:
            self._quiet_since = time.monotonic()
            if waiting := self._waits_for(self._started):
                Progress.write(waiting)


def silent_workers(update: ProgressUpdate, timeout_s: float, named: dict[int, Heartbeat]) -> str | None:
    """Name the workers without a heartbeat for longer than `timeout_s`, in one line however many there are.

    Args:
        named: heartbeats that were reported before; the new ones are added.
    """
    silent = {
        rank: beat
        for rank, beat in sorted(update.heartbeats.items())
        if update.now - beat.at > timeout_s and named.get(rank) != beat
    }
    if not silent:
        return None
    named.update(silent)
    shown = [
        f"worker {rank} ({beat.activity} at step {beat.step} for {update.now - beat.at:.0f} s)"
        for rank, beat in list(silent.items())[:NAMED_WORKERS]
    ]
    if more := len(silent) - len(shown):
        shown.append(f"{more} more")
    others = Counter(
        f"{beat.activity} at step {beat.step}" for rank, beat in update.heartbeats.items() if rank not in silent
    )
    rest = ", ".join(f"{count} {state}" for state, count in others.most_common(NAMED_WORKERS)) or "none"
    return f"no progress: {', '.join(shown)}; other workers: {rest}"
