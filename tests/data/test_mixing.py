"""Mosaic, mixup and copy-paste, on canvases small enough to check by hand."""

from dataclasses import fields, replace

import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline.data.augment.mixing import copy_paste, mixed_batch, mixup, mosaic
from pipeline.data.augment.photometric_parameters import Photometric, identity_photometric
from pipeline.data.augment.samples import Sample
from pipeline.data.augment.settings import AugmentSettings

HEIGHT, WIDTH = 40, 60


def plain(level: int, boxes: list[list[float]], *, region: tuple[int, int, int, int] = (0, 0, WIDTH, HEIGHT)) -> Sample:
    """A canvas of one grey level, with boxes cxcywh in pixels that all bear the level as their label."""
    photometric = identity_photometric()
    photometric[Photometric.MEAN_GREY] = level / 255
    photometric[Photometric.LEFT :] = region
    left, top, right, bottom = region
    image = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    image[top:bottom, left:right] = level
    return Sample(
        image=image,
        boxes=np.array(boxes, np.float32).reshape(-1, 4) / np.array([WIDTH, HEIGHT] * 2, np.float32),
        labels=np.full(len(boxes), level, np.int64),
        photometric=photometric,
    )


def in_pixels(sample: Sample) -> NDArray[np.float64]:
    return sample.boxes.astype(np.float64) * [WIDTH, HEIGHT, WIDTH, HEIGHT]


def same(first: Sample, second: Sample) -> bool:
    return all(np.array_equal(getattr(first, f.name), getattr(second, f.name)) for f in fields(Sample))


def test_everything_is_off_by_default() -> None:
    samples = [plain(50, [[30, 20, 10, 10]]), plain(100, [])]
    assert all(
        mixed is sample
        for mixed, sample in zip(
            mixed_batch(samples, [1, 2], seed=0, epoch=0, settings=AugmentSettings()), samples, strict=True
        )
    )


def test_a_mosaic_shrinks_four_samples_around_its_centre() -> None:
    tiles = [plain(level, [[30, 20, 12, 8]]) for level in (50, 100, 150, 200)]
    joined = mosaic(tiles, centre_x=20, centre_y=30, min_box_size=1)
    assert (joined.image[:30, :20] == 50).all()
    assert (joined.image[:30, 20:] == 100).all()
    assert (joined.image[30:, :20] == 150).all()
    assert (joined.image[30:, 20:] == 200).all()
    expected = [[10, 15, 4, 6], [40, 15, 8, 6], [10, 35, 4, 2], [40, 35, 8, 2]]
    np.testing.assert_allclose(in_pixels(joined), expected, atol=1e-4)
    assert joined.labels.tolist() == [50, 100, 150, 200]
    areas = np.array([20 * 30, 40 * 30, 20 * 10, 40 * 10]) / (WIDTH * HEIGHT)
    assert joined.photometric[Photometric.MEAN_GREY] == pytest.approx((areas * [50, 100, 150, 200]).sum() / 255)
    assert joined.photometric[Photometric.LEFT :].tolist() == [0, 0, WIDTH, HEIGHT]


def test_a_mosaic_drops_what_becomes_too_small() -> None:
    tiles = [plain(level, [[30, 20, 12, 8]]) for level in (50, 100, 150, 200)]
    assert mosaic(tiles, 20, 30, min_box_size=3).labels.tolist() == [50, 100]


def test_a_mosaic_tile_shrunk_a_lot_still_fills_its_part() -> None:
    joined = mosaic([plain(50, [])] * 4, centre_x=6, centre_y=4, min_box_size=1)
    assert (joined.image == 50).all()


def test_mixup_is_the_weighted_mean_with_the_boxes_of_both() -> None:
    first = plain(50, [[30, 20, 12, 8]], region=(10, 0, 60, 30))
    second = plain(150, [[20, 10, 4, 4], [5, 5, 4, 4]], region=(0, 5, 40, 40))
    mixed = mixup(first, second, weight=0.4)
    expected = 0.6 * first.image.astype(float) + 0.4 * second.image
    assert np.abs(mixed.image - expected).max() <= 0.5
    assert mixed.labels.tolist() == [50, 150, 150]
    np.testing.assert_array_equal(in_pixels(mixed), np.concatenate([in_pixels(first), in_pixels(second)]))
    assert mixed.photometric[Photometric.LEFT :].tolist() == [0, 0, 60, 40]
    assert mixed.photometric[Photometric.MEAN_GREY] == pytest.approx(0.6 * 50 / 255 + 0.4 * 150 / 255)


def test_copy_paste_covers_and_drops_what_it_covers() -> None:
    below = plain(50, [[20, 20, 10, 10], [29, 20, 10, 10], [50, 30, 6, 6]])
    above = plain(150, [[20, 20, 14, 14], [50, 10, 8, 8]])
    pasted = copy_paste(below, above, np.array([True, False]), max_covered=0.7)
    assert (pasted.image[13:27, 13:27] == 150).all()
    assert (pasted.image == 50).sum() == 3 * (WIDTH * HEIGHT - 14 * 14)
    # The first object is covered wholly, the second by 3 of its 10 columns.
    assert pasted.labels.tolist() == [50, 50, 150]
    np.testing.assert_allclose(in_pixels(pasted), [[29, 20, 10, 10], [50, 30, 6, 6], [20, 20, 14, 14]], atol=1e-4)
    assert (below.image == 50).all()  # the partner's own sample is another's tile as well


def test_pasting_nothing_changes_nothing() -> None:
    below = plain(50, [[20, 20, 10, 10]], region=(5, 5, 30, 30))
    assert same(copy_paste(below, plain(150, [[9, 9, 4, 4]]), np.array([False]), 0.7), below)


@pytest.mark.parametrize("kind", ["mosaic_probability", "mixup_probability", "copy_paste_probability"])
def test_mixing_is_keyed_by_seed_epoch_and_image(kind: str) -> None:
    settings = replace(AugmentSettings(), **{kind: 1.0})
    samples = [plain(20 * n, [[30, 20, 10 + n, 10], [10, 10, 5, 5 + n]]) for n in range(1, 9)]
    image_ids = list(range(8))
    mixed = mixed_batch(samples, image_ids, seed=1, epoch=2, settings=settings)
    again = mixed_batch(samples, image_ids, seed=1, epoch=2, settings=settings)
    assert all(same(one, other) for one, other in zip(mixed, again, strict=True))
    assert not all(same(one, sample) for one, sample in zip(mixed, samples, strict=True))
    other = mixed_batch(samples, image_ids, seed=1, epoch=3, settings=settings)
    assert not all(same(one, two) for one, two in zip(mixed, other, strict=True))


def test_a_sample_without_partners_stays_as_it_is() -> None:
    settings = AugmentSettings(mosaic_probability=1, mixup_probability=1, copy_paste_probability=1)
    alone = plain(50, [[20, 20, 10, 10]])
    assert mixed_batch([alone], [3], seed=0, epoch=0, settings=settings)[0] is alone


def test_two_samples_and_samples_without_boxes_can_be_mixed() -> None:
    settings = AugmentSettings(mosaic_probability=1, mixup_probability=1, copy_paste_probability=1)
    mixed = mixed_batch([plain(50, []), plain(150, [])], [3, 4], seed=0, epoch=0, settings=settings)
    assert [sample.boxes.shape for sample in mixed] == [(0, 4), (0, 4)]
    assert all(sample.image.shape == (HEIGHT, WIDTH, 3) for sample in mixed)
