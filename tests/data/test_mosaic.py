"""Mosaics against recordings of the published operation, and against pixels set by hand."""

import io
import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from pipeline.data.augment.decode import UndecodableImageError, warp_onto
from pipeline.data.augment.generators import keyed_generator
from pipeline.data.augment.geometry import Orientation
from pipeline.data.augment.mosaic import (
    Affine,
    affine_matrix,
    canvas_matrix,
    draw_affine,
    mosaic_sample,
    moved_boxes,
    place_tiles,
)
from pipeline.data.augment.photometric_parameters import Photometric, mean_grey
from pipeline.data.augment.samples import AnnotatedImage, Sample
from pipeline.data.augment.settings import AugmentSettings

GOLDEN = sorted((Path(__file__).parents[1] / "golden").glob("mosaic_*.json"))
STILL = AugmentSettings(
    mosaic_rotation=0,
    mosaic_translation=0,
    mosaic_scale=(1, 1),
    flip_probability=0,
    photometric_probability=0,
)


def coloured(size: tuple[int, int], colour: tuple[int, int, int]) -> NDArray[np.uint8]:
    return np.full((*size, 3), colour, np.uint8)


def as_image(pixels: NDArray[np.uint8], boxes: Any = (), labels: Any = None) -> AnnotatedImage:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    boxes = np.array(boxes, np.float32).reshape(-1, 4)
    labels = np.arange(len(boxes)) if labels is None else np.array(labels)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1) / 2
    return AnnotatedImage(buffer.getvalue(), pixels.shape[1], pixels.shape[0], boxes, labels, areas)


