"""Photometric distortion on the device, against torchvision's functions and transform on whole images."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from pipeline.data.augment.photometric import leaves_unchanged, photometric_distort, resize_images
from pipeline.data.augment.photometric_parameters import (
    Photometric,
    draw_photometric,
    identity_photometric,
    mean_grey,
)
from pipeline.data.augment.photometric_pixels import distort_pixels
from pipeline.data.augment.settings import AugmentSettings

Row = dict[Photometric, float]


def random_images(count: int, height: int = 24, width: int = 30, seed: int = 0) -> Tensor:
    """[B, 3, H, W] with bright, dark, grey and saturated parts."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(count, 3, height, width, generator=generator) ** 1.5
    images[..., :4] = images[..., :1, :4]
    images[:, :, :3] = images[:, :1, :3]  # grey has no hue
    images[:, :, 4, :5], images[:, :, 5, :5] = 0, 1
    return images


def parameters(images: Tensor, *changes: Row) -> Tensor:
    """Parameters [B, P] of whole images."""
    rows = []
    for image, change in zip(images, changes, strict=True):
        row = identity_photometric()
        row[Photometric.MEAN_GREY] = F.rgb_to_grayscale(image).mean()
        row[Photometric.LEFT :] = 0, 0, image.shape[2], image.shape[1]
        for column, value in change.items():
            row[column] = value
        rows.append(torch.from_numpy(row))
    return torch.stack(rows)


def by_torchvision(image: Tensor, row: Tensor) -> Tensor:
    """The same distortion of one image [3, H, W], one operation after the other."""
    brightness, contrast, saturation, hue, contrast_first, *channels = row[: Photometric.MEAN_GREY].tolist()
    image = F.adjust_brightness(image, brightness)
    if contrast_first:
        image = F.adjust_contrast(image, contrast)
    image = F.adjust_hue(F.adjust_saturation(image, saturation), hue)
    if not contrast_first:
        image = F.adjust_contrast(image, contrast)
    return F.permute_channels(image, [int(channel) for channel in channels])


@pytest.mark.parametrize(
    "change",
    [
        {Photometric.BRIGHTNESS: 0.9},
        {Photometric.BRIGHTNESS: 1.12},
        {Photometric.CONTRAST: 0.5, Photometric.CONTRAST_FIRST: 1},
        {Photometric.CONTRAST: 1.5, Photometric.CONTRAST_FIRST: 0},
        {Photometric.SATURATION: 0.5},
        {Photometric.SATURATION: 1.5},
        {Photometric.HUE: 0.05},
        {Photometric.HUE: -0.05},
        {Photometric.HUE: 0.4},
        {Photometric.RED_FROM: 2, Photometric.GREEN_FROM: 0, Photometric.BLUE_FROM: 1},
        {Photometric.BRIGHTNESS: 0.9, Photometric.CONTRAST: 1.4, Photometric.CONTRAST_FIRST: 1, Photometric.HUE: 0.03},
    ],
)
def test_each_operation_equals_that_of_torchvision(change: Row) -> None:
    images = random_images(2)
    rows = parameters(images, change, change)
    expected = torch.stack([by_torchvision(image, row) for image, row in zip(images, rows, strict=True)])
    assert (expected - images).abs().max() > 0.02
    torch.testing.assert_close(photometric_distort(images, rows), expected, atol=2e-6, rtol=0)


def test_each_image_of_a_batch_gets_its_own_distortion() -> None:
    images = random_images(4)
    rows = parameters(
        images,
        {Photometric.HUE: 0.04},
        {},
        {Photometric.BRIGHTNESS: 0.9},
        {Photometric.RED_FROM: 1, Photometric.GREEN_FROM: 0},
    )
    together = photometric_distort(images, rows)
    for number in range(4):
        alone = photometric_distort(images[number : number + 1], rows[number : number + 1])
        torch.testing.assert_close(together[number], alone[0])
        torch.testing.assert_close(together[number], by_torchvision(images[number], rows[number]), atol=2e-6, rtol=0)


def test_identity_parameters_change_nothing() -> None:
    images = random_images(2)
    torch.testing.assert_close(photometric_distort(images, parameters(images, {}, {})), images, atol=1e-6, rtol=0)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32), left=st.integers(0, 20), top=st.integers(0, 15))
