"""Everything that training changes: the detector and what trains it, and the progress of the run."""

import gc
import inspect
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, cast

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dfine_core import Criterion, Detector
from dfine_core.ema import ExponentialMovingAverage
from dfine_core.optim import make_optimizer
from pipeline.config import Experiment
from pipeline.training.freezing import NOTHING_FROZEN, Freezing
from pipeline.training.frozen_parts import freeze, names_in
from pipeline.training.graphs import StepGraphs, compile_step, keep_graphs_in_cache, resolve_compile
from pipeline.training.low_precision import CastDetector
from pipeline.training.multiscale import multiscale_sides
from pipeline.training.numerics import LossScale, RunningStatistics
from pipeline.training.schedule import Schedule
from pipeline.training.stage_two import EvaluationHistory

if TYPE_CHECKING:
    from pipeline.training.teachers.teachers import Teachers

Precision = Literal["fp32", "bf16", "fp16"]
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}

# DistributedDataParallel's switch has another name before torch 2.14.
SYNC_BUFFERS = next(
    name
    for name in ("forward_sync_buffers", "broadcast_buffers")
    if name in inspect.signature(DistributedDataParallel.__init__).parameters
)


@dataclass
class TrainState:
    """State of a run on one worker. Tensors live on `device`; a checkpoint holds all that is not derived from the config."""

    detector: Detector  # its parameters are the optimiser's
    model: (
        nn.Module
    )  # what to call: the detector, where it applies in a CastDetector, and that in DistributedDataParallel
    criterion: Criterion
    optimizer: torch.optim.AdamW  # fused
    ema: ExponentialMovingAverage  # evaluated and shipped
    loss_scale: LossScale
    statistics: RunningStatistics
    device: torch.device
    precision: Precision
    max_grad_norm: float
    channels_last: bool = False
    graphs: StepGraphs | None = None  # where the step is compiled
    teachers: "Teachers | None" = None
    freezing: Freezing = NOTHING_FROZEN
    frozen: tuple[str, ...] = ()  # parts that do not change at present

    step: int = 0  # optimiser steps done
    history: EvaluationHistory = field(default_factory=EvaluationHistory)
    skipped_steps: int = 0  # non-finite
    parent: dict[str, str] = field(default_factory=dict)  # source of the initial weights

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Everything that is trained, by the names of a checkpoint: the detector, and what its teachers need."""
        own = dict(self.detector.named_parameters())
        return own if self.teachers is None else own | self.teachers.named_parameters()

    @property
    def averaged_detector(self) -> Detector:
        """Detector with the averaged weights."""
        return cast(Detector, self.ema.module)

    def autocast(self) -> AbstractContextManager[None]:
        """Autocast region of the run's precision."""
        if self.precision == "fp32":
            return nullcontext()
        return cast(AbstractContextManager[None], torch.autocast(self.device.type, dtype=AUTOCAST[self.precision]))

    def freeze_for_step(self) -> bool:
        """Freeze the parts that do not change in the present step, and thaw the others; return whether anything has changed.

        Collective: where it changes something, the gradients to exchange are others.
        """
        parts = self.freezing.at(self.step)
        if parts == self.frozen:
            return False
        freeze(self.detector, parts, [p for group in self.optimizer.param_groups for p in group["params"]])
        names = names_in(self.detector, parts)
        self.statistics.hold(names)
        self.ema.hold(names)
        if isinstance(self.model, DistributedDataParallel):
            self.model = self.model.module
            gc.collect()  # the old wrapper takes its hooks from the parameters
            self.model = exchanging_gradients(self.model)
        self.frozen = parts
        return True

    def set_learning_rate(self, factor: float) -> None:
        """Set the rate of every parameter group to `factor` times its initial rate."""
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor


def build_train_state(
    experiment: Experiment,
    schedule: Schedule,
    *,
    num_classes: int,
    device: torch.device,
    world_size: int,
    weighted: bool = False,
) -> TrainState:
    """Build a detector with random weights drawn from the seed, and everything that trains it.

    Args:
        weighted: labels are of unequal worth, which the graphs of a step do not know.
    """
    numerics = experiment.numerics
    torch.manual_seed(experiment.seed)
    config = experiment.model.config(num_classes, experiment.loss)
    # The weights are drawn on the CPU, so that they are the same on every device.
    detector = Detector(config).to(device)
    detector.train()
    channels_last = device.type == "cpu" if numerics.channels_last == "auto" else numerics.channels_last
    if channels_last:
        detector.to(memory_format=torch.channels_last)
    ema = ExponentialMovingAverage(detector, schedule.ema_decay, schedule.ema_warmup_steps)
    if numerics.sync_batch_norm and device.type == "cuda" and world_size > 1:
        detector = torch.nn.SyncBatchNorm.convert_sync_batchnorm(detector)

    # The schedule multiplies the initial rates in every step.
    optimizer = make_optimizer(detector, schedule.optimizer, fused=True)
    teachers = None
    if experiment.teacher.in_use:
        from pipeline.training.teachers.teachers import Teachers  # here: few runs have one

        teachers = Teachers(experiment.teacher, config, device=device, seed=experiment.seed)
        if projectors := list(teachers.named_parameters().values()):
            rates = {"lr": schedule.optimizer.lr, "weight_decay": schedule.optimizer.weight_decay}
            optimizer.add_param_group({"name": "teachers", "params": projectors, **rates})
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]

    criterion = Criterion(config).to(device)
    freezing = schedule.freezing
    graphs = None
    compiled = "off" if teachers is not None or weighted else resolve_compile(numerics.compile, device, schedule.steps)
    if compiled != "off":
        keep_graphs_in_cache()
        graphs = compile_step(
            detector,
            criterion,
            losses=compiled == "step",
            sizes=len(set(multiscale_sides(config, experiment.base_size_repeat)))
            * (1 + (freezing.thaw_step is not None)),
            replay=device.type == "cuda" and schedule.micro_batches <= world_size,
        )
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = numerics.tf32
    precision = resolve_precision(numerics.precision, device)
    model: torch.nn.Module = detector
    if precision != "fp32":
        model = CastDetector(detector, AUTOCAST[precision], in_place=graphs is not None)
    state = TrainState(
        detector=detector,
        model=model,
        criterion=criterion,
        graphs=graphs,
        optimizer=optimizer,
        ema=ema,
        loss_scale=LossScale(device, enabled=precision == "fp16"),
        statistics=RunningStatistics(detector),
        device=device,
        precision=precision,
        max_grad_norm=experiment.optimizer.max_grad_norm,
        channels_last=channels_last,
        teachers=teachers,
        freezing=freezing,
    )
    state.freeze_for_step()
    if world_size > 1:
        state.model = exchanging_gradients(model)
    return state


def exchanging_gradients(model: nn.Module) -> DistributedDataParallel:
    """Wrap a model for several workers; buffers are not exchanged, as `RunningStatistics` averages them in the step."""
    return DistributedDataParallel(model, gradient_as_bucket_view=True, **{SYNC_BUFFERS: False})  # type: ignore[arg-type]


def resolve_precision(wanted: str, device: torch.device) -> Precision:
    """Resolve `auto`: bf16 on CUDA, fp32 on the CPU."""
    if wanted != "auto":
        return wanted  # type: ignore[return-value]
    return "bf16" if device.type == "cuda" else "fp32"
