"""From an experiment to what a step needs: detector, loss, optimiser, average, placed and wrapped for the workers."""

import inspect

import torch
from torch.nn.parallel import DistributedDataParallel

from dfine_core import Criterion, Detector
from dfine_core.ema import ExponentialMovingAverage
from dfine_core.optim import make_optimizer
from pipeline.config import Experiment
from pipeline.training.schedule import Schedule
from pipeline.training.step import Learner, LossScale, Precision, RunningStatistics

# The same switch before and since torch 2.14.
SYNC_BUFFERS = next(
    name
    for name in ("forward_sync_buffers", "broadcast_buffers")
    if name in inspect.signature(DistributedDataParallel.__init__).parameters
)


def make_learner(
    experiment: Experiment, schedule: Schedule, *, num_classes: int, device: torch.device, workers: int
) -> Learner:
    """A detector with first weights drawn from the seed, and all that trains it."""
    numerics = experiment.numerics
    torch.manual_seed(experiment.seed)
    config = experiment.model.config(num_classes, experiment.loss)
    detector = Detector(config).to(device)
    detector.train()
    if numerics.channels_last:
        detector.to(memory_format=torch.channels_last)
    average = ExponentialMovingAverage(detector, schedule.ema_decay, schedule.ema_warmup_steps)
    synchronised = numerics.sync_batch_norm and device.type == "cuda" and workers > 1
    if synchronised:
        detector = torch.nn.SyncBatchNorm.convert_sync_batchnorm(detector)
    optimizer = make_optimizer(detector, schedule.optimizer, fused=True)
    for parameters in optimizer.param_groups:
        parameters["initial_lr"] = parameters["lr"]
    if numerics.compile:
        detector.backbone.compile()
        detector.encoder.compile()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = numerics.tf32
    model: torch.nn.Module = detector
    if workers > 1:
        # Buffers are put together in the step, see `RunningStatistics`.
        model = DistributedDataParallel(detector, gradient_as_bucket_view=True, **{SYNC_BUFFERS: False})  # type: ignore[arg-type]
    precision = chosen_precision(numerics.precision, device)
    return Learner(
        detector=detector,
        model=model,
        criterion=Criterion(config).to(device),
        optimizer=optimizer,
        average=average,
        loss_scale=LossScale(device, enabled=precision == "fp16"),
        statistics=RunningStatistics(detector),
        device=device,
        precision=precision,
        clip_norm=experiment.optimizer.clip_norm,
        channels_last=numerics.channels_last,
    )


def chosen_precision(wanted: str, device: torch.device) -> Precision:
    if wanted != "auto":
        return wanted  # type: ignore[return-value]
    return "bf16" if device.type == "cuda" else "fp32"
