"""Reactions to Tune's events: records, the console, and the final status of each trial in MLflow."""

import logging
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

from ray.tune import Callback

from pipeline import storage
from pipeline.tracking.settings import TrackingSettings
from pipeline.tracking.tracker import Tracker
from pipeline.training import run_dir
from pipeline.tuning.analysis.factors import point_text
from pipeline.tuning.sweep import Trial, tracking_of
from pipeline.tuning.trial_files import TrialSettings, runs_folder
from pipeline.tuning.trial_log import log_uri
from pipeline.tuning.trial_records import ENDED, STATUSES, TrialRecord
from pipeline.tuning.trial_store import TrialStore
from pipeline.wording import plural

LOG_INTERVAL_S = 30.0  # between two lines of a job's log
RETRY_S = 5.0  # between two attempts for a trial whose last process is still ending
DELIVERY_TIMEOUT_S = 10.0  # per trial
MLFLOW_STATUS = {"finished": "FINISHED", "pruned": "KILLED", "failed": "FAILED"}

logger = logging.getLogger(__name__)


# MLflow


class TrialStatusReporter:
    """Background thread that writes each trial's final status to MLflow, so that a slow server never blocks a trial.

    Trials of an earlier start whose status is not in MLflow yet are reported too.
    """

    def __init__(self, store: TrialStore) -> None:
        self._store = store
        self._pending = {r.id for r in store.records.values() if r.status in ENDED and not r.run_id}
        self._changed = threading.Condition()
        self._stopped = False
        self._thread = threading.Thread(target=self._work, name="trial status reporter", daemon=True)
        self._thread.start()

    def submit(self, trial_id: str) -> None:
        """Queue the status of an ended trial, and return at once."""
        with self._changed:
            self._pending.add(trial_id)
            self._changed.notify_all()

    def drain(self, timeout: float) -> int:
        """Wait at most `timeout` seconds for queued trials, stop, and return the number of trials that are left."""
        with self._changed:
            self._changed.wait_for(lambda: not self._pending, timeout)
            self._stopped = True
            self._changed.notify_all()
            left = len(self._pending)
        if left:
            logger.warning(
                "the final status of %s is not in MLflow yet; the next start of the sweep writes it",
                plural(left, "trial"),
            )
        return left

    def _work(self) -> None:
        attempted_at: dict[str, float] = {}
        while True:
            # Wait for a trial that is new, or whose last attempt was long enough ago.
            with self._changed:
                self._changed.wait_for(lambda: self._stopped or _due(self._pending, attempted_at) is not None, RETRY_S)
                trial_id = _due(self._pending, attempted_at)
                if self._stopped:
                    return
            if trial_id is None:
                continue
            # The lock is not held here: the server may be slow.
            attempted_at[trial_id] = time.monotonic()
            if _report_status(self._store, trial_id):
                with self._changed:
                    self._pending.discard(trial_id)
                    self._changed.notify_all()


def _due(pending: set[str], attempted_at: dict[str, float]) -> str | None:
    now = time.monotonic()
    return next((name for name in sorted(pending) if now - attempted_at.get(name, -RETRY_S) >= RETRY_S), None)


def _report_status(store: TrialStore, trial_id: str) -> bool:
    """Write the status of a trial to MLflow; False if it must be tried again."""
    run = storage.join(runs_folder(store.settings.folder), trial_id)
    try:
        key = run_dir.key_of(run)
        if key is None:
            return True  # it ended before its training began
        run_id = _close_run(store.settings, run, key, store.records[trial_id])
    except (RuntimeError, OSError, ValueError):  # its last process is still ending, or left an incomplete file
        return False
    if run_id is not None:
        store.set_run_id(trial_id, run_id)
    return run_id is not None


def _close_run(settings: TrialSettings, run: str, key: str, record: TrialRecord) -> str | None:
    tracking = TrackingSettings.resolve(
        settings.folder,
        experiment=tracking_of(settings.sweep).experiment,
        run_name=record.id,
        uri=settings.tracking_uri,
        run_key=key,
        parent_run_id=settings.parent_run_id,
    )
    tracker = Tracker(run_dir.outbox_folder(run, key), tracking)
    try:
        facts: dict[str, Any] = {"status": record.status, "rung": record.rung, **record.cost}
        if record.reason or record.restarts:  # an empty one replaces that of an earlier start
            facts |= {"reason": record.reason, "restarts": record.restarts}
        tracker.tags({f"trial.{name}": str(value) for name, value in facts.items() if value is not None})
        tracker.finish(MLFLOW_STATUS[record.status])  # type: ignore[arg-type]
        return tracker.run_id if tracker.flush(DELIVERY_TIMEOUT_S) else None
    finally:
        tracker.stop()


