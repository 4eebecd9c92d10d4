"""One evaluation of copied weights, in a process of its own while training continues."""

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load as tensors_from_bytes

from dfine_core import Detector, ModelConfig
from dfine_core.checkpoints.weights import load_weights
from pipeline.data.shards.manifest import ShardSet

if TYPE_CHECKING:  # a training imports this module before its first step, and needs no metrics for it
    from pipeline.evaluation.report import EvaluationReport


@dataclass(frozen=True)
class EvaluationRequest:
    """Weights and data of one evaluation; plain values, to be sent to another process."""

    model: dict[str, Any]  # ModelConfig as JSON values
    weights: bytes  # safetensors
    val: ShardSet
    micro_batch_size: int
    num_images: int  # rendered with ground truth and detections
    wanted_precision: float


@dataclass(frozen=True)
class EvaluationResult:
    """Report of an evaluation, and its rendered images."""

    report: "EvaluationReport"
    images: tuple[tuple[str, bytes], ...]  # name and PNG


SubmitEvaluation = Callable[[EvaluationRequest], "Future[EvaluationResult]"]


def run_evaluation(request: EvaluationRequest) -> EvaluationResult:
    """Evaluate in this process, on a GPU if it has one."""
    from pipeline.evaluation.evaluate import evaluate
    from pipeline.evaluation.sample_images import sample_images

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    detector = Detector(ModelConfig.from_plain(request.model))
    load_weights(detector, tensors_from_bytes(request.weights))
    detector.to(device).eval()
    report = evaluate(
        detector,
        request.val,
        device=device,
        micro_batch_size=request.micro_batch_size,
        decode_in="inline",
        wanted_precision=request.wanted_precision,
    )
    assert report is not None  # it is the only rank
    rendered = sample_images(detector, request.val, device=device, count=request.num_images)
    return EvaluationResult(report, tuple(rendered))


def on_ray(resources: dict[str, float]) -> SubmitEvaluation:
    """Submit evaluations as Ray tasks.

    Args:
        resources: CPU and GPU of each task.
    """
    import ray  # here: a run in one process needs no Ray

    task = ray.remote(run_evaluation).options(
        num_cpus=resources.get("CPU", 0),
        num_gpus=resources.get("GPU", 0),
        max_retries=3,
        scheduling_strategy="DEFAULT",  # outside of the placement group of the training
    )
    return lambda request: task.remote(request).future()
