"""Progress and heartbeats of the workers, shown by the driver while they train.

Workers send to one small actor, see `worker_console`. A thread of the driver polls the actor once a second: it moves the
progress line, prints messages, names a worker that has been silent for too long, and ends one that the others wait for.
"""

import math
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import ray

from pipeline.progress import Progress, StepProgress

POLL_SECONDS = 1.0
REPLY_SECONDS = 10.0
WAITING_SECONDS = 30.0  # between two lines about a start that waits for nodes
NAMED_WORKERS = 8  # of those without a heartbeat, in one line
FOR_OTHERS = "waiting for the other workers"  # activity of a worker in a collective of Ray Train
ORDER = ("waiting for data", "training")  # activities of a step; every other one follows them


@dataclass(frozen=True)
class Heartbeat:
    """Last sign of life of one worker."""

    step: int
    activity: str
    at: float  # seconds since 1970, by the actor's clock
    place: str = ""  # process and node

    def __str__(self) -> str:
        return f"{self.activity} at step {self.step}"


@dataclass(frozen=True)
class ProgressUpdate:
    """Everything that arrived since the previous poll."""

    messages: tuple[str, ...]
    step: int | None  # None: no progress since then
    note: str
    heartbeats: dict[int, Heartbeat]  # latest one of every rank
    now: float
    responded: dict[int, float] = field(default_factory=dict)  # last reply of a silent rank's process


class ProgressBoard:
    """The actor that workers write to and the driver polls."""

    def __init__(self) -> None:
        self._messages: list[str] = []
        self._step: int | None = None
        self._note = ""
        self._heartbeats: dict[int, Heartbeat] = {}
        self._responded: dict[int, float] = {}
        self._to_end: set[int] = set()
        self._stop_requested = False
        self._final_error: bytes | None = None

    def fail(self, error: bytes) -> None:
        """Store the pickled error that another start of the workers would only meet again."""
        self._final_error = error

    def final_error(self) -> bytes | None:
        """Error that ended the previous workers for good."""
        return self._final_error

    def request_stop(self) -> None:
        """Ask the workers to save after their step and end."""
        self._stop_requested = True

    def stop_requested(self) -> bool:
        """Whether the driver has asked for a stop."""
        return self._stop_requested

    def heartbeat(self, rank: int, step: int, activity: str, place: str = "") -> None:
        """Store the latest heartbeat of a rank."""
        self._heartbeats[rank] = Heartbeat(step, activity, time.time(), place)
        self._to_end.discard(rank)

    def respond(self, rank: int) -> bool:
        """Note that the process of a silent rank responds; whether it is to end."""
        self._responded[rank] = time.time()
        return rank in self._to_end

    def end(self, rank: int) -> None:
        """Ask the process of a silent rank to end."""
        self._to_end.add(rank)

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
        self._responded.clear()
        self._to_end.clear()
        return last.at if last else None

    def poll(self) -> ProgressUpdate:
        """Return everything new since the last poll."""
        update = ProgressUpdate(
            tuple(self._messages), self._step, self._note, dict(self._heartbeats), time.time(), dict(self._responded)
        )
        self._messages.clear()
        self._step = None
        return update


def start_progress_board() -> Any:
    """Start the actor; it survives the death of its process with an empty state."""
    actor: Any = ray.remote(num_cpus=0, max_restarts=3)(ProgressBoard)
    return actor.remote()


class ProgressMonitor:
    """Thread of the driver that polls the board while the block runs.

    Args:
        timeout_s: a worker without a heartbeat for longer is named.
        end_after_s: a worker without one for longer is ended, if others wait for it.
        waits_for: names what a start of the workers waits for, if it does. The argument is whether workers ran before.
    """

    def __init__(
        self,
        board: Any,
        *,
        name: str,
        steps: int,
        timeout_s: float,
        end_after_s: float,
        waits_for: Callable[[bool], str | None],
    ) -> None:
        self._board, self._waits_for = board, waits_for
        self._timeout_s, self._end_after_s = timeout_s, end_after_s
        self._started = False
        self._training = False  # a worker sent a heartbeat lately
        self._quiet_since = time.monotonic()  # without heartbeats, or since the last line about a start
        self._progress = StepProgress(name, total=steps)
        self._named: dict[int, Heartbeat] = {}
        self._ended: dict[int, Heartbeat] = {}
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
        for rank, beat in awaited_workers(update, self._end_after_s).items():
            if self._ended.get(rank) != beat:
                self._ended[rank] = beat
                seconds = update.now - beat.at
                Progress.write(f"worker {rank} is ended: the other workers wait for it, {beat} for {seconds:.0f} s")
                self._board.end.remote(rank)
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

    A collective of PyTorch silences the workers that wait in it, too; they are counted with the others.

    Args:
        named: heartbeats that were reported before; the new ones are added.
    """
    silent = _silent(update, timeout_s)
    if not {rank for rank, beat in silent.items() if named.get(rank) != beat}:
        return None
    named.update(silent)
    behind = _furthest_behind(update, silent, timeout_s)
    shown = [f"worker {rank} ({_described(update, rank, timeout_s)})" for rank in [*behind][:NAMED_WORKERS]]
    if more := len(behind) - len(shown):
        shown.append(f"{more} more")
    others = Counter(str(beat) for rank, beat in update.heartbeats.items() if rank not in behind)
    rest = ", ".join(f"{count} {state}" for state, count in others.most_common(NAMED_WORKERS)) or "none"
    return f"no progress: {', '.join(shown)}; other workers: {rest}"


def awaited_workers(update: ProgressUpdate, timeout_s: float) -> dict[int, Heartbeat]:
    """Workers without a heartbeat for longer than `timeout_s` while another waits for them in a collective of Ray Train.

    Such a collective has no time limit of its own: rank 0 may compute for long while the others wait.
    """
    waiting = any(
        beat.activity == FOR_OTHERS and update.now - beat.at < WAITING_SECONDS for beat in update.heartbeats.values()
    )
    return _silent(update, timeout_s) if waiting else {}


def _silent(update: ProgressUpdate, timeout_s: float) -> dict[int, Heartbeat]:
    return {rank: beat for rank, beat in sorted(update.heartbeats.items()) if update.now - beat.at > timeout_s}


def _furthest_behind(update: ProgressUpdate, silent: dict[int, Heartbeat], timeout_s: float) -> dict[int, Heartbeat]:
    """Silent workers that the other silent ones may wait for: dead processes, or else those that are behind in their work."""
    dead = {rank: beat for rank, beat in silent.items() if not _responds(update, rank, timeout_s)}
    if dead and len(dead) < len(silent):
        return dead
    first = min(map(_position, silent.values()))
    return {rank: beat for rank, beat in silent.items() if _position(beat) == first}


def _position(beat: Heartbeat) -> tuple[int, int]:
    return beat.step, ORDER.index(beat.activity) if beat.activity in ORDER else len(ORDER)


def _responds(update: ProgressUpdate, rank: int, timeout_s: float) -> bool:
    return update.now - update.responded.get(rank, -math.inf) <= timeout_s


def _described(update: ProgressUpdate, rank: int, timeout_s: float) -> str:
    beat = update.heartbeats[rank]
    words = [beat.place] if beat.place else []
    words.append(f"{beat} for {update.now - beat.at:.0f} s")
    if beat.place and not _responds(update, rank, timeout_s):
        words.append("its process does not respond")
    return ", ".join(words)
