"""SIGTERM, which `ray job stop` sends three seconds before SIGKILL: the runs end as KILLED, then the training is interrupted."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from pipeline.tracking.tracker import LIMIT_AFTER_INTERRUPT_S, Tracker

_open: list[Tracker] = []  # a chain's, and that of its present stage


@contextmanager
def sigterm_kills(tracker: Tracker) -> Iterator[None]:
    """While the block runs, SIGTERM marks the tracker's run as KILLED, and raises KeyboardInterrupt in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _open.append(tracker)
    before = signal.getsignal(signal.SIGINT), signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before[0])  # Ray Train leaves a handler that swallows Ctrl-C
        signal.signal(signal.SIGTERM, before[1])
        _open.remove(tracker)


def note_killed() -> threading.Thread:
    """Mark the open runs as KILLED, in a thread: a signal may have come in the middle of a transaction of the outbox."""
    ending = threading.Thread(target=_end_runs, daemon=True, name="SIGTERM")
    ending.start()
    return ending


def _interrupt(*_: object) -> NoReturn:
    note_killed().join(LIMIT_AFTER_INTERRUPT_S)
    raise KeyboardInterrupt


def _end_runs() -> None:
    trackers = list(_open)
    for tracker in trackers:
        tracker.finish("KILLED")
    for tracker in trackers:
        tracker.flush(LIMIT_AFTER_INTERRUPT_S)
