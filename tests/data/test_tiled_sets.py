"""Shard sets of tiles: which boxes a tile has, what leads back to the image, and that nothing depends on the run."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pydantic import ValidationError

from dfine_core.images import read_image
from dfine_core.tiles import Tiling
from jobs.prepare import main as prepare_main
from pipeline.data.prepare.prepare import PrepareError, prepare
from pipeline.data.prepare.shard_writer import PrepareOptions, Receipt, receipt_uri, shard_uri, write_shard
from pipeline.data.prepare.tiled_records import MIN_SHARE, MIN_SIDE, TILE_IDS, TileRule, tiled_records
from pipeline.data.shards.manifest import Notice, ShardSet, load_shards
from pipeline.data.shards.reader import locate_row_groups, read_training_rows
from pipeline.data.shards.records import ImageRecord, records_from_table
from pipeline.data.sources.index import AnnotationIndex, DatasetSource
from pipeline.data.sources.synthetic import synthetic_image, synthetic_source
from pipeline.evaluation.ground_truth import read_ground_truth
from pipeline.ray_cluster import start_ray

BLANK = synthetic_image(0, longest_side=200)


def rows_of(shards: ShardSet) -> list[ImageRecord]:
    source = locate_row_groups(shards)
    return [r for t in read_training_rows(source, range(len(source.rows))).values() for r in records_from_table(t)]


def corner(record: ImageRecord) -> tuple[int, int]:
    found = re.fullmatch(r".*#tile=(\d+),(\d+)", record.file_name)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def annotated(boxes: list[tuple[int, int, int, int]], crowd: list[bool]) -> ImageRecord:
    array: NDArray[np.float32] = np.array(boxes, np.float32).reshape(-1, 4)
    return ImageRecord(
        image_id=7,
        file_name="a.jpg",
        width=BLANK.width,
        height=BLANK.height,
        image=BLANK.image,
        boxes=array,
        labels=np.arange(len(boxes), dtype=np.int32),
        areas=(array[:, 2:] - array[:, :2]).prod(1),
        crowd=np.array(crowd, np.bool_),
    )


BOXES = st.lists(
    st.tuples(st.integers(-20, 190), st.integers(-20, 190), st.integers(1, 150), st.integers(1, 150), st.booleans()),
    max_size=6,
)


@settings(max_examples=25, deadline=None)
@given(rows=BOXES, side=st.integers(64, 220), overlap=st.floats(0, 0.75))
def test_boxes_of_a_tile_are_those_that_a_plain_loop_finds(
    rows: list[tuple[int, int, int, int, bool]], side: int, overlap: float
) -> None:
    width, height = BLANK.width, BLANK.height
    inside = [(x, y, x + w, y + h, c) for x, y, w, h, c in rows if x + w > 0 and y + h > 0 and x < width and y < height]
    record = annotated([row[:4] for row in inside], [row[4] for row in inside])
    notices: list[Notice] = []
    tiles = list(tiled_records(record, TileRule(side=side, overlap=overlap), 0, notices))
    places = Tiling(side, overlap).tiles((width, height))
    assert [tile.image_id for tile in tiles] == [7 * TILE_IDS + number for number in range(len(places))]
    cut, ignored = 0, 0
    for tile, (left, top, right, bottom) in zip(tiles, places, strict=True):
        expected = []
        for label, (x1, y1, x2, y2, crowd) in enumerate(inside):
            whole = max(x1, 0), max(y1, 0), min(x2, width), min(y2, height)
            seen = max(whole[0], left), max(whole[1], top), min(whole[2], right), min(whole[3], bottom)
            w, h = seen[2] - seen[0], seen[3] - seen[1]
            if w <= 0 or h <= 0:
                continue
            share = w * h / ((whole[2] - whole[0]) * (whole[3] - whole[1]))
            label_kept = seen == whole or share >= MIN_SHARE or (w >= MIN_SIDE * side and h >= MIN_SIDE * side) or crowd
            cut += seen != whole and label_kept and not crowd
            ignored += not label_kept
            ends = (
                max(x1, left) if left > 0 else x1, max(y1, top) if top > 0 else y1,
                min(x2, right) if right < width else x2, min(y2, bottom) if bottom < height else y2,
            )  # fmt: skip
            box = ends[0] - left, ends[1] - top, ends[2] - left, ends[3] - top
            expected.append((label, box, crowd or not label_kept, float(label_kept)))
        assert tile.weights is not None
        found = zip(
            tile.labels.tolist(), map(tuple, tile.boxes.tolist()), tile.crowd.tolist(), tile.weights, strict=True
        )
        assert list(found) == expected
        assert (tile.width, tile.height) == (right - left, bottom - top)
        if len(places) > 1:
            assert corner(tile) == (left, top)
    counts = {code: sum(n.count for n in notices if n.code == code) for code in ("tile-box-cut", "tile-box-ignored")}
    assert counts == {"tile-box-cut": cut, "tile-box-ignored": ignored}


def test_pixels_of_a_tile_are_those_of_the_image_there() -> None:
    pixels = np.asarray(read_image(BLANK.image).convert("L"), np.int64)
    for tile in tiled_records(annotated([], []), TileRule(side=96), 0, []):
        left, top = corner(tile)
        there = pixels[top : top + tile.height, left : left + tile.width]
        assert np.abs(np.asarray(read_image(tile.image).convert("L"), np.int64) - there).mean() < 2  # JPEG anew


def test_an_image_no_larger_than_a_tile_keeps_its_bytes_and_name() -> None:
    (tile,) = tiled_records(BLANK, TileRule(side=200), 0, [])
    assert (tile.image, tile.file_name, tile.image_id) == (BLANK.image, BLANK.file_name, TILE_IDS * BLANK.image_id)
    assert np.array_equal(tile.boxes, BLANK.boxes)


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_a_share_of_the_tiles_without_boxes_is_kept_the_same_in_every_run(share: float) -> None:
    records = [annotated([(5, 5, 20, 20)], [False])] * 1
    kept = []
    for _ in range(2):
        notices: list[Notice] = []
        tiles = list(tiled_records(records[0], TileRule(side=64, overlap=0.5, empty=share), 3, notices))
        every = len(Tiling(64, 0.5).tiles((BLANK.width, BLANK.height)))
        assert len(tiles) + sum(notice.count for notice in notices if notice.code == "tile-empty") == every
        assert any(len(tile.labels) for tile in tiles)
        kept.append([tile.image_id for tile in tiles])
    assert kept[0] == kept[1]
    assert (len(kept[0]) == 1) == (share == 0)


def test_options_of_a_set_without_tiles_are_what_they_were() -> None:
    assert "tiles" not in PrepareOptions().model_dump()
    with pytest.raises(ValidationError, match="side"):
        TileRule(side=10)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The command's set of tiles: 12 images, of which some are smaller than a tile."""
    start_ray(num_cpus=2)
    out = tmp_path_factory.mktemp("tiled") / "train"
    command = ["synthetic", "--images", "12", "--image-side", "160", "--split", "train", "--out", str(out)]
    prepare_main([*command, "--tile", "96", "--overlap", "0.25", "--shard-mib", "0.05", "--row-group-rows", "4"])
    return out


