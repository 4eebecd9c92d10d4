"""Boxes and labels on images: the labels' positions, and one palette for all outputs."""

import itertools

import numpy as np
import pytest
from PIL import Image
from torch import tensor
from torchvision.ops import box_iou

from dfine_core.drawing import label_colour, place_caption
from pipeline.drawing import MAX_BOXES, css_colour, draw_boxes, font, shortened, side_by_side

CANVAS, LABEL = (640, 480), (80, 16)


def overlap(one: tuple[float, ...], other: tuple[float, ...]) -> float:
    """IoU by torchvision."""
    return float(box_iou(tensor([one], dtype=float), tensor([other], dtype=float)))


@pytest.mark.parametrize(
    "box",
    [
        (100, 100, 200, 200),
        (100, 0, 200, 200),  # no room above
        (100, 0, 200, 480),  # neither above nor below
        (600, 100, 640, 140),  # the label is wider than the box, which ends at the border
        (-50, -50, 20, 20),  # beyond the corner
        (630, 470, 700, 500),
    ],
)
def test_a_label_lies_outside_its_box_and_inside_the_image(box: tuple[float, float, float, float]) -> None:
    left, top, right, bottom = area = place_caption(box, LABEL, CANVAS, [])
    assert (right - left, bottom - top) == LABEL
    assert overlap(area, box) == 0
    assert 0 <= left < right <= CANVAS[0]
    assert 0 <= top < bottom <= CANVAS[1]


def test_the_label_of_a_box_as_large_as_the_image_lies_in_its_corner() -> None:
    assert place_caption((-3, -3, 640, 480), LABEL, CANVAS, []) == (0, 0, *LABEL)


def test_labels_of_neighbouring_boxes_do_not_overlap() -> None:
    placed: list[tuple[float, float, float, float]] = []
    for shift in (0, 5, 10):
        placed.append(place_caption((300 + shift, 200, 320 + shift, 220), LABEL, CANVAS, placed))
    assert all(overlap(one, other) == 0 for one, other in itertools.combinations(placed, 2))


def test_the_most_important_box_is_on_top_and_only_so_many_are_drawn() -> None:
    image = Image.new("RGB", (640, 480), "black")
    boxes = [[200, 100, 400, 300]] * 2 + [[0, 470, 640, 478]] * MAX_BOXES
    drawing = draw_boxes(image, boxes, [1, *[2] * (MAX_BOXES + 1)], [""] * (MAX_BOXES + 2))
    assert drawing.getpixel((200, 200)) == label_colour(1)
    assert image.getbbox() is None, "the image itself was changed"
    last_alone = [[0, 0, 1, 1]] * MAX_BOXES + [[200, 100, 400, 300]]
    drawing = draw_boxes(image, last_alone, [0] * len(last_alone), [""] * len(last_alone))
    assert drawing.getpixel((200, 200)) == (0, 0, 0)


def test_neighbouring_classes_have_distant_colours_and_pages_the_same_ones() -> None:
    colours = np.array([label_colour(label) for label in range(8)], float)
    distances = np.linalg.norm(colours[:, None] - colours[None], axis=-1)
    assert distances[~np.eye(8, dtype=bool)].min() > 60
    red, green, blue = label_colour(3)
    assert css_colour(3) == f"#{red:02x}{green:02x}{blue:02x}"


def test_panels_keep_their_pixels_side_by_side() -> None:
    panels = [Image.new("RGB", (200, 100), shade) for shade in ("red", "blue")]
    row = side_by_side([("one", panels[0]), ("other", panels[1])])
    assert row.width > 400
    assert row.height > 100
    colours = {pixel: count for count, pixel in row.getcolors(row.width * row.height) or []}
    assert colours[(255, 0, 0)] == colours[(0, 0, 255)] == 200 * 100


def test_a_title_that_is_wider_than_its_image_is_whole() -> None:
    title = "detections with a score of 0.4 or more: 12"
    row = side_by_side([(title, Image.new("RGB", (60, 300), "red")), ("other", Image.new("RGB", (60, 300), "blue"))])
    assert row.width > font(13).getlength(title) + 60
    columns = np.flatnonzero((np.asarray(row)[:20].sum(-1) < 600).any(0))
    assert columns.min() > 0
    assert columns.max() < row.width - 1


@pytest.mark.parametrize("letter", "iW")
def test_a_name_is_shortened_to_its_width_and_keeps_its_end(letter: str) -> None:
    name = f"{60 * letter}_camera_2_frame_000123.jpg: 4"
    short = shortened(name, 320, font(12))
    assert 250 < font(12).getlength(short) <= 320
    assert short.endswith("frame_000123.jpg: 4")
    assert "…" in short
    assert shortened("a.jpg", 320, font(12)) == "a.jpg"
    assert shortened(name, 1, font(12)) == "…"
