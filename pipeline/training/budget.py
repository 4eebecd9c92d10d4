"""What a training costs: its arithmetic counted, a step of it timed on this machine, hours elsewhere extrapolated."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from dfine_core import Criterion, Detector, ModelConfig, Targets
from dfine_core.model.denoising import draw_for

BACKWARD = 2  # times the arithmetic of the forward pass: by the weights, and by the inputs
STATE_VALUES = 5  # for each parameter: itself, its gradient, two moments, its average
FLOAT_BYTES = 4
SUSTAINED_TFLOPS = (10, 30, 100)  # of one GPU, in this network and in bf16; what yours does, a first epoch shows


def budget_lines(config: ModelConfig, images: int, workers: int, *, boxes: int, measured: bool) -> Iterator[str]:
    """For people; what is measured and what is extrapolated kept apart.

    Args:
        images: seen in the whole run.
        boxes: of an image, on average; denoising queries grow with them.
        measured: time a step here.
    """
    flops = flops_per_image(config, boxes)
    yield f"counted: {images:,} images of {flops / 1e9:.1f} GFLOP forward and backward, {images * flops / 1e18:.3g} EFLOP in all"
    if measured:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        seconds = seconds_per_image(config, boxes, device)
        what = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
        yield (
            f"measured here ({what}, fp32, one image at a time): {seconds:.2f} s an image, {flops / seconds / 1e9:.0f} GFLOP/s;"
            f" so {_hours(images * seconds)} with one such worker"
        )
    hours = (f"{_hours(images * flops / workers / rate / 1e12)} at {rate} TFLOP/s" for rate in SUSTAINED_TFLOPS)
    yield f"extrapolated for {workers} worker(s), without evaluations: {', '.join(hours)} sustained by each"


def flops_per_image(config: ModelConfig, boxes: int, images: int = 2) -> float:
    """Of a training step, denoising included, counted on tensors without content."""
    counter = FlopCounterMode(display=False)
    _forward_without_content(config, images, boxes, lambda state: counter)
    return (1 + BACKWARD) * counter.get_total_flops() / images


def estimated_bytes(config: ModelConfig, micro_batch_size: int, boxes: int) -> tuple[int, int]:
    """Bytes of the state, and of what the forward pass keeps, found by running it on tensors without content.

    Args:
        boxes: of every image; they set how many denoising queries there are.
    """
    kept: dict[int, tuple[Tensor, int]] = {}  # by storage, which stays alive so that its place is not taken by another

    def keeping(state: dict[str, Tensor]) -> AbstractContextManager[Any]:
        own = {tensor.untyped_storage()._cdata for tensor in state.values()}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                kept[storage._cdata] = tensor, storage.nbytes()
            return tensor

        return torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)

    parameters = _forward_without_content(config, micro_batch_size, boxes, keeping)
    return parameters * STATE_VALUES * FLOAT_BYTES, sum(size for _, size in kept.values())


def _forward_without_content(
    config: ModelConfig,
    images: int,
    boxes: int,
    during: Callable[[dict[str, Tensor]], AbstractContextManager[Any]],
) -> int:
    """Run the training's forward pass inside `during(state)`; the number of parameters."""
    target = {"labels": torch.zeros(boxes, dtype=torch.int64), "boxes": torch.full((boxes, 4), 0.5)}
    targets = Targets.pack([target] * images, config.num_classes, torch.device("cpu"))
    denoising = draw_for(config, targets) or False
    detector = Detector(config).train()
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    state: dict[str, Tensor] = {
        name: mode.from_tensor(t) for name, t in (*detector.named_parameters(), *detector.named_buffers())
    }
    with mode, during(state):
        functional_call(detector, state, (torch.empty(images, 3, *config.input_size), targets, denoising))
    return sum(p.numel() for p in detector.parameters())


def seconds_per_image(config: ModelConfig, boxes: int, device: torch.device) -> float:
    """Of forward and backward pass in fp32, one image at a time, after a first that is not counted."""
    detector, criterion = Detector(config).train().to(device), Criterion(config)
    images = torch.rand(1, 3, *config.input_size, device=device)
    target = {"labels": torch.zeros(boxes, dtype=torch.int64), "boxes": torch.full((boxes, 4), 0.5)}
    seconds = 0.0
    for _ in range(2):
        started_at = time.perf_counter()
        losses = criterion(detector(images, [target]), [target])
        torch.stack(list(losses.values())).sum().backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - started_at
    return seconds


def _hours(seconds: float) -> str:
    hours = seconds / 3600
    return f"{hours:,.0f} h" if hours >= 10 else f"{hours:.1f} h" if hours >= 1 else f"{seconds / 60:.1f} min"
