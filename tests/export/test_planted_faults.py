"""Faults that runtimes really have, planted into a detector one at a time: the gate refuses each, on images that hide it too."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dfine_core.agreement import FULL
from dfine_core.inference import predict_batch
from dfine_core.model import attention
from dfine_core.model.postprocess import MAX_DETECTIONS, Detections, postprocess
from pipeline.export.check_images import CheckBatch, CheckSet, from_synthetic_images
from pipeline.export.formats import Opening
from pipeline.export.gate import GateSubject, GateVerdict, check_subjects
from tests.support.varied_detectors import loaded, small

MODEL = loaded(small())
SIDE = 64
softmax = torch.Tensor.softmax


@torch.no_grad()
def detect(
    pixels: Tensor,
    sizes: Tensor,
    *,
    scale: float = 1 / 255,
    logits: Callable[[Tensor], Tensor] = lambda logits: logits,
    change: Callable[[Detections], Detections] = lambda found: found,
    patched: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> Detections:
    with patched():
        _, output = predict_batch(MODEL.detector, pixels.float() * scale, sizes)
    keep = min(MAX_DETECTIONS, output.logits[0].numel())
    return change(postprocess(logits(output.logits), output.boxes, sizes, keep))


def half_a_cell_off() -> AbstractContextManager[object]:
    def shifted(level: Tensor, locations: Tensor) -> Tensor:
        cell = 2 / torch.tensor([level.shape[-1], level.shape[-2]])
        return F.grid_sample(level, locations + cell / 2, mode="bilinear", padding_mode="zeros", align_corners=False)

    return patch.object(attention, "_bilinear", shifted)


def half_softmax() -> AbstractContextManager[object]:
    return patch.object(torch.Tensor, "softmax", lambda self, dim: softmax(self.half(), dim).float())


def every(found: Detections, change: Callable[[Tensor], Tensor]) -> Detections:
    return Detections(**{name: change(tensor) for name, tensor in vars(found).items()})


FAULTS: dict[str, Callable[[Tensor, Tensor], Detections]] = {
    "sampling off by half a cell": lambda p, s: detect(p, s, patched=half_a_cell_off),
    "softmax in half precision": lambda p, s: detect(p, s, patched=half_softmax),
    "class ids shifted": lambda p, s: detect(p, s, change=lambda found: replace(found, labels=found.labels + 1)),
    "rows mixed": lambda p, s: detect(p, s, change=lambda found: every(found, lambda tensor: tensor.roll(1, 0))),
    "first row for all": lambda p, s: detect(
        p, s, change=lambda found: every(found, lambda tensor: tensor[:1].expand_as(tensor))
    ),
    "boxes in pixels of the input": lambda p, s: detect(p, torch.full_like(s, SIDE)),
    "boxes in units of the image": lambda p, s: detect(p, torch.ones_like(s)),
    "boxes as centre and size": lambda p, s: detect(
        p, s, change=lambda f: replace(f, boxes=torch.cat([f.boxes[..., :2], f.boxes[..., 2:] - f.boxes[..., :2]], -1))
    ),
    "width and height swapped": lambda p, s: detect(p, s.flip(1)),
    "BGR for RGB": lambda p, s: detect(p.flip(1), s),
    "not divided by 255": lambda p, s: detect(p, s, scale=1.0),
    "negative logits clipped": lambda p, s: detect(p, s, logits=lambda logits: logits.clamp(min=0)),
    "100 detections": lambda p, s: detect(p, s, change=lambda found: every(found, lambda tensor: tensor[:, :100])),
}


def verdict_on(fault: Callable[[Tensor, Tensor], Detections], check_set: CheckSet) -> GateVerdict:
    subject = GateSubject(Path("none"), (Opening("faulty", lambda *_: fault),), FULL)
    return check_subjects(MODEL, {"file": subject}, check_set)["file"]


def changed(check_set: CheckSet, change: Callable[[CheckBatch], CheckBatch]) -> CheckSet:
    return replace(check_set, batches=lambda size: map(change, check_set.batches(size)))


IMAGES = from_synthetic_images(3, longest_side=96)
ONE_IMAGE = from_synthetic_images(1, longest_side=96)
INPUT_SIZED = changed(IMAGES, lambda batch: replace(batch, sizes=torch.full_like(batch.sizes, SIDE)))
GREY = changed(IMAGES, lambda batch: replace(batch, pixels=batch.pixels[:, :1].expand(-1, 3, -1, -1).contiguous()))


def test_a_detector_without_a_fault_is_accepted() -> None:
    for check_set in (IMAGES, ONE_IMAGE, INPUT_SIZED, GREY):
        verdict = verdict_on(detect, check_set)
        assert verdict.accepted, verdict


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_refused(name: str) -> None:
    assert not verdict_on(FAULTS[name], IMAGES).accepted


@pytest.mark.parametrize(
    ("name", "check_set", "where"),
    [
        ("rows mixed", ONE_IMAGE, "batch of different images"),
        ("first row for all", ONE_IMAGE, "batch of different images"),
        ("boxes in pixels of the input", INPUT_SIZED, "other original sizes"),
        ("width and height swapped", INPUT_SIZED, "other original sizes"),
        ("BGR for RGB", GREY, "swapped colours"),
    ],
)
def test_images_that_hide_a_fault_do_not_hide_it_from_the_probes(name: str, check_set: CheckSet, where: str) -> None:
    verdict = verdict_on(FAULTS[name], check_set)
    (row,) = verdict.rows
    assert row.measured["agreeing"] == pytest.approx(1)  # all that was compared before there were probes
    assert where in str(verdict.reason)


def test_faults_of_the_tail_show_in_scores_beyond_those_whose_boxes_are_compared() -> None:
    assert "returns boxes of shape" in str(verdict_on(FAULTS["100 detections"], IMAGES).reason)

    def tail_lost(found: Detections) -> Detections:
        return replace(found, scores=torch.where(torch.arange(found.scores.shape[1]) < 20, found.scores, 0.0))

    verdict = verdict_on(lambda p, s: detect(p, s, change=tail_lost), IMAGES)
    assert np.isclose(verdict.rows[0].measured["agreeing"], 1)
    assert "of all its scores agree, rank by rank" in str(verdict.reason)
