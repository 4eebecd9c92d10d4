"""One optimiser step: micro-batches in, changed weights out, and nothing changed if anything was not finite.

The unit is the global batch. Its micro-batches may lie on as many workers or be gone through one after another; the
result is the same up to rounding. Losses are divided by counts over the whole global batch. Batch statistics are those of a
micro-batch; the running statistics of a step are the mean of what each micro-batch alone would have made them.

A step never waits for the device, except where matching must (`dfine_core.loss.matching`). Whether it was finite is a flag on
the device on which the optimiser, the average and the running statistics depend; the host reads it a step later.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dfine_core import Criterion, Detector, Targets
from dfine_core.ema import ExponentialMovingAverage
from dfine_core.loss.criterion import Normalizers, count
from dfine_core.loss.matching import Matches
from dfine_core.model.denoising import draw_for
from dfine_core.structures import DenoisingQueries
from pipeline.data.augment.photometric import photometric_distort, resize_images
from pipeline.data.stream.batch import Batch

Precision = Literal["fp32", "bf16", "fp16"]


@dataclass
class Learner:
    """All that a step reads and changes."""

    detector: Detector  # its parameters are what the optimiser holds
    model: nn.Module  # what is called: the detector, or it within DistributedDataParallel, compiled or not
    criterion: Criterion
    optimizer: torch.optim.AdamW  # fused
    average: ExponentialMovingAverage
    loss_scale: "LossScale"
    statistics: "RunningStatistics"
    device: torch.device
    precision: Precision
    clip_norm: float
    channels_last: bool = False

    def autocast(self) -> AbstractContextManager[None]:
        if self.precision == "fp32":
            return nullcontext()
        dtype = torch.bfloat16 if self.precision == "bf16" else torch.float16
        return cast(AbstractContextManager[None], torch.autocast(self.device.type, dtype=dtype))


@dataclass(frozen=True)
class MicroBatch:
    """What the detector takes, on its device."""

    images: Tensor  # [B, 3, H, W] in [0, 1]
    targets: Targets
    denoising: DenoisingQueries | None


@dataclass(frozen=True)
class StepResult:
    """Tensors on the device; the same on every worker."""

    terms: dict[str, Tensor]  # loss terms by name, averaged over the global batch
    loss: Tensor  # their sum
    grad_norm: Tensor  # before clipping
    finite: Tensor  # [] bool; False: nothing was changed


class HostFlag:
    """A flag on its way to the host: reading it later waits for the step that made it, not for what was queued since."""

    def __init__(self, flag: Tensor) -> None:
        self._value, self._arrived = flag, None
        if flag.is_cuda:
            self._value = torch.empty_like(flag, device="cpu", pin_memory=True)
            self._value.copy_(flag, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def __bool__(self) -> bool:
        if self._arrived is not None:
            self._arrived.synchronize()
        return bool(self._value)


def to_micro_batch(batch: Batch, learner: Learner, *, size: tuple[int, int], seed: int) -> MicroBatch:
    """Onto the device, photometric part and multi-scale size included.

    Args:
        size: height and width of the step.
        seed: of the run; denoising is keyed by (seed, step, micro-batch), so that it is the same on any worker.
    """
    config = learner.detector.config
    targets = Targets.pack(batch.targets(), config.num_classes, learner.device)
    images = batch.images.to(learner.device, non_blocking=True).float().div_(255)
    images = photometric_distort(images, batch.photometric.to(learner.device, non_blocking=True))
    images = resize_images(images, size)
    if learner.channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    generator = torch.Generator(learner.device)
    generator.manual_seed(int(np.random.SeedSequence((seed, batch.step, batch.micro_batch)).generate_state(1)[0]))
    return MicroBatch(images, targets, draw_for(config, targets, generator))


def train_step(learner: Learner, micro_batches: Sequence[MicroBatch]) -> StepResult:
    """One step on this worker's micro-batches of it; collective over all workers."""
    learner.statistics.hold()
    matches, normalizers = _counted(learner, micro_batches)
    learner.optimizer.zero_grad(set_to_none=True)
    summed: dict[str, Tensor] = {}
    for number, batch in enumerate(micro_batches):
        last = number == len(micro_batches) - 1
        with nullcontext() if last else _without_exchange(learner.model):
            terms = _forward(learner, batch, matches[number], normalizers)
            loss = torch.stack(list(terms.values())).sum() / len(micro_batches)
            (loss * learner.loss_scale.scale).backward()
        learner.statistics.take()
        for name, term in terms.items():
            summed[name] = summed.get(name, 0) + term.detach() / len(micro_batches)
    return _finish(learner, summed, len(micro_batches))


def _counted(
    learner: Learner, micro_batches: Sequence[MicroBatch]
) -> tuple[Sequence[Matches | None], Normalizers | None]:
    """Matches and counts of a whole step. A single micro-batch finds its own on the way.

    With several, the pairs of all must be counted before the first is differentiated: a pass without gradients finds them,
    and they are used again.
    """
    if len(micro_batches) == 1:
        return [None], None
    found = []
    with torch.no_grad():
        for batch in micro_batches:
            with learner.autocast():
                output = learner.detector(batch.images, batch.targets, batch.denoising or False)
            found.append(learner.criterion.match(output, batch.targets))
            learner.statistics.forget()
    boxes, pairs = sum(b.targets.total for b in micro_batches), sum(len(matches.union) for matches in found)
    return found, count(boxes, pairs, learner.device, micro_batches=len(micro_batches))


