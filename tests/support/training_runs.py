"""Small real runs for tests: drawn shards, D-FINE-N on images of 64 px, in this process and without Ray."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from pipeline.config import Experiment
from pipeline.config_files import check
from pipeline.data.stream.batch import Batch
from pipeline.training import loop
from pipeline.training.checkpoint_manager import CheckpointManager
from pipeline.training.context import TrainJob, WorkerContext, resolve_data
from pipeline.training.nonfinite import NonFiniteGuard
from pipeline.training.run_log import RunLog
from pipeline.training.schedule import derive
from pipeline.training.state import TrainState
from pipeline.training.step import StepResult
from pipeline.training.teachers.checks import with_teachers
from tests.support.synthetic_shards import synthetic_records, write_shards


@dataclass
class RecordingConsole:
    """A console that keeps everything printed to it."""

    printed: list[str] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    notes: list[tuple[int, str]] = field(default_factory=list)  # by step
    at: int = 0  # step of the last heartbeat

    def heartbeat(self, step: int, activity: str) -> None:
        self.at = step

    def working(self, step: int, activity: str) -> AbstractContextManager[None]:
        return nullcontext()

    def print(self, text: str) -> None:
        self.printed.append(text)

    def progress(self, step: int, note: str) -> None:
        self.steps.append(step)
        self.notes.append((step, note))

    def about(self, part: str) -> list[str]:
        return [text for text in self.printed if part in text]


def shard_folders(folder: Path, *, images: int = 24, val: int = 6) -> dict[str, str]:
    return {
        "train": write_shards(folder / "train", synthetic_records(images, longest_side=64)).uri,
        "val": write_shards(folder / "val", synthetic_records(val, longest_side=64, seed=1)).uri,
    }


def experiment(folder: Path, data: dict[str, str], **sections: Any) -> Experiment:
    content: dict[str, Any] = {
        "name": "run",
        "storage": str(folder / "runs"),
        "data": {**data, "decode_in": "inline"},
        "model": {"variant": "n", "input_size": [64, 64], "num_queries": 20, "num_denoising": 10},
        "schedule": {"steps": 6, "global_batch_size": 4, "no_aug_epochs": 0},
        "evaluation": {"num_images": 0, "every_steps": 1000},
        "tracking": {"every_steps": 1},
    }
    for name, value in sections.items():
        content[name] = {**content[name], **value} if isinstance(value, dict) and name in content else value
    return check(Experiment, content, source="test")


def job(experiment: Experiment, *, workers: int = 1, **settings: Any) -> TrainJob:
    data = with_teachers(experiment, resolve_data(experiment.data))
    schedule = derive(experiment, images=data.train.images_in_epoch, workers=workers)
    run = f"{experiment.storage}/{experiment.name}"
    values = {"experiment": experiment, "data": data, "schedule": schedule, "run": run, "tracking": None, **settings}
    return TrainJob(**values)


def alone(console: RecordingConsole | None = None, **settings: Any) -> WorkerContext:
    """Context of the only worker of a run."""
    values = {
        "rank": 0,
        "world_size": 1,
        "device": torch.device("cpu"),
        "broadcast": lambda value: value,
        "console": console or RecordingConsole(),
        **settings,
    }
    return WorkerContext(**values)


@dataclass
class SteppedRun:
    """The parts of a run, for tests that make its steps one by one."""

    job: TrainJob
    context: WorkerContext
    state: TrainState
    checkpoints: CheckpointManager
    guard: NonFiniteGuard
    log: RunLog

    @classmethod
    def begin(cls, job: TrainJob, context: WorkerContext | None = None) -> "SteppedRun":
        """Build the parts, and restore or initialise the state."""
        context = context or alone()
        state = loop.new_state(job, context)
        checkpoints = CheckpointManager(job, context, tracking_key=None)
        checkpoints.restore_or_init(state)
        return cls(job, context, state, checkpoints, NonFiniteGuard(job, context), RunLog(job, context))

    def stream(self) -> Iterator[Batch]:
        return loop.open_stream(self.job, self.context, self.state)

    def step(self, batches: Iterator[Batch]) -> StepResult:
        return loop.run_step(self.job, self.context, self.state, batches, self.guard, self.log)

    def losses(self, steps: int) -> list[float]:
        batches = self.stream()
        return [float(self.step(batches).loss) for _ in range(steps)]
