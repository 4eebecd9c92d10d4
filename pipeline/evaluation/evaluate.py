"""One evaluation: detect in every image of a shard set, on all workers, and compute the metrics on all of them.

Each worker writes the detections in its images to files. Then each reads some classes of all images, and writes their metrics;
rank 0 joins them. The result is the same for any number of workers.
"""

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from math import ceil
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from dfine_core import Detector
from dfine_core.inference import predict_batch
from dfine_core.structures import Targets
from dfine_core.thresholds import WANTED_PRECISION
from pipeline.data.shards.manifest import ShardSet
from pipeline.data.stream.batch import Batch
from pipeline.data.stream.settings import DecodeIn
from pipeline.data.stream.share import Broadcast
from pipeline.data.stream.stream import evaluation_stream
from pipeline.evaluation.analysis import confusion, precision_recall
from pipeline.evaluation.class_shards import (
    EXACT_SHARD_DETECTIONS,
    SHARD_DETECTIONS,
    ClassResults,
    await_classes,
    class_ranges,
    evaluate_classes,
    exact_images,
    share_classes,
)
from pipeline.evaluation.coco_metrics import EQUAL, difference, result_of
from pipeline.evaluation.decoder_layers import LayerDiagnostics
from pipeline.evaluation.detections import DetectionTable
from pipeline.evaluation.error_types import errors_of
from pipeline.evaluation.exchange import exchange_folder
from pipeline.evaluation.ground_truth import GroundTruth, read_ground_truth
from pipeline.evaluation.image_shards import ImageResults, await_image_shards, write_image_shard
from pipeline.evaluation.operating_points import OperatingPoints, points_of
from pipeline.evaluation.report import EvaluationReport
from pipeline.progress import Progress

log = logging.getLogger(__name__)


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
    shared: str | None = None,
    micro_batch_size: int,
    decode_in: DecodeIn = "task",
    final: bool = False,
    wanted_precision: float = WANTED_PRECISION,
    progress: bool = False,
    on_detections: Callable[[DetectionTable], None] | None = None,
) -> EvaluationReport | None:
    """Evaluate a detector; the report on rank 0, None on the others. Collective.

    Args:
        detector: evaluated in eval mode and float32; afterwards every part is in its former mode.
        ground_truth: read from the shards if None.
        shared: folder or URI for files between several workers, which all of them can read and nothing else uses.
        micro_batch_size: images per batch and worker.
        final: report the numbers of pycocotools, or compare it with hotcoco on a sample of a large set.
        wanted_precision: look for the lowest score of every class that reaches it.
        progress: display a progress bar, on rank 0.
        on_detections: receives the detections of this worker, batch after batch.
    """
    ground_truth = read_ground_truth(shards) if ground_truth is None else ground_truth
    diagnostics = LayerDiagnostics(detector.config, device)
    batches = evaluation_stream(
        shards,
        canvas=detector.config.input_size,
        micro_batch_size=micro_batch_size,
        rank=rank,
        world_size=world_size,
        broadcast=broadcast,
        decode_in=decode_in,
    )
    number = ceil(shards.manifest.images / (micro_batch_size * world_size))
    bar = Progress("evaluating", total=number, unit="batch") if progress and rank == 0 else nullcontext()
    waiting = {"data": 0.0}

    def tables() -> Iterator[DetectionTable]:
        for batch in _timed(batches, waiting):
            table = _detect_batch(detector, batch, diagnostics, device)
            if on_detections is not None:
                on_detections(table)
            if visible_bar is not None:
                visible_bar.advance(1)
            yield table

    with exchange_folder(shared, rank, world_size, broadcast) as folder:
        started_at = time.perf_counter()
        with bar as visible_bar, evaluation_mode(detector), torch.no_grad(), torch.autocast(device.type, enabled=False):
            analysis_s = write_image_shard(folder, rank, ground_truth, tables(), diagnostics.state)
        detected_s = time.perf_counter() - started_at
        seconds = waiting | {"model": detected_s - waiting["data"] - analysis_s, "analysis": analysis_s}
        return _report(folder, ground_truth, diagnostics.numbers, seconds, rank, world_size, final, wanted_precision)


