"""Progress of long commands: a bar in a terminal, a line every few seconds in a log."""

import sys
import time
from types import TracebackType
from typing import Self

from tqdm import tqdm

LOG_SECONDS = 10.0  # interval between two lines in a log
TRAINING_LOG_SECONDS = 30.0  # between two lines of a training's log; a training takes hours


class Progress:
    """Count items, and show their rate and the remaining time on stderr.

    Args:
        initial: items that existed before; they count as done, but not towards the rate.
        delay: seconds before anything is shown, so that short work stays silent.
        log_seconds: interval between two lines in a log.
    """

    def __init__(
        self,
        name: str,
        *,
        total: int,
        unit: str,
        initial: int = 0,
        delay: float = 0.0,
        log_seconds: float = LOG_SECONDS,
    ) -> None:
        self._name, self._total, self._unit, self._initial = name, total, unit, initial
        self._done, self._note = initial, ""
        self._started_at = time.monotonic()
        self._log_seconds = log_seconds
        self._next_line_at = self._started_at + max(delay, log_seconds)
        self._silent = delay > 0  # until the first line
        self._bar = tqdm(
            desc=name,
            total=total,
            initial=initial,
            unit=unit,
            unit_scale=unit == "B",
            delay=delay,
            disable=None,  # no bar in a log
        )

    @property
    def seconds(self) -> float:
        """Time since the start."""
        return time.monotonic() - self._started_at

    def advance(self, count: int, note: str = "") -> None:
        """Count `count` more items as done; `note` is appended to the line."""
        self._done += count
        self._note = note
        self._bar.set_postfix_str(note, refresh=False)
        self._bar.update(count)
        if self._bar.disable and time.monotonic() >= self._next_line_at:
            self._print_line()

    def begin(self, note: str) -> None:
        """Show the first line at once: its work has begun before."""
        self._note = note
        self._bar.set_postfix_str(note)
        if self._bar.disable:
            self._print_line()

    @staticmethod
    def write(text: str) -> None:
        """Print a line without disturbing the bar."""
        tqdm.write(text, file=sys.stderr)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
        if self._bar.disable and not self._silent:
            self._print_line()

    def _print_line(self) -> None:
        self._next_line_at = time.monotonic() + self._log_seconds
        self._silent = False
        line = tqdm.format_meter(
            self._done,
            self._total,
            self.seconds,
            prefix=self._name,
            unit=self._unit,
            unit_scale=self._unit == "B",
            initial=self._initial,
            postfix=self._note,
            bar_format="{desc}: {n_fmt}/{total_fmt}, {percentage:.0f}%, {rate_fmt}, {elapsed} elapsed, {remaining} left{postfix}",
        )
        sys.stderr.write(f"{line}\n")
        sys.stderr.flush()


class StepProgress:
    """Progress of a training: it is told the step reached, which falls where the training rewinds to a checkpoint.

    Args:
        total: steps of the training.
    """

    def __init__(self, name: str, *, total: int) -> None:
        self._name, self._total = name, total
        self._bar: Progress | None = None
        self.step = 0  # last one shown

    def show(self, step: int, note: str) -> None:
        """Show that `step` steps are done; nothing is drawn before the first call."""
        if self._bar is None or step < self.step:
            self._bar = Progress(
                self._name, total=self._total, unit="step", initial=step, log_seconds=TRAINING_LOG_SECONDS
            )
            self._bar.begin(note)
        else:
            self._bar.advance(step - self.step, note)
        self.step = step

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.__exit__(None, None, None)
