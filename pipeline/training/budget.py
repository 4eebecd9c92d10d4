"""Cost of a training: arithmetic counted, steps timed on this machine, hours on other machines extrapolated."""

import math
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from dfine_core import Criterion, Detector, ModelConfig, Targets
from dfine_core.model.denoising import sample_queries_for
from dfine_core.parts import part_of
from pipeline.training.frozen_parts import freeze
from pipeline.training.schedule import Schedule
from pipeline.wording import plural

WITHOUT_KERNEL = {
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "lift_fresh"),
    "device",  # a fake tensor is asked for it by many modules
}
BACKWARD = 2  # backward / forward arithmetic: one pass for the weights, one for the inputs
STATE_VALUES = 5  # per parameter: value, gradient, two moments, EMA
FROZEN_VALUES = 2  # values kept for each parameter that is never trained: its own, EMA
FLOAT_BYTES = 4
SUSTAINED_TFLOPS = (10, 30, 100)  # assumed for one GPU in bf16; the first epoch shows the real value
LAUNCH_SECONDS = 5e-6  # assumed for the host to launch one GPU kernel
LAUNCH_TFLOPS = 30  # assumed where launching is compared with computing
TIMED_PASSES, MAX_TIMED_PASSES, TIMED_SECONDS = 3, 20, 3.0  # of a training step on this machine
LARGEST_ADVISED = 64  # images of a micro-batch; small images would need more than makes sense


