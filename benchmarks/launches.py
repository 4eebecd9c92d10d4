"""Operators that a training step launches, by part: what a GPU's host must issue, whatever the size of the batch.

    python -m benchmarks.launches
    python -m benchmarks.launches --variants n l --amp no --top 20

Counted below autograd and autocast, in a real step of `pipeline.training` on tiny images: the counts depend on neither size nor
batch. Views and allocations launch nothing and are left out; a fused operator over a list of tensors counts once, though a
GPU cuts long lists into several kernels. On a GPU the casts of grid sampling fall away, which autocast makes on a CPU alone, and
so do most launches of what is fused there; the last lines count these on tensors of a GPU that need not be there.
"""

import argparse
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.criterion import random_targets
from dfine_core import Criterion, Detector, ModelConfig, Targets, fused_kernels
from dfine_core.config import VARIANTS, OptimizerConfig
from dfine_core.ema import ExponentialMovingAverage
from dfine_core.model import sampling
from dfine_core.model.attention import DeformableAttention, split_levels
from dfine_core.model.denoising import sample_queries_for
from dfine_core.optim import make_optimizer
from pipeline.data.augment.photometric import photometric_distort
from pipeline.data.augment.photometric_parameters import Photometric
from pipeline.training.budget import launches_kernel
from pipeline.training.low_precision import CastDetector
from pipeline.training.numerics import LossScale, RunningStatistics
from pipeline.training.state import AUTOCAST, TrainState
from pipeline.training.step import MicroBatch, train_step

SIDE, BATCH, BOXES, CLASSES, QUERIES = 64, 2, 6, 80, 16
CPU = torch.device("cpu")
CASTS = {"_to_copy"}
PARTS = (
    "denoising",
    "backbone",
    "encoder",
    "decoder",
    "criterion",
    "backward",
    "clipping",
    "optimiser",
    "statistics",
    "average",
)


class LaunchCounter(TorchDispatchMode):
    """Counts launching operators by part and name while it is active."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.part = "rest"
        self.launches: dict[str, Counter[str]] = defaultdict(Counter)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if launches_kernel(func):
            self.launches[self.part][func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))

    @property
    def total(self) -> int:
        """Launches of all parts."""
        return sum(sum(names.values()) for names in self.launches.values())

    @property
    def by_name(self) -> Counter[str]:
        """Launches of each operator in all parts."""
        return sum(self.launches.values(), Counter())

    @contextmanager
    def within(self, part: str) -> Iterator[None]:
        """Count what the block launches for a part."""
        before, self.part = self.part, part
        try:
            yield
        finally:
            self.part = before

    def marked(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function, counted for a part."""

        def call(*args: Any, **kwargs: Any) -> Any:
            with self.within(part):
                return function(*args, **kwargs)

        return call


def training_state(variant: str, precision: str, **settings: Any) -> TrainState:
    """Small state of a training of a variant, with random weights; `settings` are fields of its `ModelConfig`."""
    torch.manual_seed(0)
    config = ModelConfig.variant(variant, num_classes=CLASSES, input_size=(SIDE, SIDE), num_queries=QUERIES, **settings)
    detector = Detector(config).train()
    return TrainState(
        detector=detector,
        model=detector if precision == "fp32" else CastDetector(detector, AUTOCAST[precision]),
        criterion=Criterion(config),
        optimizer=make_optimizer(detector, OptimizerConfig.for_variant(variant), fused=True),
        ema=ExponentialMovingAverage(detector),
        loss_scale=LossScale(CPU, enabled=False),
        statistics=RunningStatistics(detector),
        device=CPU,
        precision=precision,  # type: ignore[arg-type]
        max_grad_norm=0.1,
    )


