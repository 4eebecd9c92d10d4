"""Parameters of the photometric distortion: one row of numbers per image, drawn on the CPU and applied on the device.

No torch here: data tasks import this module. `photometric.py` applies the rows.
"""

from enum import IntEnum

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.data.augment.settings import AugmentSettings


class Photometric(IntEnum):
    """Columns of `Sample.photometric` [P]."""

    BRIGHTNESS = 0  # factors, 1 leaves the image unchanged
    CONTRAST = 1
    SATURATION = 2
    HUE = 3  # shift in turns, 0 leaves the image unchanged
    CONTRAST_FIRST = 4  # 1: contrast before saturation and hue, 0: after
    RED_FROM = 5  # the channel, 0 to 2, that becomes red
    GREEN_FROM = 6
    BLUE_FROM = 7
    MEAN_GREY = 8  # mean of the whole image before any distortion, in 0..1: contrast scales the distance from it
    LEFT = 9  # part of the canvas that holds image, in pixels; the rest is zero and stays zero
    TOP = 10
    RIGHT = 11
    BOTTOM = 12


def identity_photometric() -> NDArray[np.float32]:
    """[P] that leaves an image unchanged."""
    row = np.zeros(len(Photometric), np.float32)
    row[[Photometric.BRIGHTNESS, Photometric.CONTRAST, Photometric.SATURATION]] = 1
    row[[Photometric.RED_FROM, Photometric.GREEN_FROM, Photometric.BLUE_FROM]] = 0, 1, 2
    return row


def draw_photometric(generator: np.random.Generator, settings: AugmentSettings) -> NDArray[np.float32]:
    """[P] random parameters; the columns that depend on the image keep their identity value."""
    row = identity_photometric()
    intervals = (settings.brightness, settings.contrast, settings.saturation, settings.hue)
    for column, (low, high) in enumerate(intervals):
        if generator.random() < settings.photometric_probability:
            row[column] = generator.uniform(low, high)
    row[Photometric.CONTRAST_FIRST] = generator.random() < 0.5
    if generator.random() < settings.photometric_probability:
        order = generator.permutation(3)  # drawn in any case: later draws stay the same
        if settings.channel_permutation:
            row[Photometric.RED_FROM : Photometric.BLUE_FROM + 1] = order
    return row


def mean_grey(pixels: NDArray[np.uint8]) -> float:
    """Mean luminance in 0..1 of [H, W, 3] pixels."""
    red, green, blue, _ = cv2.mean(pixels)
    return (0.2989 * red + 0.587 * green + 0.114 * blue) / 255
