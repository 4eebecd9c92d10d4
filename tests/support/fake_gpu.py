"""A GPU that is not there: tensors on it have a shape, a dtype and a device, and no values.

What a device would refuse or wait for fails here too: operands on different devices, reading a value (`item`, `bool`), a shape
that depends on values (`nonzero`, boolean masks), and a copy to the host.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode

from dfine_core import Criterion, Detector, ModelConfig, Targets
from dfine_core.config import OptimizerConfig
from dfine_core.ema import ExponentialMovingAverage
from dfine_core.loss import criterion
from dfine_core.loss.matching import Matches, Pairs
from dfine_core.model import denoising
from dfine_core.optim import make_optimizer
from pipeline.training.low_precision import CastDetector
from pipeline.training.numerics import LossScale, RunningStatistics
from pipeline.training.state import AUTOCAST, Precision, TrainState
from pipeline.training.step import MicroBatch, train_step

GPU = torch.device("cuda", 0)
BATCH, BOXES, UNION = 2, 5, 14  # images, boxes of each, pairs of the GO union


class HostCopyError(AssertionError):
    """A tensor of the device was copied to the host, which would wait for it."""


class _NoHostCopies(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if "_to_copy" in func.name() and args[0].device.type == "cuda" and result.device.type == "cpu":
            raise HostCopyError(f"{tuple(args[0].shape)} {args[0].dtype} was copied to the host")
        return result


@contextmanager
def fake_gpu() -> Iterator[FakeTensorMode]:
    """Let tensors on `GPU` be made and computed with while the block runs."""
    mode = FakeTensorMode()
    mode.__deepcopy__ = lambda memo: mode  # type: ignore[attr-defined]  # copies of a tensor stay in its mode
    with mode, _NoHostCopies():  # type: ignore[no-untyped-call]
        yield mode


@contextmanager
def cuda_autocast(dtype: torch.dtype) -> Iterator[None]:
    """Autocast as on a GPU; torch.autocast switches itself off where there is none."""
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", dtype)
    try:
        yield
    finally:
        torch.clear_autocast_cache()
        torch.set_autocast_enabled("cuda", False)


def gpu_state(variant: str, precision: Precision) -> TrainState:
    """State of a training on the fake GPU; call inside of `fake_gpu`."""
    config = ModelConfig.variant(variant, num_classes=80, input_size=(640, 640))
    with torch.device(GPU):
        detector = Detector(config).train()
        ema = ExponentialMovingAverage(detector)
        loss = Criterion(config)
    state = TrainState(
        detector=detector,
        model=detector if precision == "fp32" else CastDetector(detector, AUTOCAST[precision]),
        criterion=loss,
        optimizer=make_optimizer(detector, OptimizerConfig.for_variant(variant), fused=True),
        ema=ema,
        loss_scale=LossScale(GPU, enabled=precision == "fp16"),
        statistics=RunningStatistics(detector),
        device=GPU,
        precision=precision,
        max_grad_norm=0.1,
    )
    if precision != "fp32":
        state.autocast = lambda: cuda_autocast(AUTOCAST[precision])  # type: ignore[method-assign]
    return state


def gpu_targets() -> Targets:
    """Boxes on the fake GPU."""
    total = BATCH * BOXES
    image = torch.zeros(total, dtype=torch.int64, device=GPU)
    return Targets(image, torch.rand(total, 4, device=GPU), image, (BOXES,) * BATCH)


def gpu_step(state: TrainState, mode: FakeTensorMode) -> Any:
    """Run a whole training step: denoising, detector, losses with given matches, optimiser, statistics, average.

    The backward pass is left out: autograd needs the driver of a GPU, and computes each gradient where its tensor lies.
    """
    slots = denoising.positive_slots
    stages = state.detector.config.num_layers + 2

    def host_slots(*args: Any) -> tuple[Tensor, ...]:  # they have values, and lie on the host
        with unset_fake_temporarily():
            made = slots(*args)
        return tuple(mode.from_tensor(tensor) for tensor in made)

    def pairs(*shape: int) -> Pairs:
        return Pairs(*(torch.zeros(shape, dtype=torch.int64, device=GPU) for _ in range(3)))

    def backward(loss: Tensor, *_: Any, **__: Any) -> None:
        assert loss.device == GPU
        for parameter in state.detector.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)

    given = Matches(own=pairs(stages, BATCH * BOXES), union=pairs(UNION))
    with ExitStack() as stack:
        stack.enter_context(patch.object(denoising, "positive_slots", host_slots))
        stack.enter_context(patch.object(criterion, "match", lambda *_: given))
        stack.enter_context(patch.object(Tensor, "backward", backward))
        targets = gpu_targets()
        noised = denoising.sample_queries_for(state.detector.config, targets)
        images = torch.rand(BATCH, 3, 640, 640, device=GPU)
        return train_step(state, [MicroBatch(images, targets, noised)])
