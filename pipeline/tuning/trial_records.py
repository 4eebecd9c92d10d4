"""The sweep's record of each trial: plain data, kept as JSON, from which verdict and report are made."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from pipeline import storage
from pipeline.tuning.space import Point
from pipeline.tuning.sweep import LATENCY, Phase

Status = Literal["finished", "pruned", "failed", "running", "interrupted"]
STATUSES: tuple[Status, ...] = ("finished", "pruned", "failed", "running", "interrupted")
ENDED: tuple[Status, ...] = ("finished", "pruned", "failed")


@dataclass(frozen=True)
class TrialEvaluation:
    """One evaluation of a trial."""

    step: int
    epoch: float
    metrics: dict[str, float]
    cost_s: float  # GPU-seconds of the trial until then, CPU-seconds if it has no GPU


@dataclass(frozen=True, kw_only=True)
class TrialRecord:
    """Everything that is known about one trial."""

    id: str
    number: int  # order in which trials began, over all phases
    phase: Phase
    point: Point
    seed: int
    status: Status
    reason: str = ""  # why it failed
    lost: bool = False  # it failed because its processes were killed; the next start of the sweep continues it
    restarts: int = 0  # after the loss of its process
    rung: int | None = None  # number of evaluations after which it was pruned
    curve: tuple[TrialEvaluation, ...] = ()
    final: dict[str, float] = field(default_factory=dict)  # metrics of the best weights, once it is finished
    latency_ms: float | None = None  # per image
    cost: dict[str, float] = field(default_factory=dict)  # "gpu_s" or "cpu_s"
    run_id: str | None = None  # MLflow run, once its final status is recorded there
    ap_before_training: float | None = None  # AP of the initial weights

    @property
    def cost_s(self) -> float:
        """GPU-seconds, or CPU-seconds if the trial has no GPU."""
        return self.cost.get("gpu_s") or self.cost.get("cpu_s") or 0.0

    def at(self, evaluation: int, metric: str) -> float | None:
        """Metric at the first, second, ... evaluation; None if the trial did not reach it."""
        if not 1 <= evaluation <= len(self.curve):
            return None
        return finite_or_none(self.curve[evaluation - 1].metrics.get(metric))

    def result(self, metric: str) -> float | None:
        """Final value of the metric, or the latency, of a finished trial; None before."""
        return finite_or_none(self.latency_ms if metric == LATENCY else self.final.get(metric))


def finite_or_none(value: float | None) -> float | None:
    """Replace NaN and infinity with None."""
    return None if value is None or value != value or abs(value) == float("inf") else float(value)


def record_of(content: Mapping[str, Any]) -> TrialRecord:
    """Make a record from plain data as written by `asdict`."""
    curve = tuple(TrialEvaluation(**evaluation) for evaluation in content.get("curve", ()))
    return TrialRecord(**{**content, "curve": curve})


def write_records(uri: str | os.PathLike[str], records: Sequence[TrialRecord]) -> None:
    """Write all records as one JSON file."""
    storage.write_atomic(uri, json.dumps([asdict(record) for record in records], indent=1).encode())


def read_records(uri: str | os.PathLike[str]) -> list[TrialRecord]:
    """Read the file that `write_records` wrote."""
    return [record_of(content) for content in storage.read_json(uri)]
