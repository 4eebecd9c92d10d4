"""What a trial and the driver of its sweep share: settings that go there, evaluations and reasons that come back as files.

Apart from the training itself, so that a process that has nothing to train starts in no time.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from pipeline import storage
from pipeline.config import Cluster
from pipeline.tuning.records import Reading
from pipeline.tuning.sweep import Sweep, Trial

EVALUATION = "evaluation"  # what Tune's schedulers count
ENDED = ("finished", "pruned", "failed")


@dataclass(frozen=True)
class TrialSettings:
    """The same for all trials of a sweep; plain data."""

    sweep: Sweep
    folder: str  # of the sweep
    cluster: Cluster  # of one trial
    tracking_uri: str = field(repr=False)  # not in the experiment either: it may hold a password
    parent_run_id: str | None


@dataclass(frozen=True)
class Curve:
    """What a trial has come to so far, as its own process keeps it."""

    readings: tuple[Reading, ...] = ()
    seconds: float = 0.0  # spent in all starts
    error: str = ""  # that ended it


def saying_why(config: dict[str, Any], work: Callable[..., None], settings: TrialSettings) -> None:
    """Keep the reason of a failure where the driver finds it."""
    try:
        work(config, settings=settings)
    except Exception as error:
        trial = Trial(**config["trial"])
        said = str(error).strip().splitlines() or [""]
        reason = f"{type(error).__name__}: {said[0]}"
        write_curve(settings.folder, trial, replace(read_curve(settings.folder, trial), error=reason[:500]))
        raise


def costs_per_second(cluster: Cluster) -> dict[str, float]:
    """What a second of a trial costs: GPU-seconds where it has GPUs, else CPU-seconds."""
    workers = cluster.workers if isinstance(cluster.workers, int) else 1
    if cluster.gpus_per_worker:
        return {"gpu_s": workers * cluster.gpus_per_worker}
    return {"cpu_s": workers * cluster.cpus_per_worker}


def runs_folder(folder: str) -> str:
    return storage.join(folder, "runs")


def read_curve(folder: str, trial: Trial) -> Curve:
    path = _curve_path(folder, trial)
    if not storage.exists(path):
        return Curve()
    content: Mapping[str, Any] = storage.read_json(path, "readings", "seconds")
    readings = tuple(Reading(**reading) for reading in content["readings"])
    return Curve(readings, content["seconds"], content.get("error", ""))


def write_curve(folder: str, trial: Trial, curve: Curve) -> None:
    storage.write_atomic(_curve_path(folder, trial), json.dumps(asdict(curve), indent=1).encode())


def _curve_path(folder: str, trial: Trial) -> str:
    return storage.join(folder, "curves", f"{trial.id}.json")
