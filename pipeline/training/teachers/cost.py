"""Cost of the teachers of a training: arithmetic counted, and a forward pass measured on this machine."""

import time
from collections.abc import Callable, Iterator
from functools import partial
from statistics import median

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from dfine_core import ModelConfig
from dfine_core.loss.teacher_boxes import teacher_box_losses
from dfine_core.model.distribution import weighting_function
from dfine_core.structures import DetectorOutput, QueryPredictions, Targets
from pipeline.config import Experiment
from pipeline.data.shards.teacher_boxes import load_teacher_boxes
from pipeline.training.budget import flops_per_image
from pipeline.training.context import ResolvedData
from pipeline.training.teachers.teachers import Teachers

PASSES = 3  # the median counts


def teacher_lines(experiment: Experiment, data: ResolvedData, student: ModelConfig, *, measured: bool) -> Iterator[str]:
    """Describe every teacher, and what it adds to a training step.

    Args:
        measured: time a forward pass of one image on this machine.
    """
    settings = experiment.teacher
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    teachers = Teachers(settings, student, device=device, seed=experiment.seed)
    boxes = round(data.train.statistics.boxes_per_image.mean)
    step = flops_per_image(student, boxes)
    images = torch.rand(1, 3, *student.input_size, device=device)
    for key, network, source in (
        ("teacher.features", teachers.vision, settings.features.model if settings.features else ""),
        ("teacher.detector", teachers.detector, settings.detector.weights if settings.detector else ""),
    ):
        if network is None:
            continue
        parameters = sum(p.numel() for p in network.parameters())
        counter = FlopCounterMode(display=False)
        with torch.no_grad(), counter:
            network(images)
        flops = counter.get_total_flops()
        yield f"{key}: {source}, {parameters / 1e6:.1f} million frozen parameters, digest {data.teachers[key][:12]}"
        yield (
            f"  counted: {flops / 1e9:.1f} GFLOP forward an image, {flops / step:+.0%} of a step's"
            f" {step / 1e9:.1f}{_measured(partial(network, images), device) if measured else ''}"
        )
    if settings.boxes is not None:
        yield from _box_lines(settings.boxes.folder, data, student, device, measured=measured)


def _box_lines(
    location: str, data: ResolvedData, student: ModelConfig, device: torch.device, *, measured: bool
) -> Iterator[str]:
    manifest = load_teacher_boxes(location, data.train.sets[0].shards.manifest.digest).manifest
    mean = manifest.boxes / max(1, data.train.images)
    yield (
        f"teacher.boxes: {location}, {mean:.1f} boxes an image, {manifest.images} of {data.train.images} images have"
        f" some, digest {manifest.digest[:12]}"
    )
    stages = student.num_layers + 2
    loss = _measured(_box_loss(student, max(1, round(mean)), device), device) if measured else ""
    yield f"  counted: no forward pass; {stages} further matchings an image{loss}"


def _box_loss(student: ModelConfig, boxes: int, device: torch.device) -> Callable[[], object]:
    """The loss of one image with random predictions, forward and backward."""
    layers, queries, classes = student.num_layers, student.num_queries, student.num_classes
    logits = torch.randn(layers, 1, queries, classes, device=device, requires_grad=True)
    placed = torch.rand(layers, 1, queries, 4, device=device, requires_grad=True)
    edges = (
        torch.randn(layers, 1, queries, 4, student.num_bins, device=device, requires_grad=True)
        if student.regression == "fdr"
        else None
    )
    encoder = logits[0, :, :, :1] if student.query_selection == "agnostic" else logits[0]
    output = DetectorOutput(
        logits[-1],
        placed[-1],
        matching=QueryPredictions(logits, placed, edges, logits[0], placed[0]),
        encoder_logits=encoder,
        encoder_boxes=placed[0],
    )
    target = {"labels": torch.zeros(boxes, dtype=torch.int64), "boxes": torch.full((boxes, 4), 0.5)}
    targets = Targets.pack([target], classes, device)
    bins = weighting_function(student.reg_max, student.up, student.reg_scale).to(device)
    scores, one = torch.full((boxes,), 0.5, device=device), torch.ones((), device=device)

    def run() -> None:
        terms: dict[str, Tensor] = teacher_box_losses(output, targets, scores, bins, one, student)
        torch.stack(list(terms.values())).sum().backward()

    return run


def _measured(run: Callable[[], object], device: torch.device) -> str:
    """Median time of `run`, as words; the first one warms up."""
    seconds: list[float] = []
    for _ in range(PASSES + 1):
        started_at = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started_at)
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return f"; measured here ({where}): {median(seconds[1:]):.3f} s an image"
