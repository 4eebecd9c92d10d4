"""The fused photometric distortion against the plain one. Run by `test_photometric_fused.py`, under Triton's interpreter."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.data.augment.photometric import fused_distortion, photometric_distort
from pipeline.data.augment.photometric_parameters import Photometric, draw_photometric, identity_photometric
from pipeline.data.augment.photometric_pixels import distort_pixels
from pipeline.data.augment.settings import AugmentSettings


def images_of(seed: int, count: int, height: int, width: int) -> Tensor:
    """[B, 3, H, W] on the 256 levels of photographs, with grey, black, white and saturated parts."""
    generator = torch.Generator().manual_seed(seed)
    images = (torch.rand(count, 3, height, width, generator=generator) ** 1.5 * 255).round() / 255
    images[:, :, :2] = images[:, :1, :2]
    images[:, :, 2, :3], images[:, :, 3, :3] = 0, 1
    images[:, 1:, 4, :3] = 0
    return images


def rows_of(seed: int, images: Tensor) -> Tensor:
    """[B, P] drawn parameters, each image in a part of its canvas."""
    generator = np.random.default_rng(seed)
    rows = np.stack([draw_photometric(generator, AugmentSettings()) for _ in images])
    rows[:, Photometric.MEAN_GREY] = images.mean((1, 2, 3)).numpy()
    rows[:, Photometric.LEFT :] = 1, 0, images.shape[3] - 2, images.shape[2]
    return torch.from_numpy(rows)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), count=st.integers(1, 3), height=st.integers(5, 40), width=st.integers(5, 50))
def test_every_pixel_is_that_of_the_plain_operators(seed: int, count: int, height: int, width: int) -> None:
    images = images_of(seed, count, height, width)
    rows = rows_of(seed, images)
    torch.testing.assert_close(fused_distortion(images, rows), photometric_distort(images, rows), atol=2e-6, rtol=0)


def test_every_pixel_is_the_nearest_level_of_the_distorted_photograph() -> None:
    images = images_of(1, 6, 30, 36)
    rows = rows_of(1, images)
    fused = fused_distortion(images, rows)
    for image, row, found in zip(images, rows, fused, strict=True):
        left, right = int(row[Photometric.LEFT]), int(row[Photometric.RIGHT])
        pixels = np.zeros((30, 36, 3), np.uint8)
        pixels[:, left:right] = (image.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)[:, left:right]
        distort_pixels(pixels, row.numpy())
        assert np.abs(found.permute(1, 2, 0).numpy() * 255 - pixels).max() <= 0.51


def test_identity_changes_nothing() -> None:
    images = images_of(2, 2, 7, 9)
    rows = torch.from_numpy(np.stack([identity_photometric()] * 2))
    rows[:, Photometric.LEFT :] = torch.tensor([0.0, 0, 9, 7])
    torch.testing.assert_close(fused_distortion(images, rows), images, atol=1e-6, rtol=0)


def test_channels_last_images_are_read_right() -> None:
    images = images_of(3, 2, 8, 12)
    rows = rows_of(3, images)
    assert torch.equal(
        fused_distortion(images.contiguous(memory_format=torch.channels_last), rows), fused_distortion(images, rows)
    )


def test_the_operator_is_registered_for_fake_tensors() -> None:
    images = images_of(4, 1, 6, 6)
    torch.library.opcheck(fused_distortion, (images, rows_of(4, images)), test_utils=("test_schema", "test_faketensor"))