def test_the_command_writes_every_tile_once_and_in_no_order_of_images(prepared: Path) -> None:
    shards, source = load_shards(prepared), [synthetic_image(n, longest_side=160) for n in range(12)]
    rows = rows_of(shards)
    expected = {
        TILE_IDS * record.image_id + number: tile
        for record in source
        for number, tile in enumerate(Tiling(96, 0.25).tiles((record.width, record.height)))
    }
    assert {row.image_id: (*corner(row), row.width, row.height) for row in rows} == {
        number: (tile.left, tile.top, *tile.size) for number, tile in expected.items()
    }
    assert len(shards.manifest.shards) > 2
    assert shards.manifest.options["tiles"] == {"side": 96, "overlap": 0.25, "empty": 1.0}
    assert max(max(shard.row_groups) for shard in shards.manifest.shards) == 4
    first = [row.image_id // TILE_IDS for row in rows[: shards.manifest.shards[0].rows]]
    assert first != sorted(first)
    ignored = sum(int(row.weights is not None and (row.weights == 0).sum()) for row in rows)
    truth = read_ground_truth(shards)
    assert 0 < ignored <= truth.crowd.sum()  # evaluation passes them over
    (notice,) = [n for n in shards.manifest.notices if n.code == "tile-box-ignored"]
    assert notice.count == ignored


def test_a_preparation_that_goes_on_ends_in_the_same_bytes(prepared: Path, tmp_path: Path) -> None:
    source = synthetic_source(12, longest_side=160)
    options = PrepareOptions(shard_mib=0.05, row_group_rows=4, tiles=TileRule(side=96, overlap=0.25))
    again = tmp_path / "again"
    broken = DatasetSource(source.description, source.fill)
    prepare(broken, str(again), split="train", options=options)
    assert (again / "manifest.json").read_bytes() == (prepared / "manifest.json").read_bytes()
    with pytest.raises(PrepareError, match=r"tiles is .*'overlap': 0\.25.* there and .*'overlap': 0\.5.* now"):
        prepare(
            source,
            str(again),
            split="train",
            options=options.model_copy(update={"tiles": TileRule(side=96, overlap=0.5)}),
        )


def test_a_shard_is_written_twice_alike(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = PrepareOptions(shard_mib=0.1, row_group_rows=4, tiles=TileRule(side=96))
    written: list[tuple[Receipt, bytes]] = []

    def keep_work(*_: object) -> None:
        raise KeyboardInterrupt  # as a kill before any shard is written

    monkeypatch.setattr("pipeline.data.prepare.prepare._write_shards", keep_work)
    with pytest.raises(KeyboardInterrupt):
        prepare(synthetic_source(6, longest_side=160), str(tmp_path), split="train", options=options)
    for _ in range(2):
        receipt = write_shard(str(tmp_path), 0, options, 8)
        written.append((receipt, Path(shard_uri(str(tmp_path), 0)).read_bytes()))
        Path(receipt_uri(str(tmp_path), 0)).unlink()
    assert written[0] == written[1]


def test_ids_that_would_not_fit_are_named(prepared: Path, tmp_path: Path) -> None:
    source = synthetic_source(1, longest_side=160)

    def fill(index: AnnotationIndex) -> object:
        categories = source.fill(index)
        index.add_images([index.entries()[0]._replace(image_id=10**13)])
        return categories

    with pytest.raises(PrepareError, match=f"image id {10**13} is too large"):
        prepare(DatasetSource({}, fill), str(tmp_path), split="t", options=PrepareOptions(tiles=TileRule(side=96)))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--overlap", "0.2"], "no tiles without --tile"),
        (["--empty-tiles", "0.5"], "no tiles without --tile"),
        (["--tile", "20"], "less than 64"),
        (["--tile", "640", "--overlap", "0.9"], "exceeds 0.75"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(
    given: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["synthetic", "--images", "1", "--split", "train", "--out", str(tmp_path / "out"), *given]
    with pytest.raises(SystemExit) as raised:
        prepare_main(command)
    assert message in f"{raised.value} {capsys.readouterr().err}"
    assert not (tmp_path / "out").exists()


def test_sets_prepared_before_there_were_weights_are_read_with_ones(tmp_path: Path) -> None:
    start_ray(num_cpus=2)
    shards = prepare(synthetic_source(3, longest_side=64), str(tmp_path), split="t", options=PrepareOptions())
    assert "tiles" not in json.loads((tmp_path / "manifest.json").read_text())["options"]
    assert [row.weights for row in rows_of(shards)] == [None] * 3
