"""What the driver of a sweep knows of its trials, kept so that the next start knows it too."""

import json
from dataclasses import asdict, replace
from typing import Any

from pipeline import storage
from pipeline.training.run_dir import RESULT
from pipeline.tuning.curves import ENDED, TrialSettings, costs_per_second, read_curve, runs_folder
from pipeline.tuning.records import TrialRecord, record_of, write_records
from pipeline.tuning.sweep import Trial

RECORDS = "records.json"


class Ledger:
    """The records of all trials, by trial id. One process has it."""

    def __init__(self, settings: TrialSettings) -> None:
        self.settings = settings
        self._path = storage.join(settings.folder, "trials")
        self.records: dict[str, TrialRecord] = {}
        for record in self._read():
            self.records[record.id] = record if record.status in ENDED else self._left_by_an_earlier_start(record)

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
        if failed and record.status != "finished":  # a process may die of its own end
            reason = read_curve(self.settings.folder, trial).error or "its process ended"
            record = replace(record, status="failed", reason=reason)
        elif record.status != "finished":
            record = replace(record, status="pruned", rung=len(record.curve))
        return self._keep(record)

    def refresh(self, trial: Trial) -> TrialRecord:
        """With what a running trial has come to so far."""
        known = self.records[trial.id]
        return known if known.status in ENDED else self._keep(self._with_curve(known, trial))

    def interrupt(self) -> list[TrialRecord]:
        """Trials that were running and no longer are; they continue at the next start."""
        running = [record for record in self.records.values() if record.status == "running"]
        return [self._keep(replace(record, status="interrupted")) for record in running]

    def told(self, trial_id: str, run_id: str) -> None:
        """MLflow knows how this trial ended."""
        self._keep(replace(self.records[trial_id], run_id=run_id))

    def write(self) -> str:
        """All records in one file."""
        path = storage.join(self.settings.folder, RECORDS)
        write_records(path, self.ordered())
        return path

    def _left_by_an_earlier_start(self, record: TrialRecord) -> TrialRecord:
        """Interrupted, unless its training came to its end and nobody was there to note it."""
        trial = Trial(0, record.phase, record.point, record.seed)
        known = self._with_results(replace(record, status="interrupted"), trial)
        return self._keep(known) if known.status == "finished" else known

    def _with_curve(self, record: TrialRecord, trial: Trial) -> TrialRecord:
        curve = read_curve(self.settings.folder, trial)
        cost = {name: curve.seconds * rate for name, rate in costs_per_second(self.settings.cluster).items()}
        return replace(record, curve=curve.readings, cost=cost)

    def _with_results(self, record: TrialRecord, trial: Trial) -> TrialRecord:
        record = self._with_curve(record, trial)
        run = storage.join(runs_folder(self.settings.folder), trial.id)
        before = _json(storage.join(run, "evaluation", "step-00000000", "report.json"))
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
        return [record_of(storage.read_json(storage.join(self._path, name))) for name in names]


def _json(path: str) -> dict[str, Any] | None:
    content: dict[str, Any] | None = storage.read_json(path) if storage.exists(path) else None
    return content