def _forward(
    learner: Learner, batch: MicroBatch, matches: Matches | None, normalizers: Normalizers | None
) -> dict[str, Tensor]:
    with learner.autocast():
        output = learner.model(batch.images, batch.targets, batch.denoising or False)
    terms: dict[str, Tensor] = learner.criterion(output, batch.targets, matches, normalizers)
    return terms


def _without_exchange(model: nn.Module) -> AbstractContextManager[None]:
    return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()


@torch.no_grad()
def _finish(learner: Learner, terms: Mapping[str, Tensor], micro_batches: int) -> StepResult:
    """Unscale, check, clip, step, average; or leave everything as it was."""
    scale = learner.loss_scale
    gradients = [p.grad for group in learner.optimizer.param_groups for p in group["params"] if p.grad is not None]
    torch._foreach_div_(gradients, scale.scale)
    norm = nn.utils.clip_grad_norm_(learner.detector.parameters(), learner.clip_norm, foreach=True)

    values, statistics = torch.stack(list(terms.values())), learner.statistics.mean()
    everything = torch.cat([values.float(), statistics])
    broken = (~everything.isfinite()).any().float().unsqueeze(0)
    shared = torch.cat([everything, broken])
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(shared)
        shared /= dist.get_world_size()
    finite = (shared[-1] == 0) & norm.isfinite()

    # The fused optimiser takes the flag that loss scaling uses, and then neither moves nor counts the step.
    learner.optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
    learner.optimizer.grad_scale = None  # type: ignore[attr-defined]
    learner.optimizer.step()
    learner.statistics.settle(shared[len(values) : -1], finite)
    learner.average.update(learner.detector, finite)
    scale.update(finite)
    averaged = dict(zip(terms, shared[: len(values)].unbind(), strict=True))
    return StepResult(terms=averaged, loss=shared[: len(values)].sum(), grad_norm=norm, finite=finite)


class RunningStatistics:
    """The running means and variances of all batch norms, put together from the micro-batches of a step."""

    def __init__(self, detector: nn.Module) -> None:
        norms = [
            m
            for m in detector.modules()
            if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is not None
        ]
        self._buffers = [cast(Tensor, b) for m in norms for b in (m.running_mean, m.running_var)]
        self._counters = [cast(Tensor, m.num_batches_tracked) for m in norms]
        self._sizes = [b.numel() for b in self._buffers]
        self._held: list[Tensor] = []
        self._held_counters: list[Tensor] = []
        self._sums: list[Tensor] = []
        self._taken = 0

    def hold(self) -> None:
        """Remember the state before a step."""
        self._held = [b.clone() for b in self._buffers]
        self._held_counters = [c.clone() for c in self._counters]
        self._sums = [torch.zeros_like(b) for b in self._buffers]
        self._taken = 0

    def take(self) -> None:
        """Add what a micro-batch made of that state, and go back to it."""
        if self._buffers:
            torch._foreach_add_(self._sums, self._buffers)
        self._taken += 1
        self.forget()

    def forget(self) -> None:
        if self._buffers:
            torch._foreach_copy_(self._buffers, self._held)

    def mean(self) -> Tensor:
        """[all] the mean of what was taken, laid end to end."""
        if not self._sums:
            return torch.zeros(0)
        return torch.cat([s.flatten() for s in self._sums]) / self._taken

    def settle(self, mean: Tensor, finite: Tensor) -> None:
        """End a step with these statistics, or with those from before it."""
        if not self._buffers:
            return
        parts = [p.view_as(b) for p, b in zip(mean.split(self._sizes), self._buffers, strict=True)]
        chosen = [torch.where(finite, part, held) for part, held in zip(parts, self._held, strict=True)]
        torch._foreach_copy_(self._buffers, chosen)
        counted = finite.to(self._counters[0].dtype)
        torch._foreach_copy_(self._counters, [held + counted for held in self._held_counters])


class LossScale:
    """What the loss is multiplied by so that small fp16 gradients survive; on the device, like all that depends on it.

    Doubles after `growth_interval` finite steps in a row, halves at a step that is not finite. For fp32 and bf16 it is 1.
    """

    def __init__(self, device: torch.device, *, enabled: bool, growth_interval: int = 2000) -> None:
        self.enabled = enabled
        self.growth_interval = growth_interval
        self.scale = torch.full((), 2.0**16 if enabled else 1.0, device=device)
        self.finite_steps = torch.zeros((), device=device)

    def update(self, finite: Tensor) -> None:
        if not self.enabled:
            return
        self.finite_steps.add_(1).mul_(finite)
        grown = self.finite_steps >= self.growth_interval
        self.scale.copy_(torch.where(finite, torch.where(grown, self.scale * 2, self.scale), self.scale / 2))
        self.finite_steps.mul_(~grown)
