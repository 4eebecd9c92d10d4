"""Mosaic: four images on one canvas, moved by one affine map; each is decoded once and resampled once, straight to its pixels.

The mosaic itself, four images resized to one short side, is never built. Its geometry composes to one matrix per image, from
the image's pixels to those of the sample, so a small part of the sample is never more than a small part of the work.

Source: DEIM, arXiv:2412.04234.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.data.augment.decode import UndecodableImageError, decode_rgb, warp_onto
from pipeline.data.augment.generators import keyed_generator
from pipeline.data.augment.geometry import (
    Orientation,
    Rectangle,
    decode_divisor,
    draw_orientation,
    to_normalised_cxcywh,
)
from pipeline.data.augment.photometric_parameters import Photometric, draw_photometric, mean_grey
from pipeline.data.augment.samples import TRUTH, AnnotatedImage, Sample, within_image
from pipeline.data.augment.settings import AugmentSettings

Matrix = NDArray[np.float64]  # [3, 3], homogeneous, of points (x, y); edges of pixels are whole numbers


class Affine(NamedTuple):
    """Random map of a mosaic, about the centre of its canvas."""

    angle: float  # degrees, clockwise as seen on the screen
    translate: tuple[float, float]  # px, right and down
    scale: float


def mosaic_sample(
    images: Sequence[AnnotatedImage],
    *,
    seed: int,
    epoch: int,
    image_id: int,
    settings: AugmentSettings,
    canvas: tuple[int, int],
) -> tuple[Sample, dict[int, str]]:
    """Join an image and its three partners for training, in place of zoom-out and crop.

    Args:
        images: the image itself, then its partners.
        image_id: id of the first image; keys the draws.
        canvas: height and width of the sample.

    Returns:
        The sample; and the reason, by index in `images`, where a partner cannot be decoded. Its part of the canvas is black.

    Raises:
        UndecodableImageError: the first image cannot be decoded.
    """
    # All draws, before any pixel is decoded.
    photometric = draw_photometric(keyed_generator("image", seed, epoch, image_id), settings)
    generator = keyed_generator("mosaic", seed, epoch, image_id)
    placed, size = place_tiles([(image.width, image.height) for image in images], settings.mosaic_short_side)
    moved = affine_matrix(draw_affine(generator, size, settings), size)
    to_canvas = canvas_matrix(size, canvas, draw_orientation(generator, settings))
    to_canvas_scale = np.hypot(to_canvas[0, :2], to_canvas[1, :2])  # along x and y of the mosaic

    # Pixels and boxes of each image.
    pixels = np.zeros((*canvas, 3), np.uint8)
    parts: list[tuple[NDArray[Any], ...]] = []  # boxes, labels, areas and marks of each image
    failures: dict[int, str] = {}
    for index, (image, tile) in enumerate(zip(images, placed, strict=True)):
        matrix = to_canvas @ moved @ tile
        try:
            _draw(pixels, image, matrix)
        except UndecodableImageError as error:
            if index == 0:
                raise
            failures[index] = str(error)
            continue
        boxes, labels, areas, marks = within_image(image)
        marks = np.full(len(labels), TRUTH, np.float32) if marks is None else marks
        on_mosaic = moved_boxes(boxes, moved @ tile, size)
        sides = (on_mosaic[:, 2:] - on_mosaic[:, :2]) * np.minimum(to_canvas_scale, 1)
        kept = (sides >= settings.min_box_size).all(axis=1)
        on_canvas = moved_boxes(on_mosaic[kept], to_canvas, canvas)
        parts.append((on_canvas, labels[kept], areas[kept] * abs(np.linalg.det(matrix)), marks[kept]))

    if photometric[Photometric.CONTRAST] != 1:
        photometric[Photometric.MEAN_GREY] = mean_grey(pixels)
    photometric[Photometric.LEFT :] = Rectangle(0, 0, canvas[1], canvas[0])
    boxes, labels, areas, marks = (np.concatenate(column) for column in zip(*parts, strict=True))
    sample = Sample(
        image=pixels,
        boxes=to_normalised_cxcywh(boxes, canvas),
        labels=labels.astype(np.int64),
        areas=areas.astype(np.float32),
        photometric=photometric,
        own_marks=marks,
    )
    return sample, failures


def place_tiles(sizes: Sequence[tuple[int, int]], short_side: int) -> tuple[list[Matrix], tuple[int, int]]:
    """Resize images to one short side, and set their top left corners on a grid of two by two equal cells.

    Args:
        sizes: width and height of the four images.

    Returns:
        For each image the matrix from its pixels to the mosaic, and the mosaic's height and width: twice the largest.
    """
    resized = [_with_short_side(width, height, short_side) for width, height in sizes]
    cell_width, cell_height = (max(sides) for sides in zip(*resized, strict=True))
    corners = [(0, 0), (cell_width, 0), (0, cell_height), (cell_width, cell_height)]
    matrices = [
        _scaling(new_width / width, new_height / height, left, top)
        for (width, height), (new_width, new_height), (left, top) in zip(sizes, resized, corners, strict=True)
    ]
    return matrices, (2 * cell_height, 2 * cell_width)


def draw_affine(generator: np.random.Generator, size: tuple[int, int], settings: AugmentSettings) -> Affine:
    """Draw the map of a mosaic of height and width `size`."""
    angle = generator.uniform(-settings.mosaic_rotation, settings.mosaic_rotation)
    share = settings.mosaic_translation
    right, down = (float(round(generator.uniform(-share, share) * side)) for side in size[::-1])
    return Affine(angle, (right, down), generator.uniform(*settings.mosaic_scale))


def affine_matrix(affine: Affine, size: tuple[int, int]) -> Matrix:
    """Matrix of a map about the centre of a canvas of height and width `size`."""
    height, width = size
    angle = np.deg2rad(affine.angle)
    cos, sin = affine.scale * np.cos(angle), affine.scale * np.sin(angle)
    centre_x, centre_y = width / 2, height / 2
    right, down = affine.translate
    return np.array(
        [
            [cos, -sin, centre_x + right - cos * centre_x + sin * centre_y],
            [sin, cos, centre_y + down - sin * centre_x - cos * centre_y],
            [0, 0, 1],
        ]
    )


def canvas_matrix(size: tuple[int, int], canvas: tuple[int, int], orientation: Orientation) -> Matrix:
    """Matrix that stretches a mosaic of height and width `size` over the canvas of a sample, in this orientation."""
    height, width = size[::-1] if orientation.transpose else size
    stretch_x, left = (-canvas[1] / width, canvas[1]) if orientation.flip else (canvas[1] / width, 0)
    stretch_y, top = (-canvas[0] / height, canvas[0]) if orientation.vertical_flip else (canvas[0] / height, 0)
    matrix = _scaling(stretch_x, stretch_y, left, top)
    return matrix[:, [1, 0, 2]] if orientation.transpose else matrix


def moved_boxes(boxes: NDArray[np.float32], matrix: Matrix, size: tuple[int, int]) -> NDArray[np.float32]:
    """Axis-parallel hulls of mapped boxes [G, 4] xyxy, clipped to a canvas of height and width `size`."""
    left, top, right, bottom = boxes.T.astype(np.float64)
    x, y = np.stack([left, right, right, left]), np.stack([top, top, bottom, bottom])  # [4, G]
    mapped_x = matrix[0, 0] * x + matrix[0, 1] * y + matrix[0, 2]
    mapped_y = matrix[1, 0] * x + matrix[1, 1] * y + matrix[1, 2]
    hull = np.stack([mapped_x.min(0), mapped_y.min(0), mapped_x.max(0), mapped_y.max(0)], axis=1)
    return np.clip(hull, 0, [size[1], size[0]] * 2).astype(np.float32)


def _draw(pixels: NDArray[np.uint8], image: AnnotatedImage, matrix: Matrix) -> None:
    """Decode an image as small as its part of the sample allows, and resample it onto `pixels`."""
    divisor = decode_divisor(np.hypot(matrix[0, :2], matrix[1, :2]).max())
    decoded = decode_rgb(image.encoded, image.width, image.height, divisor)
    warp_onto(pixels, decoded, matrix @ np.diag([divisor, divisor, 1.0]))


def _with_short_side(width: int, height: int, short_side: int) -> tuple[int, int]:
    """Width and height of an image whose short side is resized; the long one is rounded down."""
    long_side = short_side * max(width, height) // min(width, height)
    return (short_side, long_side) if width <= height else (long_side, short_side)


def _scaling(x: float, y: float, left: float, top: float) -> Matrix:
    return np.array([[x, 0, left], [0, y, top], [0, 0, 1]], np.float64)
