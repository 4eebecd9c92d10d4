"""Training in this process: on a machine without a GPU one worker is enough, and needs no Ray."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from pipeline.config import Experiment
from pipeline.progress import Progress, StepProgress
from pipeline.ray_job import cluster_to_join
from pipeline.training.context import TrainJob, WorkerContext
from pipeline.training.loop import train
from pipeline.training.stop_request import StopRequest, stop_signals


def is_enough(experiment: Experiment) -> bool:
    """Whether this process can train alone, unless a cluster file says otherwise.

    A GPU needs more images than one process decodes, an asynchronous evaluation needs a process of its own, and where there is a
    cluster to join, it is used.
    """
    return not (torch.cuda.is_available() or experiment.evaluation.asynchronous or cluster_to_join())


def train_in_process(job: TrainJob) -> dict[str, Any]:
    """Train to the end or to a stop signal, and return the result of the run; errors as those of `loop.train`."""
    stop = StopRequest()

    def ask() -> bool:
        stop.made = stop.heeded  # before the first step and after the last there is nothing to save
        return stop.made

    with StepProgress(job.experiment.name or "training", total=job.schedule.steps) as progress, stop_signals(ask):
        context = WorkerContext(
            rank=0,
            world_size=1,
            device=torch.device("cpu"),
            broadcast=lambda value: value,
            console=ProcessConsole(progress),
            decode_in="inline",
            stop=stop,
        )
        return train(job, context)


class ProcessConsole:
    """Console of a training in this process; nobody waits for its heartbeats."""

    def __init__(self, progress: StepProgress) -> None:
        self._progress = progress

    def heartbeat(self, step: int, activity: str) -> None:
        """Do nothing."""

    def working(self, step: int, activity: str) -> AbstractContextManager[None]:  # noqa: ARG002 - part of `Console`
        """Do nothing around the block."""
        return nullcontext()

    def print(self, text: str) -> None:
        """Print a line or a table."""
        Progress.write(text)

    def progress(self, step: int, note: str) -> None:
        """Move the progress line."""
        self._progress.show(step, note)