def test_only_the_image_is_distorted_and_fill_stays_zero(seed: int, left: int, top: int) -> None:
    row = draw_photometric(np.random.default_rng(seed), AugmentSettings(photometric_probability=1))
    inner = random_images(1, height=8, width=9, seed=seed)
    row[Photometric.MEAN_GREY] = F.rgb_to_grayscale(inner).mean()
    row[Photometric.LEFT :] = left, top, left + 9, top + 8
    canvas = torch.zeros(1, 3, 24, 30)
    canvas[..., top : top + 8, left : left + 9] = inner
    distorted = photometric_distort(canvas, torch.from_numpy(row).unsqueeze(0))
    assert distorted.min() >= 0
    assert distorted.max() <= 1
    whole = torch.from_numpy(row).clone()
    whole[Photometric.LEFT :] = torch.tensor([0, 0, 9, 8])
    part = distorted[..., top : top + 8, left : left + 9]
    torch.testing.assert_close(part, photometric_distort(inner, whole.unsqueeze(0)))
    assert distorted.count_nonzero() == part.count_nonzero()


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    left=st.integers(0, 20),
    top=st.integers(0, 15),
    grey=st.booleans(),
    wide=st.booleans(),
    probability=st.sampled_from([0.3, 1.0]),
)
def test_pixels_distorted_where_they_are_decoded_are_the_nearest_levels(
    seed: int, left: int, top: int, grey: bool, wide: bool, probability: float
) -> None:
    generator = np.random.default_rng(seed)
    hue = (-0.5, 0.5) if wide else (-0.05, 0.05)
    row = draw_photometric(generator, AugmentSettings(photometric_probability=probability, hue=hue))
    row[Photometric.MEAN_GREY] = generator.random()
    row[Photometric.LEFT :] = left, top, left + 9, top + 8
    image = np.zeros((24, 30, 3), np.uint8)
    image[top : top + 8, left : left + 9] = generator.integers(0, 256, (8, 9, 1 if grey else 3))
    as_tensor = torch.from_numpy(image.copy()).permute(2, 0, 1).unsqueeze(0).float() / 255
    expected = photometric_distort(as_tensor, torch.from_numpy(row).unsqueeze(0))[0].permute(1, 2, 0) * 255

    settled = distort_pixels(image, row)
    np.testing.assert_allclose(image, expected.numpy(), atol=0.501, rtol=0)
    assert leaves_unchanged(torch.from_numpy(settled).unsqueeze(0))
    np.testing.assert_array_equal(settled[Photometric.MEAN_GREY :], row[Photometric.MEAN_GREY :])


@pytest.mark.parametrize("column", range(Photometric.MEAN_GREY))
def test_parameters_that_change_an_image_are_recognised(column: int) -> None:
    rows = torch.from_numpy(np.stack([identity_photometric()] * 3))
    assert leaves_unchanged(rows)
    rows[1, column] += 0.125
    assert leaves_unchanged(rows) == (column == Photometric.CONTRAST_FIRST)


def test_the_carried_mean_grey_costs_less_than_a_level() -> None:
    """Contrast after saturation and hue is relative to a mean that was not measured there; on saturated noise, which
    is worse than photographs (0.2 levels on average), the pixels stay within a level of 255 on average."""
    images = random_images(60)
    generator = np.random.default_rng(0)
    rows_drawn = [draw_photometric(generator, AugmentSettings()) for _ in images]
    rows = parameters(
        images, *({Photometric(c): float(row[c]) for c in range(Photometric.MEAN_GREY)} for row in rows_drawn)
    )
    expected = torch.stack([by_torchvision(image, row) for image, row in zip(images, rows, strict=True)])
    error = (photometric_distort(images, rows) - expected).abs().mean(dim=(1, 2, 3)) * 255
    assert error.mean() < 0.5
    assert error.max() < 3


@pytest.mark.parametrize("count", [2_000, pytest.param(20_000, marks=pytest.mark.slow)])
def test_colour_moments_are_those_of_the_released_transform_on_pillow(count: int) -> None:
    """Mean and spread, over draws, of each image's channel means and of its contrast: within 1.5 levels of 255 and
    four standard errors."""
    blocks = np.random.default_rng(1).integers(30, 220, (3, 4, 3)).astype(np.uint8)
    image = Image.fromarray(blocks)
    torch.manual_seed(0)
    released = v2.RandomPhotometricDistort(p=0.5)
    theirs = np.stack([moments(np.asarray(released(image), np.float64)) for _ in range(count)])

    generator = np.random.default_rng(0)
    rows = np.stack([draw_photometric(generator, AugmentSettings()) for _ in range(count)])
    rows[:, Photometric.MEAN_GREY] = mean_grey(blocks)
    rows[:, Photometric.LEFT :] = 0, 0, 4, 3
    images = torch.from_numpy(blocks).permute(2, 0, 1).expand(count, -1, -1, -1).float() / 255
    distorted = photometric_distort(images, torch.from_numpy(rows)).permute(0, 2, 3, 1).double().numpy() * 255
    ours = np.stack([moments(each) for each in distorted])

    tolerance = 1.5 + 4 * theirs.std(axis=0) * np.sqrt(2 / count)
    assert (np.abs(ours.mean(axis=0) - theirs.mean(axis=0)) < tolerance).all()
    assert (np.abs(ours.std(axis=0) - theirs.std(axis=0)) < tolerance).all()


def moments(image: np.ndarray) -> np.ndarray:
    """Moments of [H, W, 3]: the mean of each channel, the spread of grey, the mean distance from grey."""
    grey = image.mean(axis=2)
    return np.array([*image.mean(axis=(0, 1)), grey.std(), np.abs(image - grey[..., np.newaxis]).mean()])


def test_multiscale_resizing_is_that_of_pillow() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)
    images = torch.from_numpy(pixels).permute(2, 0, 1).unsqueeze(0).float() / 255
    for height, width in ((30, 37), (60, 50)):
        expected = Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR)
        resized = resize_images(images, (height, width))[0].permute(1, 2, 0).numpy() * 255
        assert np.abs(resized - np.asarray(expected)).max() < 1.01
    assert resize_images(images, (40, 50)) is images