# Records and console


class ProgressCallback(Callback):
    """Callback that keeps the records up to date and shows them. It runs in Tune's loop, so nothing in it blocks."""

    def __init__(self, store: TrialStore, reporter: TrialStatusReporter, total: str) -> None:
        self._store, self._reporter, self._total = store, reporter, total
        self._ended_before = {
            record.id for record in store.ordered() if record.status in ENDED
        }  # ids from earlier starts
        self._shown_at, self._lines = 0.0, 0
        self._began_at = time.time()

    def __getstate__(self) -> dict[str, Any]:
        """Empty: Tune pickles its callbacks, but a sweep continues from its own files."""
        return {}

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Mark the trial as running."""
        self._store.begin(_trial_of(trial))
        self._show()

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: Any, **info: Any) -> None:
        """Update the record of the trial."""
        self._store.refresh(_trial_of(trial))
        self._show()

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Record the end of the trial, which may be an error of its own."""
        self._end(self._store.finish(_trial_of(trial), failed=False))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Record that Tune gave the trial up."""
        self._end(self._store.finish(_trial_of(trial), failed=True))

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Count and print the loss of the trial's process; another one continues the trial."""
        record = self._store.note_restart(_trial_of(trial))
        _print(f"{record.id}: its process was killed; it continues from its last checkpoint")

    def _end(self, record: TrialRecord) -> None:
        if record.id in self._ended_before:
            return
        if record.status == "failed":
            _print(f"{record.id} failed: {record.reason}; see {log_uri(self._store.settings.folder, record.id)}")
        self._reporter.submit(record.id)
        self._show(now=True)

    def _show(self, now: bool = False) -> None:
        """Redraw the table in a terminal; print a line from time to time in a log."""
        if not now and time.time() - self._shown_at < (1.0 if sys.stdout.isatty() else LOG_INTERVAL_S):
            return
        self._shown_at = time.time()
        records, metric = self._store.ordered(), self._store.settings.sweep.metric
        summary = summary_line(records, metric, self._total, time.time() - self._began_at)
        if not sys.stdout.isatty():
            _print(summary)
            return
        lines = [*trial_lines(records, metric), summary]
        _print("\x1b[A\x1b[2K" * self._lines + "\n".join(lines))  # go up, and clear the lines of the last table
        self._lines = len(lines)


def trial_lines(records: Sequence[TrialRecord], metric: str, most: int = 12) -> list[str]:
    """Lines of the running trials, and of those that ended last."""
    running = [record for record in records if record.status == "running"]
    rest = [record for record in records if record.status != "running"]
    chosen = sorted([*running, *rest[-(most - len(running)) :]], key=lambda record: record.number)[-most:]
    return [
        f"{record.number:4} {record.phase:9} {record.status:11} {_metric_text(record, metric):>8} {record.cost_s:7.0f} s "
        f" {point_text(record.point)}"[:118]
        for record in chosen
    ]


def summary_line(records: Sequence[TrialRecord], metric: str, total: str, seconds: float) -> str:
    """Number of trials by status, time, and range of the metric."""
    counts = ", ".join(f"{n} {status}" for status in STATUSES if (n := sum(r.status == status for r in records)))
    values = [value for record in records if (value := _latest(record, metric)) is not None]
    span = f"; {metric} so far {min(values):.3f} to {max(values):.3f}" if values else ""
    return f"{counts or 'no trial yet'} of {total}, {seconds / 60:.0f} min{span}"


def _metric_text(record: TrialRecord, metric: str) -> str:
    value = _latest(record, metric)
    return "" if value is None else f"{value:.4f}"


def _latest(record: TrialRecord, metric: str) -> float | None:
    """Final value of a finished trial, otherwise the value of its last evaluation."""
    return record.result(metric) if record.status == "finished" else record.at(len(record.curve), metric)


def _trial_of(tune_trial: Any) -> Trial:
    return Trial(**tune_trial.config["trial"])


def _print(text: str) -> None:
    print(text, flush=True)
