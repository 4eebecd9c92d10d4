"""Exchange between a sweep's driver and its trials: settings go to a trial, evaluations and errors come back as files.

This module imports neither torch nor Ray, so that the process of a trial with nothing to train starts in no time.
"""

import json
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from pipeline import storage
from pipeline.config import Cluster
from pipeline.tuning.sweep import Sweep, Trial
from pipeline.tuning.trial_log import console_to_log, log_uri
from pipeline.tuning.trial_records import TrialEvaluation

EVALUATION = "evaluation"  # key under which Tune's schedulers find the number of evaluations


@dataclass(frozen=True)
class TrialSettings:
    """Settings that all trials of a sweep share; plain data."""

    sweep: Sweep
    folder: str  # the sweep's folder or URI
    cluster: Cluster  # resources of one trial
    tracking_uri: str = field(repr=False)  # may hold a password, so the experiment does not contain it
    parent_run_id: str | None


@dataclass(frozen=True)
class TrialProgress:
    """Progress of a trial, written by its own process."""

    evaluations: tuple[TrialEvaluation, ...] = ()
    seconds: float = 0.0  # spent in all starts
    error: str = ""  # of its own, which ended it


def record_failure(config: dict[str, Any], work: Callable[..., None], settings: TrialSettings) -> None:
    """Run a trial, and note an error of its own for the driver.

    Tune never sees that error: whatever it sees is the loss of a process, and worth another attempt.
    """
    try:
        work(config, settings=settings)
    except Exception as error:  # noqa: BLE001 - whatever it is, it is the trial's own
        trial = Trial(**config["trial"])
        message = str(error).strip().splitlines() or [""]
        reason = f"{type(error).__name__}: {message[0]}"
        with console_to_log(log_uri(settings.folder, trial.id)):
            traceback.print_exc()
        write_progress(settings.folder, trial, replace(read_progress(settings.folder, trial), error=reason[:500]))


def costs_per_second(cluster: Cluster) -> dict[str, float]:
    """Cost of one second of a trial: GPU-seconds if it has GPUs, otherwise CPU-seconds."""
    workers = cluster.workers if isinstance(cluster.workers, int) else 1
    if cluster.gpus_per_worker:
        return {"gpu_s": workers * cluster.gpus_per_worker}
    return {"cpu_s": workers * cluster.cpus_per_worker}


def runs_folder(folder: str) -> str:
    """Folder of the trials' own run folders."""
    return storage.join(folder, "runs")


def read_progress(folder: str, trial: Trial) -> TrialProgress:
    """Read the progress of a trial; empty if it has not begun."""
    path = _progress_path(folder, trial)
    if not storage.exists(path):
        return TrialProgress()
    content: Mapping[str, Any] = storage.read_json(path, "evaluations", "seconds")
    evaluations = tuple(TrialEvaluation(**evaluation) for evaluation in content["evaluations"])
    return TrialProgress(evaluations, content["seconds"], content.get("error", ""))


def write_progress(folder: str, trial: Trial, progress: TrialProgress) -> None:
    """Replace the progress file of a trial."""
    storage.write_atomic(_progress_path(folder, trial), json.dumps(asdict(progress), indent=1).encode())


def _progress_path(folder: str, trial: Trial) -> str:
    return storage.join(folder, f"curves/{trial.id}.json")