def count_step(state: TrainState) -> LaunchCounter:
    """Count the launches of one step, after one that has set up what stays."""
    generator = torch.Generator().manual_seed(0)
    targets = Targets.pack(random_targets([BOXES] * BATCH, CLASSES, generator), CLASSES, CPU)
    images = torch.rand(BATCH, 3, SIDE, SIDE, generator=generator)
    config = state.detector.config
    train_step(state, [MicroBatch(images, targets, sample_queries_for(config, targets, generator))])
    counter = LaunchCounter()
    marks: list[tuple[Any, str, str]] = [
        (state.detector.backbone, "forward", "backbone"),
        (state.detector.encoder, "forward", "encoder"),
        (state.detector.decoder, "forward", "decoder"),
        (state.criterion, "forward", "criterion"),
        (Tensor, "backward", "backward"),
        (nn.utils, "clip_grad_norm_", "clipping"),
        (state.optimizer, "step", "optimiser"),
        (state.ema, "update", "average"),
        *((state.statistics, name, "statistics") for name in ("begin_step", "accumulate", "mean", "commit")),
    ]
    with ExitStack() as stack:
        for owner, name, part in marks:
            stack.enter_context(patch.object(owner, name, counter.marked(part, getattr(owner, name))))
        stack.enter_context(counter)
        with counter.within("denoising"):
            denoising = sample_queries_for(config, targets, generator)
        train_step(state, [MicroBatch(images, targets, denoising)])
    return counter


def count_fused(name: str, enabled: bool) -> int:
    """Count the launches of the photometric distortion, or of one layer's sampling, forward, with or without fused kernels."""
    counter = LaunchCounter()
    attention = DeformableAttention(128, 8, (6, 6))
    shapes = ((8, 8), (4, 4))
    with FakeTensorMode() as mode, torch.no_grad(), patch.object(fused_kernels, "ENABLED", enabled):
        images, tokens = torch.rand(2, 3, 64, 64, device="cuda"), torch.rand(2, 80, 128, device="cuda")
        parameters = torch.rand(2, len(Photometric), device="cuda")
        query, boxes = torch.rand(2, 10, 128, device="cuda"), torch.rand(2, 10, 4, device="cuda")
        for module in (attention, attention.sampling_offsets, attention.attention_weights):
            for registered in (module._parameters, module._buffers):
                for key, tensor in registered.items():
                    registered[key] = mode.from_tensor(tensor).to("cuda")  # type: ignore[arg-type, assignment]
        with counter:
            if name == "photometric":
                photometric_distort(images, parameters)
            else:
                fused = sampling.usable(tokens, len(shapes))
                attention(query, boxes, split_levels(tokens, shapes, 8, fused=fused))
    return counter.total


def main() -> None:
    """Run the command."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--variants", nargs="+", choices=VARIANTS, default=["n", "s", "l", "x"])
    arguments.add_argument("--amp", choices=["no", "bf16"], default="bf16")
    arguments.add_argument("--top", type=int, default=0, help="operators to list for each variant")
    args = arguments.parse_args()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, {'fp32' if args.amp == 'no' else args.amp}\n")
    print("| | all | " + " | ".join((*PARTS, "rest", "of these casts")) + " |")
    print("|---" * (len(PARTS) + 4) + "|")
    for variant in args.variants:
        counter = count_step(training_state(variant, "fp32" if args.amp == "no" else args.amp))
        parts = [sum(counter.launches[part].values()) for part in (*PARTS, "rest")]
        casts = sum(counter.by_name[name] for name in CASTS)
        print(f"| {variant.upper()} | " + " | ".join(str(n) for n in (counter.total, *parts, casts)) + " |")
        for name, number in counter.by_name.most_common(args.top):
            split = ", ".join(f"{part} {names[name]}" for part, names in counter.launches.items() if names[name])
            print(f"    {number:5} {name}: {split}")
    print()
    for name, what in (
        ("photometric", "photometric distortion"),
        ("attention", "deformable attention of a layer, forward"),
    ):
        print(f"{what}: {count_fused(name, False)} launches, with Triton on a GPU {count_fused(name, True)}")


if __name__ == "__main__":
    main()
