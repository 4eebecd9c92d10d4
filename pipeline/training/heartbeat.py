"""What the driver knows of its workers while they train: where each one is, and what there is to show.

Workers send to one small actor and never wait for it; a thread of the driver asks it once a second, moves the progress line,
prints what was said, and names the worker that has been silent for too long.
"""

import threading
import time
from dataclasses import dataclass
from typing import Any, Protocol

import ray
from ray.exceptions import RayError

from pipeline.progress import Progress

POLL_SECONDS = 1.0
ANSWER_SECONDS = 10.0
BEAT_SECONDS = 1.0  # at most one message of a worker in this time


class Console(Protocol):
    """Where a training speaks."""

    def beat(self, step: int, doing: str) -> None:
        """This worker lives; it is at `step`."""

    def say(self, text: str) -> None:
        """A line or a table for the person who watches."""

    def progress(self, step: int, note: str) -> None:
        """`step` steps are done."""


@dataclass(frozen=True)
class Beat:
    step: int
    doing: str
    at: float  # seconds since 1970, by the actor's clock


@dataclass(frozen=True)
class News:
    """Since the last time it was asked for."""

    said: tuple[str, ...]
    step: int | None
    note: str
    beats: dict[int, Beat]  # by rank, all
    now: float


class Mailbox:
    """The actor."""

    def __init__(self) -> None:
        self._said: list[str] = []
        self._step: int | None = None
        self._note = ""
        self._beats: dict[int, Beat] = {}

    def beat(self, rank: int, step: int, doing: str) -> None:
        self._beats[rank] = Beat(step, doing, time.time())

    def say(self, text: str) -> None:
        self._said.append(text)

    def progress(self, step: int, note: str) -> None:
        self._step, self._note = step, note

    def start(self) -> float | None:
        """The workers start: when those before them were last heard of, if there were any."""
        last = self._beats.get(0)
        self._beats.clear()
        return last.at if last else None

    def news(self) -> News:
        news = News(tuple(self._said), self._step, self._note, dict(self._beats), time.time())
        self._said.clear()
        self._step = None
        return news


def stopped_before(mailbox: Any) -> float | None:
    """When workers before these were last heard of; None also if nobody knows. Called by rank 0 as it starts."""
    try:
        at: float | None = ray.get(mailbox.start.remote(), timeout=ANSWER_SECONDS)
    except RayError:
        return None
    return at


def start_mailbox() -> Any:
    actor: Any = ray.remote(num_cpus=0, max_restarts=3)(Mailbox)
    return actor.remote()


class WorkerConsole:
    """A worker's end."""

    def __init__(self, mailbox: Any, rank: int) -> None:
        self._mailbox, self._rank = mailbox, rank
        self._next_beat = 0.0
        self._doing = ""

    def beat(self, step: int, doing: str) -> None:
        now = time.monotonic()
        if now >= self._next_beat or doing != self._doing:
            self._next_beat, self._doing = now + BEAT_SECONDS, doing
            self._mailbox.beat.remote(self._rank, step, doing)

    def say(self, text: str) -> None:
        self._mailbox.say.remote(text)

    def progress(self, step: int, note: str) -> None:
        self._mailbox.progress.remote(step, note)


class Watch:
    """The driver's end: a thread while the block runs."""

    def __init__(self, mailbox: Any, *, name: str, steps: int, silent_s: float) -> None:
        self._mailbox, self._silent_s = mailbox, silent_s
        self._name, self._steps = name, steps
        self._bar: Progress | None = None
        self._shown = 0
        self._named: dict[int, Beat] = {}
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="watch")

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join(timeout=10)
        if self._bar is not None:
            self._bar.__exit__(None, None, None)

    def _watch(self) -> None:
        while True:
            last = self._stopped.wait(POLL_SECONDS)
            try:
                self._show(ray.get(self._mailbox.news.remote(), timeout=10))
            except Exception:  # the cluster is busy or going down; the training itself will say what is wrong
                if last:
                    return
                continue
            if last:
                return

    def _show(self, news: News) -> None:
        for text in news.said:
            Progress.write(text)
        if news.step is not None:
            if self._bar is None or news.step < self._shown:  # the workers went back to a checkpoint
                self._bar = Progress(self._name, total=self._steps, unit="step", initial=news.step)
            else:
                self._bar.advance(news.step - self._shown, news.note)
            self._shown = news.step
        for text in silent_workers(news, self._silent_s, self._named):
            Progress.write(text)


def silent_workers(news: News, silent_s: float, named: dict[int, Beat]) -> list[str]:
    """A line for each worker that has been where it is for longer than `silent_s`; `named` remembers who was named."""
    lines = []
    for rank, beat in sorted(news.beats.items()):
        if news.now - beat.at > silent_s and named.get(rank) != beat:
            named[rank] = beat
            lines.append(
                f"worker {rank} has been {beat.doing} at step {beat.step} for {news.now - beat.at:.0f} s; the others:"
                f" {', '.join(f'{r} {b.doing} at {b.step}' for r, b in sorted(news.beats.items()) if r != rank) or 'none'}"
            )
    return lines