def photograph(width: int, height: int, seed: int) -> NDArray[np.uint8]:
    random = np.random.default_rng(seed)
    layers = [random.integers(0, 256, (height // step + 2, width // step + 2, 3), np.uint8) for step in (4, 16, 64)]
    smooth = [np.asarray(Image.fromarray(layer).resize((width, height)), np.float32) for layer in layers]
    return np.average(smooth, axis=0, weights=(1, 3, 6)).astype(np.uint8)


def sampled(images: list[AnnotatedImage], settings: AugmentSettings = STILL, **changes: Any) -> Sample:
    keyed: dict[str, Any] = {"seed": 1, "epoch": 0, "image_id": 7, "canvas": (120, 160)} | changes
    sample, failures = mosaic_sample(images, settings=settings, **keyed)
    assert not failures
    return sample


def xyxy(sample: Sample) -> NDArray[np.float64]:
    height, width = sample.image.shape[:2]
    boxes = sample.boxes.astype(np.float64) * [width, height, width, height]
    return np.concatenate([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2], axis=1)


def test_there_are_recordings() -> None:
    assert len(GOLDEN) == 3


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_boxes_and_pixels_are_those_of_the_published_mosaic(path: Path) -> None:
    recorded = json.loads(path.read_text())
    used = [recorded["images"][number] for number in recorded["used"]]
    placed, size = place_tiles([(image["size"][1], image["size"][0]) for image in used], 320)
    assert size == tuple(recorded["canvas"])
    drawn = recorded["parameters"]
    moved = affine_matrix(Affine(drawn["angle"], drawn["translate"], drawn["scale"]), size)

    before, after, canvas = [], [], np.zeros((*size, 3), np.uint8)
    for image, tile in zip(used, placed, strict=True):
        boxes = np.array(image["boxes"], np.float32).reshape(-1, 4)
        before.append(moved_boxes(boxes, tile, size))
        after.append(moved_boxes(boxes, moved @ tile, size))
        warp_onto(canvas, coloured(image["size"], image["colour"]), moved @ tile)
    np.testing.assert_allclose(np.concatenate(before), recorded["boxes_before"], atol=1e-3)
    np.testing.assert_allclose(np.concatenate(after), recorded["boxes_after"], atol=1e-3)
    assert [label for image in used for label in image["labels"]] == recorded["labels"]
    assert len(recorded["pixels"]) == 20
    for pixel in recorded["pixels"]:
        assert canvas[pixel["y"], pixel["x"]].tolist() == pixel["rgb"], pixel


@pytest.mark.parametrize(
    ("given", "resized"),
    [
        ((640, 480), (426, 320)),
        ((640, 427), (479, 320)),
        ((427, 640), (320, 479)),
        ((500, 375), (426, 320)),
        ((1920, 1080), (568, 320)),
        ((100, 100), (320, 320)),
    ],
)
def test_the_short_side_is_given_and_the_long_one_rounded_down(
    given: tuple[int, int], resized: tuple[int, int]
) -> None:
    (matrix, *_), size = place_tiles([given] * 4, 320)
    assert size == (2 * resized[1], 2 * resized[0])
    np.testing.assert_allclose(matrix @ [*given, 1], [*resized, 1])


@pytest.mark.parametrize(
    ("affine", "box", "expected"),
    [
        (Affine(10, (0, 0), 1), (10, 20, 50, 60), (59.858, 0, 106.196, 17.065)),
        (Affine(0, (64, -32), 1), (10, 20, 50, 60), (74, 0, 114, 28)),
        (Affine(0, (0, 0), 0.5), (10, 20, 50, 60), (165, 170, 185, 190)),
        (Affine(0, (0, 0), 1.5), (10, 20, 50, 60), (0, 0, 0, 0)),
        (Affine(-7.5, (20, -10), 0.8), (10, 20, 50, 60), (62.7954, 100.2469, 98.6985, 136.1500)),
        (Affine(-7.5, (20, -10), 0.8), (100, 100, 180, 150), (142.5331, 150.1246, 211.2067, 198.1361)),
    ],
)
def test_a_box_becomes_the_hull_of_its_corners_within_the_canvas(
    affine: Affine, box: tuple[int, ...], expected: tuple[float, ...]
) -> None:
    moved = moved_boxes(np.array([box], np.float32), affine_matrix(affine, (640, 640)), (640, 640))
    np.testing.assert_allclose(moved, [expected], atol=1e-3)


def test_the_map_is_drawn_within_its_ranges() -> None:
    settings, size = AugmentSettings(), (640, 960)
    drawn = [draw_affine(keyed_generator("mosaic", 0, 0, n), size, settings) for n in range(2000)]
    for values, low, high in (
        ([a.angle for a in drawn], -10, 10),
        ([a.translate[0] for a in drawn], -96, 96),
        ([a.translate[1] for a in drawn], -64, 64),
        ([a.scale for a in drawn], 0.5, 1.5),
    ):
        assert low <= min(values) < low + 0.02 * (high - low)
        assert high - 0.02 * (high - low) < max(values) <= high
        assert abs(np.mean(values) - (low + high) / 2) < 4 * (high - low) / np.sqrt(12 * len(values))
    assert all(t == round(t) for affine in drawn for t in affine.translate)


def test_images_fill_the_corners_of_equal_cells_and_leave_the_rest_black() -> None:
    sizes = [(40, 80), (60, 60), (80, 40), (40, 80)]  # height, width: cells of 80 x 80 with a short side of 40
    images = [as_image(coloured(size, (50 * n, 10, 10))) for n, size in enumerate(sizes, start=1)]
    sample = sampled(images, replace(STILL, mosaic_short_side=40), canvas=(160, 160))
    red = sample.image[:, :, 0]
    for (top, left), (height, width), level in zip(
        ((0, 0), (0, 80), (80, 0), (80, 80)), ((40, 80), (40, 40), (80, 40), (40, 80)), (50, 100, 150, 200), strict=True
    ):
        assert (red[top : top + height, left : left + width] == level).all()
    black = [red[40:80, :80], red[:80, 120:], red[80:, 40:80], red[120:, 80:]]
    assert not any(part.any() for part in black)


@pytest.mark.parametrize(("flip", "vertical", "turn"), [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 1)])
def test_a_box_stays_on_its_object(flip: int, vertical: int, turn: int) -> None:
    """Without rotation, where hull and object are the same."""
    images = []
    for number in range(4):
        pixels = coloured((240, 320), (40, 40, 40))
        left, top, right, bottom = 60 + 10 * number, 50, 150 + 20 * number, 130
        pixels[top:bottom, left:right] = (255, 40 + 50 * number, 40)
        images.append(as_image(pixels, [(left, top, right, bottom)], [number]))
    orientation = {"vertical_flip_probability": vertical, "quarter_turn_probability": turn}
    settings = replace(STILL, flip_probability=flip, **orientation, mosaic_translation=0.1, mosaic_scale=(0.6, 1.2))
    seen = 0
    for image_id in range(12):
        sample = sampled(images, settings, image_id=image_id, canvas=(300, 400))
        for box, label in zip(xyxy(sample), sample.labels.tolist(), strict=True):
            object_pixels = np.abs(sample.image.astype(int) - [255, 40 + 50 * label, 40]).max(axis=2) < 12
            y, x = np.nonzero(object_pixels)
            if len(x) < 100:
                continue
            found = [x.min(), y.min(), x.max() + 1, y.max() + 1]
            np.testing.assert_allclose(box, found, atol=1.5)
            seen += 1
    assert seen > 30


@pytest.mark.parametrize("scale", [0.5, 0.8, 1.5])
def test_one_resampling_equals_the_mosaic_built_in_full(scale: float) -> None:
    """Against the published sequence with smooth filters in place of its nearest neighbour, at four times the resolution."""
    pictures = [
        photograph(width, height, n)
        for n, (width, height) in enumerate([(640, 480), (480, 640), (500, 375), (640, 640)])
    ]
    settings = replace(STILL, mosaic_rotation=10, mosaic_scale=(scale, scale))
    sample = sampled([as_image(pixels) for pixels in pictures], settings, canvas=(320, 320))

    fine = 4
    placed, size = place_tiles([(p.shape[1], p.shape[0]) for p in pictures], 320)
    affine = draw_affine(keyed_generator("mosaic", 1, 0, 7), size, settings)
    fine_canvas = np.zeros((fine * 320, fine * 320, 3), np.uint8)
    for pixels, tile in zip(pictures, placed, strict=True):
        to_fine = canvas_matrix(size, fine_canvas.shape[:2], Orientation()) @ affine_matrix(affine, size) @ tile
        to_fine[:2, 2] += to_fine[:2, :2].sum(axis=1) / 2 - 0.5  # between centres of pixels
        warped = cv2.warpAffine(
            pixels, to_fine[:2], fine_canvas.shape[1::-1], flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT
        )
        fine_canvas = np.maximum(fine_canvas, warped)
    expected = np.asarray(Image.fromarray(fine_canvas).resize((320, 320), Image.Resampling.BOX))
    error = np.square(sample.image.astype(float) - expected).mean()
    assert 10 * np.log10(255**2 / error) > 28


def test_boxes_of_less_than_a_pixel_are_dropped_and_areas_follow_the_scale() -> None:
    pixels = coloured((320, 320), (90, 90, 90))
    image = as_image(pixels, [(10, 10, 110, 60), (200, 200, 206, 300)])
    sample = sampled([image] * 4, canvas=(64, 64))  # a tenth of the mosaic: 640 x 640
    assert sample.labels.tolist() == [0] * 4  # the other is 0.6 px wide
    np.testing.assert_allclose(sample.areas, [100 * 50 / 2 / 100] * 4, rtol=1e-5)
    assert sample.boxes.dtype == sample.areas.dtype == np.float32


def test_colours_are_those_of_the_image_itself_over_the_whole_canvas() -> None:
    images = [as_image(coloured((32, 32), (level, level, level))) for level in (40, 80, 120, 160)]
    sample = sampled(images, replace(STILL, photometric_probability=1, contrast=(1.4, 1.4)))
    assert sample.photometric[Photometric.LEFT :].tolist() == [0, 0, 160, 120]
    assert sample.photometric[Photometric.CONTRAST] == pytest.approx(1.4)
    assert sample.photometric[Photometric.MEAN_GREY] == pytest.approx(mean_grey(sample.image))


def test_a_mosaic_depends_on_seed_epoch_and_image_alone() -> None:
    images = [as_image(photograph(60, 40, n), [(5, 5, 30, 30)]) for n in range(4)]

    def same(first: Sample, second: Sample) -> bool:
        return all(np.array_equal(getattr(first, f.name), getattr(second, f.name)) for f in fields(Sample))

    first = sampled(images, AugmentSettings())
    assert same(first, sampled(images, AugmentSettings()))
    for key in ({"seed": 2}, {"epoch": 1}, {"image_id": 8}):
        assert not same(first, sampled(images, AugmentSettings(), **key))


def test_a_partner_that_cannot_be_decoded_leaves_its_part_black() -> None:
    images = [as_image(coloured((32, 32), (200, 200, 200)), [(4, 4, 20, 20)], [n]) for n in range(4)]
    images[2] = replace(images[2], encoded=b"no image")
    sample, failures = mosaic_sample(images, seed=0, epoch=0, image_id=1, settings=STILL, canvas=(64, 64))
    assert list(failures) == [2]
    assert "cannot identify" in failures[2]
    assert sample.labels.tolist() == [0, 1, 3]
    assert not sample.image[33:, :31].any()
    assert (sample.image[:32, :32] == 200).all()
    with pytest.raises(UndecodableImageError, match="cannot identify"):
        mosaic_sample([images[2], *images[1:]], seed=0, epoch=0, image_id=1, settings=STILL, canvas=(64, 64))
