"""What is known of every trial of a sweep: plain data, kept as JSON, that verdict and report are made from."""

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


@dataclass(frozen=True)
class Reading:
    """One evaluation of a trial."""

    step: int
    epoch: float
    metrics: dict[str, float]
    cost_s: float  # GPU-seconds of the trial until then, CPU-seconds where it has no GPU


@dataclass(frozen=True, kw_only=True)
class TrialRecord:
    id: str
    number: int  # in the order in which trials began, over all phases
    phase: Phase
    point: Point
    seed: int
    status: Status
    reason: str = ""  # why it failed or was interrupted
    rung: int | None = None  # evaluations after which it was stopped, if it was
    curve: tuple[Reading, ...] = ()
    final: dict[str, float] = field(default_factory=dict)  # of the best weights, when it is finished
    latency_ms: float | None = None  # of one image
    cost: dict[str, float] = field(default_factory=dict)  # "gpu_s", "cpu_s"
    run_id: str | None = None  # of MLflow
    ap_before_training: float | None = None  # with the weights that it started from

    @property
    def cost_s(self) -> float:
        """GPU-seconds, CPU-seconds where no GPU took part."""
        return self.cost.get("gpu_s") or self.cost.get("cpu_s") or 0.0

    def at(self, evaluation: int, metric: str) -> float | None:
        """The metric at the first, second, ... evaluation; None if the trial did not come so far."""
        if not 1 <= evaluation <= len(self.curve):
            return None
        return _finite(self.curve[evaluation - 1].metrics.get(metric))

    def result(self, metric: str) -> float | None:
        """Of a finished trial."""
        return _finite(self.latency_ms if metric == LATENCY else self.final.get(metric))


def _finite(value: float | None) -> float | None:
    return None if value is None or value != value or abs(value) == float("inf") else float(value)


def record_of(content: Mapping[str, Any]) -> TrialRecord:
    """From plain data, as `asdict` makes it."""
    return TrialRecord(**{**content, "curve": tuple(Reading(**reading) for reading in content.get("curve", ()))})


def write_records(uri: str | os.PathLike[str], records: Sequence[TrialRecord]) -> None:
    """All of them as one JSON file."""
    storage.write_atomic(uri, json.dumps([asdict(record) for record in records], indent=1).encode())


def read_records(uri: str | os.PathLike[str]) -> list[TrialRecord]:
    return [record_of(content) for content in storage.read_json(uri)]
