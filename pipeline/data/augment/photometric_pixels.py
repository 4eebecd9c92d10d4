"""Photometric distortion of one image where it is decoded, for trainings on a CPU: there OpenCV is several times cheaper than
the tensor operations of `photometric.py`, which it equals to the nearest of 256 levels.
"""

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.data.augment.photometric_parameters import Photometric, identity_photometric

LUMINANCE = np.array([0.2989, 0.587, 0.114], np.float32)
LEVELS = np.linspace(0, 1, 256, dtype=np.float32)


def distort_pixels(image: NDArray[np.uint8], row: NDArray[np.float32]) -> NDArray[np.float32]:
    """Distort an image in place, within the rectangle of `row`.

    Args:
        image: [H, W, 3], zero outside the rectangle.
        row: [P], columns of `Photometric`.

    Returns:
        [P] parameters that leave the distorted image unchanged.
    """
    left, top, right, bottom = row[Photometric.LEFT : Photometric.BOTTOM + 1].astype(int).tolist()
    part = image[top:bottom, left:right]
    if part.size:
        part[...] = _permuted(_recoloured(part, row), row)
    settled = identity_photometric()
    settled[Photometric.MEAN_GREY] = row[Photometric.MEAN_GREY]
    settled[Photometric.LEFT :] = row[Photometric.LEFT :]
    return settled


def _recoloured(pixels: NDArray[np.uint8], row: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Change brightness, contrast, saturation and hue; what keeps the three channels apart is a table of 256 levels."""
    saturation, hue = float(row[Photometric.SATURATION]), float(row[Photometric.HUE])
    mean_grey = float(np.clip(row[Photometric.MEAN_GREY] * row[Photometric.BRIGHTNESS], 0, 1))
    contrast, contrast_first = float(row[Photometric.CONTRAST]), row[Photometric.CONTRAST_FIRST] > 0

    def with_contrast(levels: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.clip(contrast * levels + (1 - contrast) * mean_grey, 0, 1, dtype=np.float32)

    levels = np.clip(LEVELS * row[Photometric.BRIGHTNESS], 0, 1, dtype=np.float32)
    if contrast_first:
        levels = with_contrast(levels)
    if saturation == 1 and hue == 0:
        levels = levels if contrast_first else with_contrast(levels)
        return np.asarray(cv2.LUT(pixels, np.rint(255 * levels).astype(np.uint8)), np.uint8)

    colours = cv2.LUT(pixels, levels)
    if saturation != 1:
        mix = saturation * np.eye(3, dtype=np.float32) + (1 - saturation) * LUMINANCE
        colours = _in_unit_range(cv2.transform(colours, mix))
    if hue != 0:
        hsv = np.asarray(cv2.cvtColor(colours, cv2.COLOR_RGB2HSV), np.float32)
        degrees = hsv[..., 0]
        degrees += np.float32(360 * (hue % 1))
        degrees[degrees >= 360] -= np.float32(360)
        colours = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
    scale, offset = (1.0, 0.0) if contrast_first else (contrast, (1 - contrast) * mean_grey)
    rounded = cv2.addWeighted(colours, 255 * scale, colours, 0, 255 * offset, dtype=cv2.CV_8U)
    return np.asarray(rounded, np.uint8)


def _permuted(pixels: NDArray[np.uint8], row: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Exchange the channels."""
    channels = row[Photometric.RED_FROM : Photometric.BLUE_FROM + 1].astype(int).tolist()
    if channels == [0, 1, 2]:
        return pixels
    exchanged = np.empty_like(pixels)
    cv2.mixChannels([pixels], [exchanged], [index for to, source in enumerate(channels) for index in (source, to)])
    return exchanged


def _in_unit_range(colours: cv2.typing.MatLike) -> cv2.typing.MatLike:
    above_zero = cv2.threshold(colours, 0, 0, cv2.THRESH_TOZERO, dst=colours)[1]
    return cv2.threshold(above_zero, 1, 1, cv2.THRESH_TRUNC, dst=above_zero)[1]
