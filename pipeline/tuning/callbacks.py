"""How trials ended, told to their MLflow runs by a thread: a server that hangs holds no trial up."""

import logging
import threading
import time

from pipeline import storage
from pipeline.tracking.settings import TrackingSettings
from pipeline.tracking.tracker import Tracker
from pipeline.training import run_dir
from pipeline.tuning.curves import ENDED, TrialSettings, runs_folder
from pipeline.tuning.records import TrialRecord
from pipeline.tuning.sweep import tracking_of
from pipeline.tuning.trial_store import Ledger

AGAIN_S = 5.0  # between two looks at trials whose last process is still ending
DELIVERED_WITHIN_S = 10.0  # to a server that answers
MLFLOW_STATUS = {"finished": "FINISHED", "pruned": "KILLED", "failed": "FAILED"}

logger = logging.getLogger(__name__)


class Closing:
    """The thread. Trials of an earlier start that were not told then are told now."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._untold = {record.id for record in ledger.records.values() if record.status in ENDED and not record.run_id}
        self._changed = threading.Condition()
        self._stopped = False
        self._thread = threading.Thread(target=self._work, name="closing", daemon=True)
        self._thread.start()

    def tell(self, trial_id: str) -> None:
        """Soon: this returns at once."""
        with self._changed:
            self._untold.add(trial_id)
            self._changed.notify_all()

    def finish(self, timeout: float) -> int:
        """Wait for those that are left, at most `timeout` seconds; the number of those that still are."""
        with self._changed:
            self._changed.wait_for(lambda: not self._untold, timeout)
            self._stopped = True
            self._changed.notify_all()
            left = len(self._untold)
        if left:
            logger.warning("MLflow was not told how %d trial(s) ended; the next start of the sweep tells it", left)
        return left

    def _work(self) -> None:
        tried: dict[str, float] = {}
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._stopped or _due(self._untold, tried) is not None, AGAIN_S)
                trial_id = _due(self._untold, tried)
                if self._stopped:
                    return
            if trial_id is None:
                continue
            tried[trial_id] = time.monotonic()
            if _told(self._ledger, trial_id):
                with self._changed:
                    self._untold.discard(trial_id)
                    self._changed.notify_all()


def _due(untold: set[str], tried: dict[str, float]) -> str | None:
    now = time.monotonic()
    return next((name for name in sorted(untold) if now - tried.get(name, -AGAIN_S) >= AGAIN_S), None)


def _told(ledger: Ledger, trial_id: str) -> bool:
    """Whether nothing is left to tell of this trial."""
    run = storage.join(runs_folder(ledger.settings.folder), trial_id)
    try:
        key = run_dir.key_of(run)
        if key is None:
            return True  # it ended before it was a run
        run_id = _close_run(ledger.settings, run, key, ledger.records[trial_id])
    except (RuntimeError, OSError, ValueError):  # its last process is still ending, or has left half a file
        return False
    if run_id is not None:
        ledger.told(trial_id, run_id)
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
    with Tracker(run_dir.outbox_folder(run, key), tracking) as tracker:
        told = {"status": record.status, "rung": record.rung, "reason": record.reason, **record.cost}
        tracker.tags({f"trial.{name}": str(value) for name, value in told.items() if value not in (None, "")})
        tracker.finish(MLFLOW_STATUS[record.status])  # type: ignore[arg-type]
        return tracker.run_id if tracker.flush(DELIVERED_WITHIN_S) else None
