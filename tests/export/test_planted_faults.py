"""Faults that runtimes really have, planted into a detector one at a time: the gate refuses each, on images that hide it too."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

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

MODEL = loaded(small(num_layers=1))
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


def verdicts_on(faults: dict[str, Callable[..., Detections]], check_set: CheckSet) -> dict[str, GateVerdict]:
    """Verdicts about all faults in one pass: the detector runs once for them."""
    subjects = {
        name: GateSubject(Path("none"), (Opening("faulty", lambda *_, fault=fault: fault),), FULL)
        for name, fault in faults.items()
    }
    return check_subjects(MODEL, subjects, check_set)


def changed(check_set: CheckSet, change: Callable[[CheckBatch], CheckBatch]) -> CheckSet:
    return replace(check_set, batches=lambda size: map(change, check_set.batches(size)))


def tail_lost(found: Detections) -> Detections:
    """Detections whose scores are lost behind those whose boxes are compared."""
    return replace(found, scores=torch.where(torch.arange(found.scores.shape[1]) < 20, found.scores, 0.0))


IMAGES = from_synthetic_images(2, longest_side=96)
ONE_IMAGE = from_synthetic_images(1, longest_side=96)
INPUT_SIZED = changed(ONE_IMAGE, lambda batch: replace(batch, sizes=torch.full_like(batch.sizes, SIDE)))
GREY = changed(ONE_IMAGE, lambda batch: replace(batch, pixels=batch.pixels[:, :1].expand(-1, 3, -1, -1).contiguous()))


@pytest.fixture(scope="module")
def verdicts() -> dict[str, GateVerdict]:
    right = {"none": detect, "tail lost": lambda p, s: detect(p, s, change=tail_lost)}
    return verdicts_on({**right, **FAULTS}, IMAGES)


def test_a_detector_without_a_fault_is_accepted(verdicts: dict[str, GateVerdict]) -> None:
    assert verdicts["none"].accepted, verdicts["none"]
    assert set(verdicts["none"].rows[0].measured) > {"agreeing", "scores_agreeing", "agreeing on plain surfaces"}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_refused(name: str, verdicts: dict[str, GateVerdict]) -> None:
    assert not verdicts[name].accepted, verdicts[name]


@pytest.mark.parametrize(
    ("names", "check_set", "where"),
    [
        (("rows mixed", "first row for all"), ONE_IMAGE, "a batch of different images"),
        (("boxes in pixels of the input", "width and height swapped"), INPUT_SIZED, "other original sizes"),
        (("BGR for RGB",), GREY, "swapped colours"),
    ],
)
def test_images_that_hide_a_fault_do_not_hide_it_from_the_probes(
    names: tuple[str, ...], check_set: CheckSet, where: str
) -> None:
    found = verdicts_on({"none": detect, **{name: FAULTS[name] for name in names}}, check_set)
    assert found.pop("none").accepted
    for verdict in found.values():
        (row,) = verdict.rows
        assert row.measured["agreeing"] == pytest.approx(1)  # all that a single pass over the images shows
        assert where in str(verdict.reason)


def test_faults_of_the_tail_show_in_scores_beyond_those_whose_boxes_are_compared(
    verdicts: dict[str, GateVerdict],
) -> None:
    assert "returns boxes of shape" in str(verdicts["100 detections"].reason)
    assert verdicts["tail lost"].rows[0].measured["agreeing"] == pytest.approx(1)
    assert "of all its scores agree, rank by rank" in str(verdicts["tail lost"].reason)
