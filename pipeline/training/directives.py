"""Rank 0's decision after each step: go on, save, or save and stop. It reaches all ranks with the values of the step."""

import math
import time
from enum import IntEnum

from pipeline.training.context import TrainJob, WorkerContext
from pipeline.training.numerics import HostScalar
from pipeline.training.step import StepResult


class Directive(IntEnum):
    """Decision about the time after a step, equal on all ranks."""

    GO_ON = 0
    SAVE = 1
    STOP = 2  # save, and end


class Directives:
    """Decisions by rank 0's clock and by stop requests.

    A broadcast per step would cost more than a step of many small workers, so the decision is one more number in the step's own
    reduction. On GPUs the host reads it one step late, because waiting for the device would leave it idle.
    """

    def __init__(self, job: TrainJob, context: WorkerContext) -> None:
        minutes = job.experiment.checkpoints.every_minutes
        self._every_s = math.inf if minutes is None else 60 * minutes
        self._context = context
        self._saved_at = time.monotonic()
        self._unread: HostScalar | None = None

    def begin_steps(self) -> None:
        """Heed stop requests from now on."""
        self._context.stop.heeded = True

    def end_steps(self) -> None:
        """Heed no more stop requests: the last step is saved."""
        self._context.stop.heeded = False

    def decide(self) -> Directive:
        """Decide now. Ranks other than 0 leave it to rank 0."""
        if self._context.rank > 0:
            return Directive.GO_ON
        if self._context.stop.made:
            return Directive.STOP
        return Directive.SAVE if time.monotonic() - self._saved_at >= self._every_s else Directive.GO_ON

    def after(self, result: StepResult) -> Directive:
        """Decision that holds after a step; on GPUs with several workers it was made in the step before."""
        if self._context.world_size == 1:
            return self.decide()
        before, self._unread = self._unread, HostScalar(result.directive)
        arrived = self._unread if self._context.device.type == "cpu" else before
        return Directive.GO_ON if arrived is None else Directive(int(arrived))

    def saved(self) -> None:
        """Count the minutes to the next checkpoint from now."""
        self._saved_at = time.monotonic()
        self._unread = (
            None  # it may ask for the checkpoint that was just made; a stop request is repeated in every step
        )
