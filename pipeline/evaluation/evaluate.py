"""One evaluation: detect in every image of a shard set, over all workers, and judge what was found on rank 0."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from math import ceil
from typing import Any

import torch
from torch import nn

from dfine_core.config import ModelConfig
from dfine_core.inference import predict_batch
from dfine_core.structures import Targets
from pipeline.data.shards.manifest import ShardSet
from pipeline.data.stream.batch import Batch
from pipeline.data.stream.settings import DecodeIn
from pipeline.data.stream.stream import Broadcast, evaluation_stream
from pipeline.evaluation.analysis import confusion, precision_recall, tide_errors
from pipeline.evaluation.coco_metrics import EQUAL, coco_numbers, difference, result_of, run_hotcoco
from pipeline.evaluation.decoder_layers import LayerDiagnostics
from pipeline.evaluation.detections import DetectionTable, concatenate, gather
from pipeline.evaluation.ground_truth import GroundTruth, read_ground_truth
from pipeline.evaluation.report import EvaluationReport
from pipeline.progress import Progress

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Found:
    """What a detector found in all images, on rank 0."""

    detections: DetectionTable
    layers: dict[str, float]  # see `LayerDiagnostics.numbers`
    seconds: dict[str, float]  # of rank 0: "data", waited for images; "model", the rest


def _itself(value: Any) -> Any:
    return value


def evaluate(
    detector: nn.Module,
    shards: ShardSet,
    truth: GroundTruth | None = None,
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
    """Detect and judge; the report on rank 0, None on the others. Collective.

    Args:
        detector: a `Detector`; evaluated in eval mode and float32, and left in the modes that it was in.
        truth: read from the shards if None; only rank 0 looks at it.
        micro_batch_size: images that a worker holds at a time.
        final: let pycocotools have the last word, and compare.
        progress: show it, on rank 0.
    """
    found = detect(
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
    if found is None:
        return None
    return judge(found, read_ground_truth(shards) if truth is None else truth, final=final)


def detect(
    detector: nn.Module,
    shards: ShardSet,
    *,
    device: torch.device,
    rank: int = 0,
    world_size: int = 1,
    broadcast: Broadcast = _itself,
    micro_batch_size: int,
    decode_in: DecodeIn = "task",
    progress: bool = False,
) -> Found | None:
    """The detections of every image, once, on rank 0; None on the others. Collective; arguments as of `evaluate`."""
    config: ModelConfig = detector.config  # type: ignore[assignment]
    batches = evaluation_stream(
        shards,
        canvas=config.input_size,
        micro_batch_size=micro_batch_size,
        rank=rank,
        world_size=world_size,
        broadcast=broadcast,
        decode_in=decode_in,
    )
    diagnostics = LayerDiagnostics(config, device)
    tables = []
    waited, started_at = 0.0, time.perf_counter()
    number = ceil(shards.manifest.images / (micro_batch_size * world_size))
    bar = Progress("evaluating", total=number, unit="batch") if progress and rank == 0 else nullcontext()
    with bar as shown, evaluation_mode(detector), torch.no_grad(), torch.autocast(device.type, enabled=False):
        while True:
            asked_at = time.perf_counter()
            batch = next(batches, None)
            waited += time.perf_counter() - asked_at
            if batch is None:
                break
            tables.append(_detections(detector, config, batch, diagnostics, device))
            if shown is not None:
                shown.advance(1)
    table = gather(concatenate(tables), rank, world_size)
    diagnostics.reduce(world_size)
    if table is None:
        return None
    seconds = {"data": waited, "model": time.perf_counter() - started_at - waited}
    return Found(table, diagnostics.numbers(), seconds)


def judge(found: Found, truth: GroundTruth, *, final: bool = False) -> EvaluationReport:
    """Every number about the detections of all images of `truth`."""
    started_at = time.perf_counter()
    run = run_hotcoco(truth, found.detections)
    fast = result = result_of(run, truth)
    seconds = found.seconds | {"evaluator": time.perf_counter() - started_at}
    if final:
        started_at = time.perf_counter()
        result = coco_numbers(truth, found.detections, evaluator="pycocotools")
        seconds["pycocotools"] = time.perf_counter() - started_at
        if difference(fast, result) > EQUAL:
            log.error(
                "hotcoco and pycocotools disagree by %.2g (AP %.6f and %.6f): pycocotools' numbers are reported, but those"
                " of earlier evaluations and the error analysis are in doubt; try another version of hotcoco",
                *(difference(fast, result), fast.numbers["AP"], result.numbers["AP"]),
            )
    started_at = time.perf_counter()
    curves, confused, errors = precision_recall(result), confusion(truth, found.detections), tide_errors(run)
    seconds["analysis"] = time.perf_counter() - started_at
    return EvaluationReport(
        numbers=result.numbers,
        per_class=result.per_class,
        curves=curves,
        confusion=confused,
        errors=errors,
        layers=found.layers,
        images=len(truth.image_id),
        seconds=seconds,
        evaluator=result.evaluator,
        agreement=difference(fast, result) if final else None,
    )


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Eval mode inside; afterwards every part is in the mode that it was in, also where these differ."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


def _detections(
    detector: nn.Module, config: ModelConfig, batch: Batch, diagnostics: LayerDiagnostics, device: torch.device
) -> DetectionTable:
    images = batch.images.to(device, non_blocking=True)
    detections, output = predict_batch(detector, images, batch.orig_size.to(device), every_layer=True)
    diagnostics.update(output, Targets.pack(batch.targets(), config.num_classes, device))
    return DetectionTable.from_batch(detections, batch.image_id, batch.padding)
