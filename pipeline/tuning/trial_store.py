"""The driver's records of its trials, one file per trial, so that the next start of the sweep knows them too."""

import json
from dataclasses import asdict, replace
from typing import Any

from pipeline import storage
from pipeline.training.run_dir import RESULT
from pipeline.tuning.sweep import Trial
from pipeline.tuning.trial_files import TrialSettings, costs_per_second, read_progress, runs_folder
from pipeline.tuning.trial_records import ENDED, TrialRecord, record_of, write_records

RECORDS = "records.json"
LOST = "its process was lost, as by a lack of memory or a dead node; the next start of the sweep continues it"


class TrialStore:
    """The records of all trials by trial id. Only the driver of the sweep holds one."""

    def __init__(self, settings: TrialSettings) -> None:
        self.settings = settings
        self._path = storage.join(settings.folder, "trials")
        self.records: dict[str, TrialRecord] = {}
        for record in self._read():
            ended = record.status in ENDED and not record.lost
            self.records[record.id] = record if ended else self._left_by_an_earlier_start(record)

    def ordered(self) -> list[TrialRecord]:
        """All records, in the order in which the trials began."""
        return sorted(self.records.values(), key=lambda record: record.number)

    def begin(self, trial: Trial) -> None:
        """Mark a trial as running, unless it ended in an earlier start."""
        known = self.records.get(trial.id)
        if known is None:
            number = len(self.records) + 1
            known = TrialRecord(
                id=trial.id, number=number, phase=trial.phase, point=trial.point, seed=trial.seed, status="running"
            )
        elif known.status in ENDED:
            return
        self._keep(replace(known, status="running", reason=""))

    def note_restart(self, trial: Trial) -> TrialRecord:
        """Count the loss of a process of a trial that goes on in another."""
        known = self.records[trial.id]
        return self._keep(replace(known, restarts=known.restarts + 1))

    def finish(self, trial: Trial, failed: bool) -> TrialRecord:
        """Record how a trial ended. Idempotent.

        Args:
            failed: Tune has lost the trial's process, and gave up.
        """
        if trial.id not in self.records:
            self.begin(trial)  # its process never started
        known = self.records[trial.id]
        if known.status in ENDED:
            return known
        # A training with a result is finished, whatever happened to its process afterwards.
        record = self._with_results(known, trial)
        if record.status == "finished":
            return self._keep(record)
        if error := read_progress(self.settings.folder, trial).error:
            return self._keep(replace(record, status="failed", reason=error))
        if failed:
            return self._keep(replace(record, status="failed", reason=LOST, lost=True))
        return self._keep(replace(record, status="pruned", rung=len(record.curve)))

    def refresh(self, trial: Trial) -> TrialRecord:
        """Update the record of a running trial with its evaluations so far."""
        known = self.records[trial.id]
        return known if known.status in ENDED else self._keep(self._with_progress(known, trial))

    def interrupt(self) -> list[TrialRecord]:
        """Mark running trials as interrupted; they continue at the next start."""
        running = [record for record in self.records.values() if record.status == "running"]
        return [self._keep(replace(record, status="interrupted")) for record in running]

    def set_run_id(self, trial_id: str, run_id: str) -> None:
        """Note that MLflow has the final status of this trial."""
        self._keep(replace(self.records[trial_id], run_id=run_id))

    def write(self) -> str:
        """Write all records to one file, and return its path."""
        path = storage.join(self.settings.folder, RECORDS)
        write_records(path, self.ordered())
        return path

    def _left_by_an_earlier_start(self, record: TrialRecord) -> TrialRecord:
        """Interrupted, or ended if its training came to an end after the driver was gone."""
        trial = Trial(0, record.phase, record.point, record.seed)
        # MLflow may have the status of a lost trial, which another one replaces.
        record = replace(record, status="interrupted", reason="", lost=False, run_id=None)
        known = self._with_results(record, trial)
        if known.status != "finished" and (error := read_progress(self.settings.folder, trial).error):
            known = replace(known, status="failed", reason=error)
        return self._keep(known) if known.status in ENDED else known

    def _with_progress(self, record: TrialRecord, trial: Trial) -> TrialRecord:
        progress = read_progress(self.settings.folder, trial)
        cost = {name: progress.seconds * rate for name, rate in costs_per_second(self.settings.cluster).items()}
        return replace(record, curve=progress.evaluations, cost=cost)

    def _with_results(self, record: TrialRecord, trial: Trial) -> TrialRecord:
        record = self._with_progress(record, trial)
        run = storage.join(runs_folder(self.settings.folder), trial.id)
        before = _json_or_none(storage.join(run, "evaluation/step-00000000/report.json"))
        if before is not None:
            record = replace(record, ap_before_training=before["numbers"]["AP"])
        result = _json_or_none(storage.join(run, RESULT))
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


def _json_or_none(path: str) -> dict[str, Any] | None:
    content: dict[str, Any] | None = storage.read_json(path) if storage.exists(path) else None
    return content
