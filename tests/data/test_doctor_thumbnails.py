"""Names on the thumbnails of the doctor's page."""

import pytest

from pipeline.data.doctor.thumbnails import BoxOverlay, place_names

VIEW, TEXT_SIZE = (0.0, 0.0, 200.0, 100.0), 8.0


def box(left: float, top: float, width: float, height: float, name: str = "hexagon") -> BoxOverlay:
    return BoxOverlay(left, top, width, height, name, "#000000", crowd=False, marked=False)


@pytest.mark.parametrize(
    "given",
    [
        box(20, 30, 40, 40),
        box(0, 0, 60, 100),  # as high as the image
        box(0, 0, 200, 100),  # the image
        box(-30, -30, 260, 160),  # beyond it
        box(170, 0, 30, 30, "a name that is much wider than its box"),
        box(0, 0, 200, 100, 30 * "name "),  # wider than the image
    ],
)
def test_a_name_covers_no_part_of_its_box_and_lies_inside_the_view(given: BoxOverlay) -> None:
    (placed,), (left, top, width, height) = place_names([given], VIEW, TEXT_SIZE, named=True)
    start, end = placed.text_x, placed.text_x + placed.text_width
    above, below = placed.text_y - 0.95 * TEXT_SIZE, placed.text_y + 0.3 * TEXT_SIZE
    assert left <= start < end <= left + width
    assert top <= above < below <= top + height
    visible_top, visible_left = max(given.top, 0), max(given.left, 0)
    beside = end <= visible_left or start >= given.left + given.width
    assert beside or below <= visible_top or above >= given.top + given.height


def test_the_view_grows_only_where_a_box_fills_it() -> None:
    assert place_names([box(20, 30, 40, 40)], VIEW, TEXT_SIZE, named=True)[1] == VIEW
    assert place_names([box(0, 0, 200, 100)], VIEW, TEXT_SIZE, named=True)[1] == (0, -11, 200, 111)


def test_boxes_beyond_the_view_and_those_of_crowded_images_have_no_name() -> None:
    (beyond,), _ = place_names([box(20, 130, 40, 40)], VIEW, TEXT_SIZE, named=True)
    (unnamed,), _ = place_names([box(20, 30, 40, 40)], VIEW, TEXT_SIZE, named=False)
    assert beyond.text_width == unnamed.text_width == 0
