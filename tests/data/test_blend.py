"""Mixup and copy-paste within a micro-batch, against the recorded batch and pixels set by hand."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from pipeline.data.augment.blend import Blend, Paste, blended_targets, draw_blend, ringed
from pipeline.data.augment.blend_pixels import blend_images
from pipeline.data.augment.photometric_parameters import identity_photometric
from pipeline.data.augment.samples import Sample
from pipeline.data.augment.settings import AugmentSettings

RECORDED = json.loads((Path(__file__).parents[1] / "golden" / "mixup_201.json").read_text())
HEIGHT, WIDTH = 40, 60
MIXUP = AugmentSettings(mixup_probability=1)
PASTE = AugmentSettings(copy_paste_probability=1)


def plain(level: int, boxes: list[list[float]], *, area: float | None = None) -> Sample:
    """A canvas of one grey level, with boxes cxcywh in pixels that all bear the level as their label."""
    array = np.array(boxes, np.float32).reshape(-1, 4)
    return Sample(
        image=np.full((HEIGHT, WIDTH, 3), level, np.uint8),
        boxes=array / np.array([WIDTH, HEIGHT] * 2, np.float32),
        labels=np.full(len(array), level, np.int64),
        areas=array[:, 2:].prod(axis=1) if area is None else np.full(len(array), area, np.float32),
        photometric=identity_photometric(),
    )


def as_tensor(samples: list[Sample]) -> torch.Tensor:
    return torch.from_numpy(np.stack([sample.image for sample in samples])).permute(0, 3, 1, 2).float()


def drawn(samples: list[Sample], settings: AugmentSettings, **key: int) -> tuple[Blend, list[NDArray[np.float32]]]:
    blend, pasted = draw_blend(samples, **({"seed": 0, "step": 0, "micro_batch": 0} | key), settings=settings)
    return blend, blended_targets(samples, blend, pasted)[0]


def test_the_defaults_blend_nothing() -> None:
    samples = [plain(50, [[30, 20, 10, 10]]), plain(100, [])]
    blend, boxes = drawn(samples, AugmentSettings())
    images = as_tensor(samples)
    assert blend == Blend()
    assert blend_images(images, blend) is images
    assert boxes[0] is samples[0].boxes


def test_mixup_is_that_of_the_published_batch() -> None:
    before, after = RECORDED["before"], RECORDED["after"]
    images = torch.tensor([image["colour"] for image in before]).view(-1, 3, 1, 1)
    samples = [
        replace(
            plain(0, []),
            boxes=np.array(image["boxes"], np.float32).reshape(-1, 4),
            labels=np.array(image["labels"], np.int64),
        )
        for image in before
    ]
    blend = Blend(RECORDED["ratio_of_own"])
    expected = torch.tensor([image["colour"] for image in after]).view(-1, 3, 1, 1)
    torch.testing.assert_close(blend_images(images, blend), expected, atol=1e-6, rtol=0)
    boxes, labels, _ = blended_targets(samples, blend, [])
    for image, box, label in zip(after, boxes, labels, strict=True):
        np.testing.assert_allclose(box, image["boxes"], atol=1e-7)
        assert label.tolist() == image["labels"]
    assert len(boxes) == 3


def test_the_rates_are_the_given_ones_and_both_never_happen_together() -> None:
    samples = [plain(50, [[30, 20, 20, 20]]), plain(100, [[30, 20, 20, 20]])]
    settings = AugmentSettings(mixup_probability=0.5, copy_paste_probability=0.5)
    count = 2000
    blends = [drawn(samples, settings, step=step)[0] for step in range(count)]
    mixed = sum(blend.ratio < 1 and not blend.pastes for blend in blends)
    pasted = sum(bool(blend.pastes) for blend in blends)
    for number, rate in ((mixed, 0.5), (pasted, 0.25)):
        assert abs(number - rate * count) < 3 * np.sqrt(rate * (1 - rate) * count)
    ratios = [blend.ratio for blend in blends if blend.ratio < 1]
    assert min(ratios) >= 0.45
    assert max(ratios) <= 0.55
    assert np.mean(ratios) == pytest.approx(0.5, abs=0.005)


@pytest.mark.parametrize("settings", [MIXUP, PASTE])
def test_a_blend_is_keyed_by_seed_step_and_micro_batch(settings: AugmentSettings) -> None:
    samples = [plain(20 * n, [[30, 20, 20, 20]]) for n in range(1, 5)]
    blend, _ = drawn(samples, settings)
    assert blend == drawn(samples, settings)[0]
    for key in ({"seed": 1}, {"step": 1}, {"micro_batch": 1}):
        assert blend != drawn(samples, settings, **key)[0]


@pytest.mark.parametrize("settings", [MIXUP, PASTE])
def test_a_single_image_is_not_blended(settings: AugmentSettings) -> None:
    assert drawn([plain(50, [[30, 20, 20, 20]])], settings)[0] == Blend()


@pytest.mark.parametrize(
    ("to", "expected"),
    [
        ((70, 5), Paste(0, 1, 16, 33, 66, 3, 28, 14)),
        ((80, 0), Paste(0, 1, 16, 35, 76, 0, 24, 12)),
    ],
)
def test_a_ring_is_cut_alike_where_either_canvas_ends(to: tuple[int, int], expected: Paste) -> None:
    assert ringed(0, 1, (20, 35, 40, 45), to, 0.2, 100, 100) == expected


def test_pastes_blend_unchanged_pixels_over_earlier_pastes() -> None:
    images = torch.zeros(2, 3, 10, 10)
    images[1] = 1
    first, second = Paste(0, 1, 0, 0, 2, 2, 4, 4), Paste(0, 1, 3, 3, 4, 4, 4, 4)
    back = Paste(1, 0, 2, 2, 0, 0, 3, 3)  # of what the first one has changed
    blended = blend_images(images, Blend(0.5, (first, second, back)))
    expected = images.clone()
    expected[0, :, 2:6, 2:6] = 0.5
    expected[0, :, 4:8, 4:8] = 0.5
    expected[0, :, 4:6, 4:6] = 0.75
    expected[1, :, 0:3, 0:3] = 0.5
    torch.testing.assert_close(blended, expected)
    assert not images[0].any()  # a batch is read only


def test_pasted_objects_come_with_their_boxes_and_pixels() -> None:
    samples = [plain(50, []), plain(200, [[30, 20, 20, 10], [10, 10, 12, 12]])]
    opaque = replace(PASTE, copy_paste_ratio=(0, 0), copy_paste_ring=(0, 0))
    for step in range(20):
        blend, boxes = drawn(samples, opaque, step=step)
        blended = blend_images(as_tensor(samples), blend)
        assert (len(boxes[0]), len(boxes[1])) == (2, 4)  # the pool has two objects, and at most three are taken
        mask = torch.zeros(HEIGHT, WIDTH, dtype=torch.bool)
        for x, y, width, height in (boxes[0] * np.array([WIDTH, HEIGHT] * 2)).round(4).tolist():
            left, top = round(x - width / 2), round(y - height / 2)
            assert 0 <= left <= WIDTH - width
            assert 0 <= top <= HEIGHT - height
            mask[top : top + round(height), left : left + round(width)] = True
        assert (blended[0, 0] == torch.where(mask, 200, 50)).all()


def test_at_most_the_given_number_of_objects_of_the_given_area_is_pasted() -> None:
    small, large = plain(50, [[30, 20, 20, 20]] * 9, area=99.0), plain(100, [[10, 10, 12, 12]] * 5, area=100.0)
    blend, boxes = drawn([small, large], PASTE)
    assert [len(each) for each in boxes] == [9 + 3, 5 + 3]
    assert all(paste.source == 1 for paste in blend.pastes)
    assert drawn([small, small], PASTE)[0] == Blend()


def test_images_without_objects_can_be_blended() -> None:
    empty = [plain(50, []), plain(150, [])]
    blend, boxes = drawn(empty, MIXUP)
    assert [each.shape for each in boxes] == [(0, 4), (0, 4)]
    assert blend_images(as_tensor(empty), blend)[0].unique().item() == pytest.approx(150 - 100 * blend.ratio)
    assert drawn(empty, PASTE)[0] == Blend()
