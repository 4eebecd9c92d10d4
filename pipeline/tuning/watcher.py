"""Tune's events to the ledger, to MLflow and to the console."""

import sys
import time
from collections.abc import Sequence
from typing import Any

from ray.tune import Callback

from pipeline.tuning.analysis.factors import point_text
from pipeline.tuning.callbacks import Closing
from pipeline.tuning.curves import ENDED
from pipeline.tuning.records import STATUSES, TrialRecord
from pipeline.tuning.sweep import Trial
from pipeline.tuning.trial_store import Ledger

LINE_SECONDS = 30.0  # between two lines of a job's log


class Watcher(Callback):
    """Called by Tune in its loop, so nothing here waits for anything."""

    def __init__(self, ledger: Ledger, closing: Closing, total: str) -> None:
        self._ledger, self._closing, self._total = ledger, closing, total
        self._before = {record.id for record in ledger.ordered() if record.status in ENDED}  # in earlier starts
        self._shown_at, self._lines = 0.0, 0
        self._began_at = time.time()

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune writes down everything that it is given, and a sweep goes on from its own files."""
        return {}

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._ledger.begin(_ours(trial))
        self._show()

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: Any, **info: Any) -> None:
        self._ledger.refresh(_ours(trial))
        self._show()

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._end(self._ledger.settle(_ours(trial), failed=False))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        record = self._ledger.settle(_ours(trial), failed=True)
        print(f"{record.id} failed: {record.reason}; see logs/{record.id}.log", flush=True)
        self._end(record)

    def _end(self, record: TrialRecord) -> None:
        if record.id not in self._before:
            self._closing.tell(record.id)
            self._show(now=True)

    def _show(self, now: bool = False) -> None:
        """In a terminal the whole table in its place; in a log a line now and then."""
        if not now and time.time() - self._shown_at < (1.0 if sys.stdout.isatty() else LINE_SECONDS):
            return
        self._shown_at = time.time()
        records, metric = self._ledger.ordered(), self._ledger.settings.sweep.metric
        line = summary(records, metric, self._total, time.time() - self._began_at)
        if not sys.stdout.isatty():
            print(line, flush=True)
            return
        shown = [*table(records, metric), line]
        print("\x1b[A\x1b[2K" * self._lines + "\n".join(shown), flush=True)
        self._lines = len(shown)


def table(records: Sequence[TrialRecord], metric: str, most: int = 12) -> list[str]:
    """The trials that run, and those that ended last."""
    running = [record for record in records if record.status == "running"]
    rest = [record for record in records if record.status != "running"]
    chosen = sorted([*running, *rest[-(most - len(running)) :]], key=lambda record: record.number)[-most:]
    return [
        f"{record.number:4} {record.phase:9} {record.status:11} {_value(record, metric):>8} {record.cost_s:7.0f} s "
        f" {point_text(record.point)}"[:118]
        for record in chosen
    ]


def summary(records: Sequence[TrialRecord], metric: str, total: str, seconds: float) -> str:
    counts = ", ".join(f"{n} {status}" for status in STATUSES if (n := sum(r.status == status for r in records)))
    values = [reading for record in records if (reading := _best(record, metric)) is not None]
    seen = f"; {metric} so far {min(values):.3f} to {max(values):.3f}" if values else ""
    return f"{counts or 'no trial yet'} of {total}, {seconds / 60:.0f} min{seen}"


def _value(record: TrialRecord, metric: str) -> str:
    value = _best(record, metric)
    return "" if value is None else f"{value:.4f}"


def _best(record: TrialRecord, metric: str) -> float | None:
    """The end's, or the last evaluation's."""
    return record.result(metric) if record.status == "finished" else record.at(len(record.curve), metric)


def _ours(trial: Any) -> Trial:
    return Trial(**trial.config["trial"])
