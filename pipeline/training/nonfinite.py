"""Non-finite steps: detected one step late, counted, kept on disk; the run rewinds or stops when they persist."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from safetensors.torch import save as tensors_to_bytes
from torch import Tensor

from pipeline import storage
from pipeline.data.stream.batch import Batch
from pipeline.errors import UserError
from pipeline.training import checkpoint
from pipeline.training.context import TrainJob, WorkerContext
from pipeline.training.numerics import HostScalar
from pipeline.training.state import TrainState
from pipeline.training.step import StepResult

FOLDER = "non_finite"  # in the run's folder
ABOUT, MODEL = "about.json", "model.safetensors"


class NonFiniteError(UserError, RuntimeError):
    """Losses or gradients stay NaN or infinite after a rewind."""

    recurs = True


@dataclass(frozen=True)
class PendingStep:
    """A step whose finiteness has not reached the host yet."""

    step: int
    batches: Sequence[Batch]
    result: StepResult
    finite: HostScalar


class NonFiniteGuard:
    """Checks every step one step late, so that the host never waits for the device."""

    def __init__(self, job: TrainJob, context: WorkerContext) -> None:
        self._job, self._context = job, context
        self._settings = job.experiment.non_finite
        self._pending: PendingStep | None = None
        self._consecutive = 0
        self._last_images: list[int] = []
        self._rewound_to: int | None = None

    @property
    def limit_reached(self) -> bool:
        """Whether too many steps in a row were non-finite."""
        return self._consecutive >= self._settings.max_consecutive

    def watch(self, state: TrainState, batches: Sequence[Batch], result: StepResult) -> None:
        """Note the step that was just launched, and check the one before while the device works."""
        launched = PendingStep(state.step, batches, result, HostScalar(result.finite))
        self.check_previous(state)
        self._pending = launched

    def check_previous(self, state: TrainState) -> None:
        """Read whether the noted step was finite; count it and keep its batch if it was not."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        if pending.finite:
            self._consecutive = 0
            return
        state.skipped_steps += 1
        # In fp16 a scale that is too large is ordinary: the next batch runs at a smaller one.
        searching_scale = state.loss_scale.enabled and bool(pending.result.loss.isfinite())
        if searching_scale and float(state.loss_scale.scale) >= 1:
            return
        self._consecutive += 1
        self._last_images = [image_id for batch in pending.batches for image_id in batch.image_id.tolist()]
        self._context.console.print(
            f"worker {self._context.rank} skipped step {pending.step}: loss {float(pending.result.loss):g}, gradient norm"
            f" {float(pending.result.grad_norm):g}, images {self._last_images}"
        )
        if state.skipped_steps <= self._settings.max_saved:
            uri = save_step(self._job.run, pending.step, self._context.rank, pending.batches, state)
            self._context.print(f"its batch and weights are kept: `dfine replay {uri}` examines them")

    def begin_rewind(self, state: TrainState, checkpoints: Sequence[int]) -> None:
        """Allow one return to the newest checkpoint.

        Args:
            checkpoints: steps of the complete checkpoints, ascending.

        Raises:
            NonFiniteError: there is no checkpoint, or the run was rewound to it before.
        """
        if not checkpoints or checkpoints[-1] == self._rewound_to:
            recurs = (
                "again after rewinding to the last checkpoint"
                if checkpoints
                else "and there is no checkpoint to rewind to"
            )
            raise NonFiniteError(
                f"{self._consecutive} steps in a row up to step {state.step} were not finite, {recurs}; the last images of"
                f" worker {self._context.rank} are {self._last_images}. The first of the batches are kept in"
                f" {storage.join(self._job.run, FOLDER)}: `dfine replay` finds the image and the module. A lower"
                " optimizer.lr or numerics.precision=fp32 is the usual remedy."
            )
        self._rewound_to = checkpoints[-1]
        self._consecutive = 0


def save_step(run: str, step: int, rank: int, batches: Sequence[Batch], state: TrainState) -> str:
    """Write a worker's micro-batches of a step, and the weights it ran with; return the folder shared by all workers."""
    folder = storage.join(run, FOLDER, checkpoint.step_folder(step))
    tensors: dict[str, Tensor] = {}
    for batch in batches:
        named = {name: value for name, value in vars(batch).items() if isinstance(value, Tensor)}
        named["counts"] = torch.tensor(batch.counts)
        named["padding"] = torch.tensor(batch.padding)
        named["blend_ratio"] = torch.tensor(batch.blend.ratio, dtype=torch.float64)
        named["pastes"] = torch.tensor(batch.blend.pastes, dtype=torch.int64)
        tensors |= {f"{batch.micro_batch}/{name}": value.cpu().contiguous().clone() for name, value in named.items()}
    storage.write_atomic(storage.join(folder, rank_file(rank)), tensors_to_bytes(tensors))
    if rank == 0:
        storage.write_atomic(storage.join(folder, MODEL), checkpoint.weights_as_bytes(state.detector))
        about = {"step": step, "model": state.detector.config.to_plain(), "frozen": state.frozen}
        storage.write_atomic(storage.join(folder, ABOUT), json.dumps(about, indent=1).encode())
    return folder


def rank_file(rank: int) -> str:
    """Name of the file with one worker's micro-batches."""
    return f"rank-{rank}.safetensors"
