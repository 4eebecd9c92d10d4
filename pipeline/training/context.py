"""The job that the driver sends to its workers, and the context in which one worker trains it."""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from pipeline import storage
from pipeline.config import Experiment
from pipeline.data.shards.classes import class_lines, with_classes_of
from pipeline.data.shards.manifest import ManifestError, ShardSet, load_shards
from pipeline.data.shards.set_lines import set_lines
from pipeline.data.shards.training_set import TrainingSet, join_sets
from pipeline.data_settings import Data
from pipeline.errors import UserError
from pipeline.tracking.settings import TrackingSettings
from pipeline.training.schedule import Schedule
from pipeline.training.stop_request import StopRequest

if TYPE_CHECKING:  # the driver and Ray Train's controller import this module too, and need neither torch nor Ray Data
    import torch

    from pipeline.data.stream.settings import DecodeIn
    from pipeline.data.stream.share import Broadcast
    from pipeline.training.evaluation_task import SubmitEvaluation


@dataclass(frozen=True)
class ResolvedData:
    """The shard sets of an experiment, opened once."""

    train: TrainingSet
    val: ShardSet | None
    teachers: dict[str, str] = field(default_factory=dict)  # digest by key: teacher.features, .detector, .boxes

    def digests(self) -> dict[str, str]:
        """Manifest digest by use: train, its sets if there are several, val if there is one; and those of the teachers."""
        return self.train.digests | ({"val": self.val.manifest.digest} if self.val else {}) | self.teachers

    def shard_sets(self) -> list[ShardSet]:
        """Every shard set of the training, and `val` if there is one."""
        return [*(each.shards for each in self.train.sets), *([self.val] if self.val else [])]

    def lines(self) -> list[str]:
        """Lines about several sets of the training, repeated classes, and classes of `val` that differ."""
        return [*set_lines(self.train), *(class_lines(self.val, "val") if self.val else [])]


def resolve_data(data: Data) -> ResolvedData:
    """Open the shard sets of an experiment; labels of `val` are mapped by name to those of `train`.

    Raises:
        ManifestError: there is no shard set at one of the paths, it is damaged, or the classes of the two disagree.
    """
    train = open_training_set(data)
    if data.val is None:
        return ResolvedData(train, None)
    return ResolvedData(train, with_classes_of(load_shards(data.val), train.names, train.title))


def open_training_set(data: Data) -> TrainingSet:
    """Open the shard sets of a training, with their classes joined by name and the copies of images with rare classes.

    Raises:
        ManifestError: sets are missing or damaged, or their classes cannot be joined; names every problem.
    """
    opened, problems = [], []
    for each in data.train_sets:
        try:
            opened.append(load_shards(each.shards))
        except UserError as error:
            problems.append(f"{error}")
    if problems:
        raise ManifestError("\n  ".join(["data.train:", *problems] if len(problems) > 1 else problems))
    weights, renames = zip(*((each.weight, each.classes) for each in data.train_sets), strict=True)
    return join_sets(opened, weights, renames, data.repeat_factor_threshold)


@dataclass(frozen=True)
class TrainJob:
    """Everything that defines a run: resolved and derived once by the driver, the same for every worker."""

    experiment: Experiment
    data: ResolvedData
    schedule: Schedule
    run: str  # folder or URI of the run
    tracking: TrackingSettings | None  # None: the run is not tracked
    outbox_folder: Path | None = None  # on a local disk
    resume: str | None = None  # checkpoint of another run that this one continues
    threads: int | None = None  # PyTorch threads of a worker that computes on the CPU
    evaluation_resources: dict[str, float] = field(default_factory=dict)  # CPU and GPU of an asynchronous evaluation
    profile_steps: int = 0  # steps that rank 0 records with PyTorch's profiler
    ray_job: str | None = None  # id of the submitted job
    command: str = ""  # that started the run, without secrets
    launched_at: float = field(default_factory=time.time)  # after a restart: last heartbeat of the workers before
    restarted: bool = False  # by Ray, after a worker died

    @property
    def checkpoints(self) -> str:
        """Folder or URI of the run's checkpoints."""
        return storage.join(self.run, "checkpoints")

    @property
    def exchange(self) -> str:
        """Folder or URI of files between the workers of an evaluation, while it lasts."""
        return storage.join(self.run, "exchange")


class Console(Protocol):
    """Sink for the progress of a worker."""

    def heartbeat(self, step: int, activity: str) -> None:
        """Report that the worker is at `step`, busy with `activity`."""

    def working(self, step: int, activity: str) -> AbstractContextManager[None]:
        """Report so while the block computes for long without heartbeats."""

    def print(self, text: str) -> None:
        """Print a line or a table."""

    def progress(self, step: int, note: str) -> None:
        """Move the progress line: `step` steps are done."""


@dataclass(frozen=True)
class WorkerContext:
    """Distributed context of one worker: rank, device, collectives, console."""

    rank: int
    world_size: int
    device: "torch.device"
    broadcast: "Broadcast"  # rank 0's value on every rank; collective
    console: Console
    decode_in: "DecodeIn | None" = None  # where images are decoded; None: where the experiment says
    report: Callable[[dict[str, float]], None] = lambda _: None  # metrics of an evaluation to Ray; collective
    submit_evaluation: "SubmitEvaluation | None" = None  # on rank 0, if evaluations are asynchronous
    stop: StopRequest = field(default_factory=StopRequest)  # seen on rank 0 alone

    def print(self, text: str) -> None:
        """Print on rank 0 alone."""
        if self.rank == 0:
            self.console.print(text)