def evaluate_detections(
    tables: Iterable[DetectionTable],
    ground_truth: GroundTruth,
    *,
    rank: int = 0,
    world_size: int = 1,
    broadcast: Broadcast = _itself,
    shared: str | None = None,
    final: bool = False,
    wanted_precision: float = WANTED_PRECISION,
) -> EvaluationReport | None:
    """Evaluate detections that are there already; like `evaluate`, without the behaviour of the layers.

    Args:
        tables: of this worker, each with all detections of its images.
    """
    with exchange_folder(shared, rank, world_size, broadcast) as folder:
        analysis_s = write_image_shard(folder, rank, ground_truth, tables, lambda: np.zeros(0))
        seconds = {"analysis": analysis_s}
        return _report(folder, ground_truth, lambda _: {}, seconds, rank, world_size, final, wanted_precision)


def _report(
    folder: str,
    ground_truth: GroundTruth,
    layers: Callable[[NDArray[np.float64]], dict[str, float]],
    seconds: dict[str, float],
    rank: int,
    world_size: int,
    final: bool,
    wanted_precision: float,
) -> EvaluationReport | None:
    """Evaluate this worker's classes; on rank 0 join those of all workers to a report."""
    # 1. pycocotools sees all images of a small set, and a sample of a large one.
    shards = await_image_shards(folder, world_size)
    detections = shards.results.detections.sum(0)  # [K]
    exact = exact_images(ground_truth, int(detections.sum())) if final else None

    # 2. The classes of this worker, then those of all.
    limit = EXACT_SHARD_DETECTIONS if exact is ground_truth else SHARD_DETECTIONS
    overhead = 1 if exact is None else len(exact.image_id)
    ranges = class_ranges(detections, limit, world_size, overhead=overhead)
    own = {}
    for classes in ranges[rank::world_size]:
        results = evaluate_classes(shards, ground_truth, classes, exact, seconds, wanted_precision)
        if rank > 0:
            share_classes(folder, classes, results)
        else:
            own[classes] = results
    if rank > 0:
        return None
    every = await_classes(folder, ranges, own)
    points = points_of(every.points, wanted_precision)
    return _joined(shards.results, every, ground_truth, exact, points, layers(shards.results.layers), seconds)


def _joined(
    images: ImageResults,
    classes: ClassResults,
    ground_truth: GroundTruth,
    exact: GroundTruth | None,
    points: OperatingPoints,
    layers: dict[str, float],
    seconds: dict[str, float],
) -> EvaluationReport:
    # 1. The numbers, by pycocotools if it has seen all images.
    result, differ_by = result_of(classes.fast, ground_truth, "hotcoco"), None
    if exact is not None:
        assert classes.compared is not None
        same, other = classes.compared
        fast, slow = result_of(same, exact, "hotcoco"), result_of(other, exact, "pycocotools")
        differ_by = difference(fast, slow)
        if exact is ground_truth:
            result = slow
        if differ_by > EQUAL:
            log.error(
                "hotcoco and pycocotools disagree by %.2g on %d images (AP %.6f and %.6f): pycocotools is right, so numbers by"
                " hotcoco and the error analysis are in doubt; try another version of hotcoco",
                *(differ_by, len(exact.image_id), fast.numbers["AP"], slow.numbers["AP"]),
            )

    # 2. The errors, with the missed boxes.
    counted = ground_truth.counted_boxes_of_class
    counts = np.append(images.false_positives, counted.sum() - images.accounted.sum())
    return EvaluationReport(
        numbers=result.numbers,
        per_class=result.per_class,
        points=points,
        curves=precision_recall(result),
        confusion=confusion(images.confusion, ground_truth),
        errors=errors_of(counts, classes.gains, counted),
        layers=layers,
        images=len(ground_truth.image_id),
        seconds=seconds,
        evaluator=result.evaluator,
        agreement=differ_by,
        agreement_images=None if exact is None else len(exact.image_id),
    )


def _timed(batches: Iterator[Batch], waiting: dict[str, float]) -> Iterator[Batch]:
    """Yield the batches, and add the seconds that they are waited for to `waiting`."""
    while True:
        asked_at = time.perf_counter()
        batch = next(batches, None)
        waiting["data"] += time.perf_counter() - asked_at
        if batch is None:
            return
        yield batch


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
