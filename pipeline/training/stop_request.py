"""Stop signals: the first one asks a training to save after its step and end, a second one interrupts it."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType
from typing import Literal

from pipeline.errors import UserError
from pipeline.training.sigterm import note_killed

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
ACKNOWLEDGED = b"\nstopping after this step, with a checkpoint; a second Ctrl-C ends at once\n"


class TrainingStoppedError(UserError):
    """The training was stopped by a signal; its checkpoint is whole."""

    exit_code = 130  # as shells have it after Ctrl-C


@dataclass
class StopRequest:
    """Request that the training ends after its step; a signal handler or a thread makes it, the loop on rank 0 sees it."""

    made: bool = False
    heeded: bool = False  # the loop is among its steps, and will see a request


@contextmanager
def stop_signals(ask: Callable[[], bool]) -> Iterator[None]:
    """Ask for a stop at the first Ctrl-C or SIGTERM while the block runs; handle a second one as before the block.

    A signal that is ignored stays so. Outside of the main thread nothing changes.

    Args:
        ask: asks the training to end after its step; called by the signal handler. False: it could not end in this way, so the
            first signal is handled as the second.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: handler for number in STOP_SIGNALS if (handler := signal.getsignal(number)) != signal.SIG_IGN}
    asked = False

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if not asked and ask():
            asked = True
            with suppress(OSError):  # the terminal is gone
                os.write(2, ACKNOWLEDGED)  # `print` is not reentrant
            if number == signal.SIGTERM:
                note_killed()  # now: SIGKILL may follow before the step ends
            return
        handler = before[signal.Signals(number)]
        if callable(handler):
            handler(number, frame)
        raise KeyboardInterrupt

    for number in before:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def status_after(error: BaseException) -> Literal["FAILED", "KILLED"]:
    """Status in MLflow of a run that this error has ended."""
    failed = isinstance(error, Exception) and not isinstance(error, TrainingStoppedError)
    return "FAILED" if failed else "KILLED"
