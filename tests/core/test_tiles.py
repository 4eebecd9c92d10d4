"""Tiles of large images: where they lie, and how their detections become those of the image."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dfine_core import ImageDetections
from dfine_core.tile_merging import merge_tiles
from dfine_core.tiles import Tile, Tiling
from tests.support.seeing_detector import COLOURS, picture, seeing_detector
from tests.support.small_detectors import small_detector
from tests.support.synthetic_shards import synthetic_records

SIZES = st.tuples(st.integers(1, 900), st.integers(1, 900))
TILINGS = st.builds(Tiling, st.integers(64, 300), st.floats(0, 0.75))


@settings(max_examples=40, deadline=None)
@given(size=SIZES, tiling=TILINGS)
def test_tiles_cover_the_image_lie_in_it_and_are_equally_large(size: tuple[int, int], tiling: Tiling) -> None:
    seen = np.zeros(size[::-1], int)
    tiles = tiling.tiles(size)
    for left, top, right, bottom in tiles:
        assert 0 <= left < right <= size[0]
        assert 0 <= top < bottom <= size[1]
        seen[top:bottom, left:right] += 1
    assert seen.min() == 1 or tiling.overlap > 0
    assert seen.min() >= 1
    assert {tile.size for tile in tiles} == {(min(size[0], tiling.side), min(size[1], tiling.side))}
    assert len(set(tiles)) == len(tiles)


@settings(max_examples=40, deadline=None)
@given(size=SIZES, tiling=TILINGS, data=st.data())
def test_an_object_no_larger_than_the_overlap_is_whole_in_some_tile(
    size: tuple[int, int], tiling: Tiling, data: st.DataObject
) -> None:
    most = max(1, round(tiling.overlap * tiling.side))
    width, height = (data.draw(st.integers(1, min(most, side))) for side in size)
    left, top = data.draw(st.integers(0, size[0] - width)), data.draw(st.integers(0, size[1] - height))
    assert any(
        t.left <= left and t.top <= top and left + width <= t.right and top + height <= t.bottom
        for t in tiling.tiles(size)
    )


@pytest.mark.parametrize(
    ("side", "overlap", "message"),
    [(63, 0.2, "at least 64"), (640, 0.8, "0..0.75"), (640, -0.1, "share"), (None, 0.2, "give tile")],
)
def test_tiles_out_of_range_are_refused(side: int | None, overlap: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Tiling.given(side, overlap)


# A detector that sees what there is

DETECTOR = seeing_detector(96)


@st.composite
def scenes(draw: st.DrawFn) -> tuple[tuple[int, int], list[tuple[int, int, int, int]], list[int]]:
    """An image, and objects of any size that do not touch: at most one in each cell of an uneven grid."""
    size = draw(st.tuples(st.integers(40, 420), st.integers(40, 420)))
    cuts = [sorted({0, side, *draw(st.lists(st.integers(12, side), max_size=4))}) for side in size]
    boxes, labels = [], []
    for left, right in zip(cuts[0], cuts[0][1:], strict=False):
        for top, bottom in zip(cuts[1], cuts[1][1:], strict=False):
            if right - left < 8 or bottom - top < 8 or draw(st.integers(0, 3)) == 0:
                continue
            x, y = draw(st.integers(left, right - 6)), draw(st.integers(top, bottom - 6))
            box = (x, y, draw(st.integers(x + 4, right - 1)), draw(st.integers(y + 4, bottom - 1)))
            boxes.append(box)
            labels.append(draw(st.integers(0, len(COLOURS) - 1)))
    return size, boxes, labels


@settings(deadline=None, max_examples=30)
@given(scene=scenes(), overlap=st.floats(0.1, 0.6))
def test_every_object_is_found_once_with_its_own_edges_however_large(
    scene: tuple[tuple[int, int], list[tuple[int, int, int, int]], list[int]], overlap: float
) -> None:
    size, boxes, labels = scene
    detector, image = DETECTOR, picture(size, boxes, labels)
    tiling = Tiling(96, overlap)
    tiles = tiling.tiles(size)
    parts = [detector.find(torch.tensor(np.array(tile.cut(image))).permute(2, 0, 1)[None], torch.tensor([tile.size]))[0]
             for tile in tiles]  # fmt: skip
    found = merge_tiles([detector.keep(part, torch.zeros(3)) for part in parts], tiles, size)
    expected = sorted((label, *map(float, box)) for box, label in zip(boxes, labels, strict=True))
    assert sorted((d.label, *d.box) for d in found) == expected


def test_images_tiles_and_batches_are_kept_apart() -> None:
    images = [
        picture((200, 96), [(10, 10, 30, 20), (70, 5, 95, 80)], [0, 1]),
        picture((48, 48), [(5, 5, 20, 30)], [2]),
        Image.new("RGB", (90, 200)),
        picture((96, 250), [(0, 60, 96, 200)], [1]),
    ]
    found = DETECTOR(images, tile=96, batch_size=3)
    assert [[(d.label, d.box) for d in each] for each in found] == [
        [(1, (70.0, 5.0, 95.0, 80.0)), (0, (10.0, 10.0, 30.0, 20.0))],
        [(2, pytest.approx((5, 5, 20, 30), abs=0.5))],
        [],
        [(1, (0.0, 60.0, 96.0, 200.0))],
    ]


@settings(deadline=None, max_examples=6)
@given(tile=st.integers(81, 2000), overlap=st.floats(0, 0.75), batch_size=st.integers(1, 4))
def test_one_tile_that_covers_the_image_equals_untiled_to_the_bit(tile: int, overlap: float, batch_size: int) -> None:
    loaded = small_detector()
    images = [record.image for record in synthetic_records(5, longest_side=80)]
    whole = loaded(images, threshold=0, batch_size=batch_size, coverage=0.9)
    tiled = loaded(images, threshold=0, batch_size=batch_size, coverage=0.9, tile=tile, overlap=overlap)
    for one, other in zip(whole, tiled, strict=True):
        for name in ("boxes", "scores", "labels", "edge_std_px", "edge_intervals"):
            assert torch.equal(getattr(one, name), getattr(other, name)), name


# The rules, by hand: two tiles of 100 x 100 that share the columns 80 to 100

SIZE, TILES = (180, 100), [Tile(0, 0, 100, 100), Tile(80, 0, 180, 100)]


def detections(*rows: tuple[tuple[float, float, float, float], float, int]) -> ImageDetections:
    boxes = torch.tensor([box for box, *_ in rows]).reshape(-1, 4)
    half = torch.tensor([1.0, 2.0, 3.0, 4.0]).expand(len(rows), 4)
    return ImageDetections(
        boxes=boxes,
        scores=torch.tensor([score for _, score, _ in rows]),
        labels=torch.tensor([label for *_, label in rows], dtype=torch.int64),
        names=tuple("abc"[label] for *_, label in rows),
        edge_std_px=half.clone(),
        edge_intervals=torch.stack([boxes - half, boxes + half], -1),
        intervals="own",
    )


def merged(left: ImageDetections, right: ImageDetections) -> list[tuple[str, float, tuple[float, ...]]]:
    return [(d.name, round(d.score, 3), d.box) for d in merge_tiles([left, right], TILES, SIZE)]


def test_a_cut_object_loses_against_the_tile_that_shows_it_whole_even_with_another_class_and_score() -> None:
    left = detections(((60.0, 10.0, 95.0, 40.0), 0.5, 0))
    right = detections(((0.0, 10.0, 15.0, 40.0), 0.9, 1))
    assert merged(left, right) == [("a", 0.5, (60, 10, 95, 40))]


def test_the_better_one_of_two_whole_detections_stays_and_other_classes_stay_beside_it() -> None:
    left = detections(((84.0, 10.0, 95.0, 40.0), 0.5, 0))
    right = detections(((4.0, 11.0, 15.0, 40.0), 0.75, 0), ((4.0, 10.0, 15.0, 40.0), 0.25, 1))
    assert merged(left, right) == [("a", 0.75, (84, 11, 95, 40)), ("b", 0.25, (84, 10, 95, 40))]


def test_detections_of_the_same_tile_are_never_compared() -> None:
    twice = detections(((10.0, 10.0, 40.0, 40.0), 0.75, 0), ((10.0, 10.0, 40.0, 41.0), 0.5, 0))
    assert len(merged(twice, detections())) == 2


def test_parts_of_an_object_are_joined_with_the_edges_and_the_better_score_of_each() -> None:
    left = detections(((10.0, 10.0, 100.0, 40.0), 0.5, 0))
    right = detections(((0.0, 12.0, 60.0, 42.0), 0.75, 0))
    (found,) = [merge_tiles([left, right], TILES, SIZE)]
    assert found.boxes.tolist() == [[10, 12, 140, 42]]
    assert found.scores.tolist() == [0.75]
    assert found.edge_std_px is not None
    assert found.edge_std_px.tolist() == [[1, 2, 3, 4]]
    assert found.edge_intervals is not None
    assert found.edge_intervals.tolist() == [[[9, 11], [10, 14], [137, 143], [38, 46]]]


def test_an_edge_that_no_tile_shows_has_no_deviation_and_an_interval_up_to_the_border_of_the_image() -> None:
    found = merge_tiles([detections(((10.0, 10.0, 99.5, 40.0), 0.5, 0)), detections()], TILES, SIZE)
    assert found.edge_std_px is not None
    assert found.edge_intervals is not None
    assert found.edge_std_px[0].isnan().tolist() == [False, False, True, False]
    assert found.edge_intervals.tolist() == [[[9, 11], [8, 12], [96.5, 180], [36, 44]]]


def test_a_border_of_the_image_cuts_nothing() -> None:
    found = merge_tiles([detections(((0.0, 0.0, 50.0, 100.0), 0.5, 0)), detections()], TILES, SIZE)
    assert found.edge_std_px is not None
    assert found.edge_std_px.tolist() == [[1, 2, 3, 4]]


def test_two_objects_on_a_seam_stay_two() -> None:
    left = detections(((60.0, 10.0, 100.0, 40.0), 0.5, 0), ((60.0, 35.0, 100.0, 80.0), 0.75, 0))
    right = detections(((0.0, 10.0, 40.0, 40.0), 0.875, 0), ((0.0, 35.0, 50.0, 80.0), 0.625, 0))
    assert merged(left, right) == [("a", 0.875, (60, 10, 120, 40)), ("a", 0.75, (60, 35, 130, 80))]
