"""One evaluation: detect in every image of a shard set, on all workers, and compute the metrics on rank 0."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from math import ceil
from typing import Any

import torch
from torch import nn

from dfine_core import Detector
from dfine_core.inference import predict_batch
from dfine_core.structures import Targets
from pipeline.data.shards.manifest import ShardSet
from pipeline.data.stream.batch import Batch
from pipeline.data.stream.settings import DecodeIn
from pipeline.data.stream.share import Broadcast
from pipeline.data.stream.stream import evaluation_stream
from pipeline.evaluation.analysis import confusion, precision_recall, tide_errors
from pipeline.evaluation.coco_metrics import EQUAL, coco_numbers, difference, result_of, run_hotcoco
from pipeline.evaluation.decoder_layers import LayerDiagnostics
from pipeline.evaluation.detections import DetectionTable, concatenate, gather
from pipeline.evaluation.ground_truth import GroundTruth, read_ground_truth
from pipeline.evaluation.report import EvaluationReport
from pipeline.progress import Progress

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EvaluationOutput:
    """Detections in all images, with the diagnostics of the layers; on rank 0."""

    detections: DetectionTable
    layers: dict[str, float]  # see `LayerDiagnostics.numbers`
    seconds: dict[str, float]  # rank 0: "data", waiting for images; "model", the rest


def _itself(value: Any) -> Any:
    return value


def evaluate(
    detector: Detector,
    shards: ShardSet,
    ground_truth: GroundTruth | None = None,
    *,
    device: torch.device,
    rank: int = 0,
    world_size: int = 1,
    broadcast: Broadcast = _itself,
    micro_batch_size: int,
    decode_in: DecodeIn = "task",
    final: bool = False,
    progress: bool = False,
) -> EvaluationReport | None:
    """Evaluate a detector; the report on rank 0, None on the others. Collective.

    Args:
        detector: evaluated in eval mode and float32; afterwards every part is in its former mode.
        ground_truth: read from the shards if None; needed on rank 0 only.
        micro_batch_size: images per batch and worker.
        final: report the numbers of pycocotools, and compare them with hotcoco's.
        progress: display a progress bar, on rank 0.
    """
    output = collect_detections(
        detector,
        shards,
        device=device,
        rank=rank,
        world_size=world_size,
        broadcast=broadcast,
        micro_batch_size=micro_batch_size,
        decode_in=decode_in,
        progress=progress,
    )
    if output is None:
        return None
    return compute_report(output, read_ground_truth(shards) if ground_truth is None else ground_truth, final=final)


def collect_detections(
    detector: Detector,
    shards: ShardSet,
    *,
    device: torch.device,
    rank: int = 0,
    world_size: int = 1,
    broadcast: Broadcast = _itself,
    micro_batch_size: int,
    decode_in: DecodeIn = "task",
    progress: bool = False,
) -> EvaluationOutput | None:
    """Detect in every image once; the detections on rank 0, None on the others. Collective.

    Args: see `evaluate`.
    """
    # 1. This worker's images.
    config = detector.config
    batches = evaluation_stream(
        shards,
        canvas=config.input_size,
        micro_batch_size=micro_batch_size,
        rank=rank,
        world_size=world_size,
        broadcast=broadcast,
        decode_in=decode_in,
    )

    # 2. Detect batch after batch; time spent waiting for images is counted apart.
    diagnostics = LayerDiagnostics(config, device)
    tables = []
    waited, started_at = 0.0, time.perf_counter()
    number = ceil(shards.manifest.images / (micro_batch_size * world_size))
    bar = Progress("evaluating", total=number, unit="batch") if progress and rank == 0 else nullcontext()
    with bar as visible_bar, evaluation_mode(detector), torch.no_grad(), torch.autocast(device.type, enabled=False):
        while True:
            asked_at = time.perf_counter()
            batch = next(batches, None)
            waited += time.perf_counter() - asked_at
            if batch is None:
                break
            tables.append(_detect_batch(detector, batch, diagnostics, device))
            if visible_bar is not None:
                visible_bar.advance(1)

    # 3. Gather on rank 0.
    table = gather(concatenate(tables), rank, world_size)
    diagnostics.reduce(world_size)
    if table is None:
        return None
    seconds = {"data": waited, "model": time.perf_counter() - started_at - waited}
    return EvaluationOutput(table, diagnostics.numbers(), seconds)


def compute_report(output: EvaluationOutput, ground_truth: GroundTruth, *, final: bool = False) -> EvaluationReport:
    """Compute metrics and error analysis from the detections in all images of the ground truth.

    Args:
        final: see `evaluate`.
    """
    # 1. COCO metrics by hotcoco.
    started_at = time.perf_counter()
    run = run_hotcoco(ground_truth, output.detections)
    fast = result = result_of(run, ground_truth)
    seconds = output.seconds | {"evaluator": time.perf_counter() - started_at}

    # 2. The final numbers by pycocotools.
    if final:
        started_at = time.perf_counter()
        result = coco_numbers(ground_truth, output.detections, evaluator="pycocotools")
        seconds["pycocotools"] = time.perf_counter() - started_at
        if difference(fast, result) > EQUAL:
            log.error(
                "hotcoco and pycocotools disagree by %.2g (AP %.6f and %.6f): pycocotools' numbers are reported, but those"
                " of earlier evaluations and the error analysis are in doubt; try another version of hotcoco",
                *(difference(fast, result), fast.numbers["AP"], result.numbers["AP"]),
            )

    # 3. Error analysis.
    started_at = time.perf_counter()
    curves, errors = precision_recall(result), tide_errors(run)
    confusion_matrix = confusion(ground_truth, output.detections)
    seconds["analysis"] = time.perf_counter() - started_at
    return EvaluationReport(
        numbers=result.numbers,
        per_class=result.per_class,
        curves=curves,
        confusion=confusion_matrix,
        errors=errors,
        layers=output.layers,
        images=len(ground_truth.image_id),
        seconds=seconds,
        evaluator=result.evaluator,
        agreement=difference(fast, result) if final else None,
    )


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Eval mode inside the block; afterwards every part is in its former mode, even where these differ."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


def _detect_batch(
    detector: Detector, batch: Batch, diagnostics: LayerDiagnostics, device: torch.device
) -> DetectionTable:
    images = batch.images.to(device, non_blocking=True)
    detections, output = predict_batch(detector, images, batch.orig_size.to(device), every_layer=True)
    diagnostics.update(output, Targets.pack(batch.targets(), detector.config.num_classes, device))
    return DetectionTable.from_batch(detections, batch.image_id, batch.padding)
