"""One optimiser step: micro-batches in, updated weights out; a non-finite step changes nothing.

The unit is the global batch. Its micro-batches may be spread over workers or accumulated on one; the result is the same up
to rounding. Losses are normalised by counts over the whole global batch. Batch norms use the statistics of their micro-batch;
the running statistics of a step are the mean over its micro-batches.

A step never waits for the device, except in matching (`dfine_core.loss.matching`). Its finiteness is a flag on the device,
which gates the optimiser, the EMA and the running statistics; the host reads the flag one step later.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dfine_core import Targets
from dfine_core.loss.criterion import Normalizers, count
from dfine_core.loss.matching import Matches
from dfine_core.loss.padding import pad_denoising, pad_targets
from dfine_core.loss.worth import amounts
from dfine_core.model.denoising import sample_queries_for
from dfine_core.structures import DenoisingQueries, DetectorOutput
from pipeline.data.augment.blend_pixels import blend_images
from pipeline.data.augment.photometric import leaves_unchanged, photometric_distort, resize_images
from pipeline.data.stream.batch import Batch
from pipeline.training.graphs import loss_values
from pipeline.training.state import TrainState


@dataclass(frozen=True)
class MicroBatch:
    """Input of the detector, on its device."""

    images: Tensor  # [B, 3, H, W] in [0, 1]
    targets: Targets
    denoising: DenoisingQueries | None
    teacher: Targets | None = None  # boxes of a teacher
    teacher_scores: Tensor | None = None  # [T]


@dataclass(frozen=True)
class StepResult:
    """Outcome of a step: tensors on the device, equal on every worker."""

    names: tuple[str, ...]  # of the loss terms
    terms: Tensor  # [T] weighted, averaged over the global batch
    loss: Tensor  # their sum
    grad_norm: Tensor  # before clipping
    finite: Tensor  # [] bool; False: nothing was changed
    directive: Tensor  # [] rank 0's number from `decide`


def to_micro_batch(batch: Batch, state: TrainState, *, size: tuple[int, int], seed: int) -> MicroBatch:
    """Move a batch to the device, distort its colours, blend its images and resize it to the size of the step.

    Args:
        size: height and width in this step.
        seed: seed of the run; denoising is keyed by (seed, step, micro-batch), so it is the same on any worker.
    """
    config = state.detector.config
    targets = Targets.pack(batch.targets(), config.num_classes, state.device)
    images = batch.images.to(state.device, non_blocking=True).float().div_(255)
    if not leaves_unchanged(batch.photometric):  # as when the colours were distorted where the images were decoded
        images = photometric_distort(images, batch.photometric.to(state.device, non_blocking=True))
    images = resize_images(blend_images(images, batch.blend), size)
    layout = torch.channels_last if state.channels_last else torch.contiguous_format
    images = images.contiguous(memory_format=layout)
    generator = torch.Generator(state.device)
    generator.manual_seed(int(np.random.SeedSequence((seed, batch.step, batch.micro_batch)).generate_state(1)[0]))
    denoising = sample_queries_for(config, targets, generator)
    if state.graphs is not None:
        targets, denoising = pad_targets(targets), None if denoising is None else pad_denoising(denoising, config)
    if state.teachers is None:
        return MicroBatch(images, targets, denoising)
    taught = Targets.pack(batch.teacher_targets(), config.num_classes, state.device)
    scores = batch.teacher_scores.to(state.device, non_blocking=True)
    return MicroBatch(images, targets, denoising, taught, scores)


def train_step(
    state: TrainState,
    micro_batches: Sequence[MicroBatch],
    *,
    share: float | None = None,
    decide: Callable[[], int] = lambda: 0,
) -> StepResult:
    """Run one step on this worker's micro-batches. Collective: all ranks must call it.

    Args:
        share: micro-batches of the whole step divided by the number of workers. Gradients are averaged over workers, so a worker
            with more or fewer of them weights each by this number; default: its own number, where all have equally many.
        decide: returns a small number that reaches all ranks with the result; called late in the step, 0 on all but rank 0.
    """
    share = share or len(micro_batches)
    state.statistics.begin_step()
    if state.graphs is not None and state.graphs.replay:
        torch.compiler.cudagraph_mark_step_begin()
    matches, normalizers = _match_ahead(state, micro_batches, share)
    if state.teachers is not None:
        state.teachers.begin_step(micro_batches, share)

    # Forward and backward; gradients are exchanged in the last micro-batch alone.
    state.optimizer.zero_grad(set_to_none=True)
    names: tuple[str, ...] = ()
    summed = torch.zeros((), device=state.device)
    for number, micro_batch in enumerate(micro_batches):
        last = number == len(micro_batches) - 1
        with nullcontext() if last else _without_exchange(state.model):
            names, values = _losses(state, micro_batch, matches[number], normalizers)
            values = values / share
            loss = values.sum()
            (loss * state.loss_scale.scale if state.loss_scale.enabled else loss).backward()
        state.statistics.accumulate()
        summed = summed + values.detach()

    if state.teachers is not None:
        state.teachers.exchange_gradients()
    return _update(state, names, summed, share, decide())


def _match_ahead(
    state: TrainState, micro_batches: Sequence[MicroBatch], share: float
) -> tuple[Sequence[Matches | None], Normalizers | None]:
    """Matches of every micro-batch and the counts of the whole step; nothing where every worker has a single one.

    With several micro-batches, the pairs of all must be counted before the first backward pass: a pass without gradients
    finds the matches, and the losses use them again.
    """
    if share == 1:
        return [None], None
    found = []
    detect = state.model.module if isinstance(state.model, DistributedDataParallel) else state.model
    with torch.no_grad():
        for micro_batch in micro_batches:
            with state.autocast():
                output = detect(micro_batch.images, micro_batch.targets, micro_batch.denoising or False)
            found.append(state.criterion.match(output, micro_batch.targets))
            state.statistics.reset()
    counted = [amounts(m.targets, matches) for m, matches in zip(micro_batches, found, strict=True)]
    boxes, pairs = (sum(numbers) for numbers in zip(*counted, strict=True))
    return found, count(boxes, pairs, state.device, micro_batches=share)


def _losses(
    state: TrainState, micro_batch: MicroBatch, matches: Matches | None, normalizers: Normalizers | None
) -> tuple[tuple[str, ...], Tensor]:
    def detect() -> DetectorOutput:
        with state.autocast():
            output: DetectorOutput = state.model(micro_batch.images, targets, micro_batch.denoising or False)
        return output

    targets = micro_batch.targets
    if state.graphs is not None:
        return state.graphs.losses(state.criterion, detect, targets, matches, normalizers)
    output = detect()
    names, values = loss_values(state.criterion, output, targets, matches, normalizers)
    if state.teachers is None:
        return names, values
    taught = state.teachers.terms(micro_batch, output)
    return (*names, *taught), torch.cat([values, torch.stack(list(taught.values())).to(values)])


def _without_exchange(model: nn.Module) -> AbstractContextManager[None]:
    return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()


@torch.no_grad()
def _update(state: TrainState, names: tuple[str, ...], terms: Tensor, share: float, directive: int) -> StepResult:
    """Unscale, check, clip, step and average; or leave everything as it was."""
    if state.loss_scale.enabled:
        gradients = [p.grad for group in state.optimizer.param_groups for p in group["params"] if p.grad is not None]
        torch._foreach_div_(gradients, state.loss_scale.scale)
    grad_norm = nn.utils.clip_grad_norm_(state.named_parameters().values(), state.max_grad_norm, foreach=True)

    # One reduction carries the loss terms, the running statistics, whether any worker saw a non-finite value, and the directive.
    everything = torch.cat([terms.float(), state.statistics.mean(share)])
    broken = (~everything.isfinite()).any().float().unsqueeze(0)
    workers = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    shared = torch.cat([everything, broken, broken.new_full((1,), directive * workers)])
    if workers > 1:
        dist.all_reduce(shared)
        shared /= workers
    finite = (shared[-2] == 0) & grad_norm.isfinite()
    if state.teachers is not None:
        state.teachers.measure(state.detector, finite)

    # The fused optimiser takes the flag meant for loss scaling: where set, it neither moves weights nor counts the step.
    state.optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
    state.optimizer.grad_scale = None  # type: ignore[attr-defined]
    state.optimizer.step()
    state.statistics.commit(shared[len(terms) : -2], finite)
    state.ema.update(state.detector, finite)
    state.loss_scale.update(finite)

    averaged = shared[: len(terms)]
    return StepResult(
        names=names, terms=averaged, loss=averaged.sum(), grad_norm=grad_norm, finite=finite, directive=shared[-1]
    )
