"""What the driver of a sweep knows of its trials, kept so that the next start knows it too; and what it shows of them."""

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from ray.tune import Callback

from pipeline.data import storage
from pipeline.tracking.settings import TrackingSettings
from pipeline.tracking.tracker import Tracker
from pipeline.training import run_folder
from pipeline.training.run_folder import RESULT
from pipeline.tuning.curves import ENDED, TrialSettings, costs_per_second, read_curve, runs_folder
from pipeline.tuning.factors import point_text
from pipeline.tuning.records import STATUSES, Status, TrialRecord, record_of, write_records
from pipeline.tuning.sweep import Trial

LINE_SECONDS = 30.0  # between two lines of a job's log
RECORDS = "records.json"
MLFLOW_STATUS = {"finished": "FINISHED", "pruned": "KILLED", "failed": "FAILED", "interrupted": "KILLED"}


class Ledger:
    """The records of all trials, by trial id. One process has it."""

    def __init__(self, settings: TrialSettings) -> None:
        self.settings = settings
        self._path = storage.join(settings.folder, "trials")
        self.records: dict[str, TrialRecord] = {}
        for record in self._read():
            status: Status = "interrupted" if record.status == "running" else record.status
            self.records[record.id] = replace(record, status=status)
        self.untold: set[str] = set()  # trials that have ended and whose MLflow run has not been told yet

    def ordered(self) -> list[TrialRecord]:
        return sorted(self.records.values(), key=lambda record: record.number)

    def begin(self, trial: Trial) -> None:
        known = self.records.get(trial.id)
        if known is None:
            number = len(self.records) + 1
            known = TrialRecord(
                id=trial.id, number=number, phase=trial.phase, point=trial.point, seed=trial.seed, status="running"
            )
        elif known.status in ENDED:
            return
        self._keep(replace(known, status="running", reason=""))

    def settle(self, trial: Trial, failed: bool) -> TrialRecord:
        """What an ended trial came to. Asking again changes nothing."""
        if trial.id not in self.records:
            self.begin(trial)  # its process never started
        known = self.records[trial.id]
        if known.status in ENDED:
            return known
        record = self._with_results(known, trial)
        if failed:
            reason = read_curve(self.settings.folder, trial).error or "its process ended"
            record = replace(record, status="failed", reason=reason)
        elif record.status != "finished":
            record = replace(record, status="pruned", rung=len(record.curve))
        self.untold.add(record.id)
        return self._keep(record)

    def refresh(self, trial: Trial) -> TrialRecord:
        """With what a running trial has come to so far."""
        known = self.records[trial.id]
        return known if known.status in ENDED else self._keep(self._with_curve(known, trial))

    def interrupt(self) -> list[TrialRecord]:
        """Trials that were running and no longer are; they continue at the next start."""
        running = [record for record in self.records.values() if record.status == "running"]
        return [self._keep(replace(record, status="interrupted")) for record in running]

    def tell_mlflow(self) -> None:
        """How trials ended, as tags of their runs; what cannot be told yet is tried again the next time."""
        for trial_id in sorted(self.untold):
            record = self.records[trial_id]
            run = storage.join(runs_folder(self.settings.folder), trial_id)
            key = run_folder.key_of(run)
            if key is None:
                self.untold.discard(trial_id)  # it ended before it was a run
                continue
            try:
                self._keep(replace(record, run_id=self._close_run(run, key, record)))
            except (RuntimeError, OSError):  # its last process is still ending
                continue
            self.untold.discard(trial_id)

    def _close_run(self, run: str, key: str, record: TrialRecord) -> str | None:
        tracking = TrackingSettings.resolve(
            self.settings.folder,
            experiment=self.settings.sweep.base.get("tracking", {}).get("experiment", "dfine"),
            run_name=record.id,
            uri=self.settings.tracking_uri,
            run_key=key,
            parent_run_id=self.settings.parent_run_id,
        )
        with Tracker(run_folder.queue_folder(run, key), tracking) as tracker:
            told = {"status": record.status, "rung": record.rung, "reason": record.reason, **record.cost}
            tracker.tags({f"trial.{name}": str(value) for name, value in told.items() if value not in (None, "")})
            tracker.finish(MLFLOW_STATUS[record.status])  # type: ignore[arg-type]
            return tracker.wait_for_run_id(timeout=10)

    def write(self) -> str:
        """All records in one file."""
        path = storage.join(self.settings.folder, RECORDS)
        write_records(path, self.ordered())
        return path

    def _with_curve(self, record: TrialRecord, trial: Trial) -> TrialRecord:
        curve = read_curve(self.settings.folder, trial)
        cost = {name: curve.seconds * rate for name, rate in costs_per_second(self.settings.cluster).items()}
        return replace(record, curve=curve.readings, cost=cost)

    def _with_results(self, record: TrialRecord, trial: Trial) -> TrialRecord:
        record = self._with_curve(record, trial)
        run = storage.join(runs_folder(self.settings.folder), trial.id)
        before = _json(storage.join(run, "evaluation/step-00000000/report.json"))
        if before is not None:
            record = replace(record, ap_before_training=before["numbers"]["AP"])
        result = _json(storage.join(run, RESULT))
        if result is None:
            return record
        numbers = result["numbers"] or {}
        return replace(record, status="finished", final=numbers, latency_ms=result.get("latency_ms"))

    def _keep(self, record: TrialRecord) -> TrialRecord:
        self.records[record.id] = record
        storage.write_atomic(storage.join(self._path, f"{record.id}.json"), json.dumps(asdict(record)).encode())
        return record

    def _read(self) -> list[TrialRecord]:
        names = sorted(name for name in storage.sizes(self._path) if name.endswith(".json"))
        return [record_of(json.loads(storage.read_bytes(storage.join(self._path, name)))) for name in names]


class Watcher(Callback):
    """Tune's events to the ledger and to the console."""

    def __init__(self, ledger: Ledger, total: str) -> None:
        self._ledger, self._total = ledger, total
        self._shown_at, self._lines = 0.0, 0
        self._began_at = time.time()

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._ledger.begin(_ours(trial))
        self._show()

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: Any, **info: Any) -> None:
        self._ledger.refresh(_ours(trial))
        self._show()

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._ledger.settle(_ours(trial), failed=False)
        self._ledger.tell_mlflow()
        self._show(now=True)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        record = self._ledger.settle(_ours(trial), failed=True)
        print(f"{record.id} failed: {record.reason}; see logs/{record.id}.log", flush=True)
        self._ledger.tell_mlflow()
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


def _json(path: str) -> dict[str, Any] | None:
    content: dict[str, Any] | None = json.loads(storage.read_bytes(path)) if storage.exists(path) else None
    return content