def budget_lines(config: ModelConfig, images: int, workers: int, *, boxes: int, measured: bool) -> Iterator[str]:
    """Describe the cost in lines that keep counted, measured and extrapolated numbers apart.

    Args:
        images: images seen in the whole run.
        boxes: mean number of boxes per image; it sets the number of denoising queries.
        measured: time a step on this machine.
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
    yield f"extrapolated for {plural(workers, 'worker')}, without evaluations: {', '.join(hours)} sustained by each"


def launch_cost(config: ModelConfig, schedule: Schedule, workers: int, *, boxes: int) -> tuple[str, str | None]:
    """Compare launching the kernels of a step with computing them on one GPU.

    A step launches as many kernels for one image as for many, so a GPU that gets few images waits for its host.

    Args:
        boxes: mean number of boxes per image.

    Returns:
        The comparison, and a warning if launching takes longer.
    """
    micro_batches = schedule.micro_batches_of(0, workers)
    images = micro_batches * schedule.micro_batch_size
    kernels = kernels_per_micro_batch(config, boxes)
    launching = micro_batches * kernels * LAUNCH_SECONDS
    computing_one = flops_per_image(config, boxes) / LAUNCH_TFLOPS / 1e12
    computing = images * computing_one
    estimate = (
        f"estimated for a step on GPUs: {plural(images, 'image')} each in {plural(micro_batches, 'micro-batch')};"
        f" {launching * 1e3:.0f} ms to launch {micro_batches * kernels:,} kernels or so at {LAUNCH_SECONDS * 1e6:.0f} us,"
        f" {computing * 1e3:.0f} ms to compute at {LAUNCH_TFLOPS} TFLOP/s"
    )
    if launching <= computing:
        return estimate, None
    enough = math.ceil(kernels * LAUNCH_SECONDS / computing_one)  # images in one micro-batch
    larger = (
        f", or larger micro-batches: from {enough} images on, which is schedule.global_batch_size: {enough * workers} here,"
        " with optimizer.scale_lr: sqrt"
    )
    return estimate, (
        "warning: launching takes longer than computing, so more GPUs hardly shorten a step. Use fewer workers"
        f"{larger if enough <= LARGEST_ADVISED else ''}"
    )


def kernels_per_micro_batch(config: ModelConfig, boxes: int, images: int = 2) -> int:
    """GPU kernels of a forward and a backward pass, from the forward operators on fake tensors: right to about 15 %."""
    counter = _OperationCounter()
    _fake_forward(config, images, boxes, lambda _: counter)
    return (1 + BACKWARD) * counter.operations


def launches_kernel(operator: OpOverload) -> bool:
    """Whether an operator launches a kernel on a GPU: it is no view, no allocation, and no question to a fake tensor."""
    return not operator.is_view and operator.overloadpacket.__name__ not in WITHOUT_KERNEL


class _OperationCounter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations += launches_kernel(func)
        return func(*args, **(kwargs or {}))


def flops_per_image(config: ModelConfig, boxes: int, images: int = 2) -> float:
    """Floating-point operations of a training step per image, denoising included, counted on fake tensors."""
    counter = FlopCounterMode(display=False)
    _fake_forward(config, images, boxes, lambda _: counter)
    return (1 + BACKWARD) * counter.get_total_flops() / images


def estimated_bytes(
    config: ModelConfig, micro_batch_size: int, boxes: int, *, frozen: Collection[str] = ()
) -> tuple[int, int]:
    """Memory of a worker, found by running the forward pass on fake tensors.

    Args:
        boxes: number of boxes in every image; it sets the number of denoising queries.
        frozen: parts of the detector that are never trained.

    Returns:
        Bytes of the training state, and bytes that the forward pass keeps for the backward pass.
    """
    kept: dict[int, tuple[Tensor, int]] = {}  # by address of the storage; the tensor keeps the address taken

    def keeping(state: dict[str, Tensor]) -> AbstractContextManager[Any]:
        own = {tensor.untyped_storage()._cdata for tensor in state.values()}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                kept[storage._cdata] = tensor, storage.nbytes()
            return tensor

        return torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)

    detector = _fake_forward(config, micro_batch_size, boxes, keeping, frozen)
    values = sum(
        parameter.numel() * (FROZEN_VALUES if part_of(name) in frozen else STATE_VALUES)
        for name, parameter in detector.named_parameters()
    )
    return values * FLOAT_BYTES, sum(size for _, size in kept.values())


def _fake_forward(
    config: ModelConfig,
    images: int,
    boxes: int,
    during: Callable[[dict[str, Tensor]], AbstractContextManager[Any]],
    frozen: Collection[str] = (),
) -> Detector:
    """Run the forward pass of training on fake tensors inside `during(state)`; return the detector."""
    target = {"labels": torch.zeros(boxes, dtype=torch.int64), "boxes": torch.full((boxes, 4), 0.5)}
    targets = Targets.pack([target] * images, config.num_classes, torch.device("cpu"))
    denoising = sample_queries_for(config, targets) or False
    # Fake tensors have shapes and no content: nothing is computed, however large the model.
    detector = Detector(config).train()
    if frozen:
        freeze(detector, frozen, [p for p in detector.parameters() if p.requires_grad])
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    state: dict[str, Tensor] = {
        name: mode.from_tensor(t) for name, t in (*detector.named_parameters(), *detector.named_buffers())
    }
    with mode, during(state):
        functional_call(detector, state, (torch.empty(images, 3, *config.input_size), targets, denoising))
    return detector


def seconds_per_image(config: ModelConfig, boxes: int, device: torch.device) -> float:
    """Seconds of a forward and backward pass of one image in fp32: the median of several, after one that warms up.

    At least `TIMED_PASSES`, and more as long as they are short: one pass alone is off by several times on a busy machine.
    """
    detector, criterion = Detector(config).train().to(device), Criterion(config)
    images = torch.rand(1, 3, *config.input_size, device=device)
    target = {"labels": torch.zeros(boxes, dtype=torch.int64), "boxes": torch.full((boxes, 4), 0.5)}
    seconds: list[float] = []
    while len(seconds) <= TIMED_PASSES or (sum(seconds) < TIMED_SECONDS and len(seconds) <= MAX_TIMED_PASSES):
        started_at = time.perf_counter()
        losses = criterion(detector(images, [target]), [target])
        torch.stack(list(losses.values())).sum().backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started_at)
    return median(seconds[1:])


def _hours(seconds: float) -> str:
    hours = seconds / 3600
    return f"{hours:,.0f} h" if hours >= 10 else f"{hours:.1f} h" if hours >= 1 else f"{seconds / 60:.1f} min"
