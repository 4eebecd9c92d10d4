"""Predictions in tiles through the command and its files."""

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from dfine_core import load
from dfine_core.tiles import Tiling
from jobs import predict as predict_job
from pipeline.predict.inputs import list_inputs
from pipeline.predict.predict import IN_PROCESS, PredictOptions, predict
from pipeline.predict.predicted_images import PredictedImage, predicted_images
from tests.support.calibrations import a_calibration
from tests.support.seeing_detector import picture, seeing_detector
from tests.support.small_detectors import small_detector
from tests.support.synthetic_shards import synthetic_records

TILE, OVERLAP = 64, 0.0  # nothing is joined without an overlap, so that cut edges stay unknown


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A calibrated detector, and three images of which one is no larger than a tile."""
    out = tmp_path_factory.mktemp("tiles")
    loaded = small_detector()
    with torch.no_grad():  # boxes that reach over the borders of tiles
        loaded.detector.decoder.pre_bbox_head.layers[-1].bias[2:] += 3
    replace(loaded, calibration=a_calibration()).save(out / "detector")
    (out / "photos").mkdir()
    for number, side in enumerate((150, 60, 130)):
        (record,) = synthetic_records(1, longest_side=side, seed=number)
        (out / "photos" / f"{number}.jpg").write_bytes(record.image)
    return out


def predicted(folder: Path, out: str, *options: str) -> list[PredictedImage]:
    given = [str(folder / "detector"), str(folder / "photos"), "--out", str(folder / out), "--num-images", "1"]
    predict_job.main([*given, "--precision", "fp32", "--threshold", "0", *options])
    return list(predicted_images(str(folder / out)))


def rows_of(out: Path) -> list[dict[str, Any]]:
    return [row for file in sorted((out / "parts").glob("*.parquet")) for row in pq.read_table(file).to_pylist()]


def no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON")


def test_parts_json_and_drawings_hold_what_the_detector_finds_in_tiles(folder: Path) -> None:
    tiles = ["--tile", str(TILE), "--overlap", str(OVERLAP)]
    images = predicted(folder, "found", *tiles, "--coverage", "0.9", "--batch-size", "3")
    paths = sorted((folder / "photos").iterdir())
    detector = load(folder / "detector", "cpu").deploy().with_precision("fp32")
    direct = detector(list(map(str, paths)), threshold=0, batch_size=3, coverage=0.9, tile=TILE, overlap=OVERLAP)
    unknown = 0
    for image, found in zip(images, direct, strict=True):
        assert found.edge_std_px is not None
        assert found.edge_intervals is not None
        for name in ("boxes", "scores", "edge_std_px", "edge_intervals"):
            np.testing.assert_array_equal(getattr(image, name), getattr(found, name).numpy())
        assert image.edge_std_px is not None
        assert np.isfinite(np.asarray(image.edge_intervals)).all()
        unknown += int(np.isnan(image.edge_std_px).sum())
    assert unknown > 0
    content = json.loads((folder / "found" / "detections.json").read_text(), parse_constant=no_constant)
    assert sum(value is None for row in content for value in row["edge_std_px"]) == unknown
    assert len(content) == sum(len(image.names) for image in images)
    assert len(list((folder / "found" / "drawings").iterdir())) == 1

    # Drift compares tiles, which the detector sees as images.
    counts = [len(Tiling(TILE, OVERLAP).tiles((image.width or 0, image.height or 0))) for image in images]
    assert [len(row["drift"]) for row in rows_of(folder / "found")] == [3 * count for count in counts]
    drift = json.loads((folder / "found" / "drift.json").read_text())
    assert drift["tests"]["number"]["images"][1] == sum(counts)


def test_a_tile_that_covers_every_image_gives_the_untiled_rows_to_the_bit(folder: Path) -> None:
    predicted(folder, "whole", "--coverage", "0.9", "--batch-size", "2")
    predicted(folder, "one_tile", "--coverage", "0.9", "--batch-size", "2", "--tile", "500")
    assert repr(rows_of(folder / "whole")) == repr(rows_of(folder / "one_tile"))


def test_results_depend_on_neither_parts_nor_an_interruption(folder: Path) -> None:
    def run(out: str, *options: str) -> str:
        predicted(folder, out, "--tile", str(TILE), "--batch-size", "1", *options)
        return repr(rows_of(folder / out))

    expected = run("all_in_one")
    assert run("parts", "--part-size", "1") == expected
    (folder / "parts" / "parts" / "part-000001.parquet").unlink()
    assert run("parts", "--part-size", "1") == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tile", "96"], "contains another prediction: tile changed"),
        ([], "contains another prediction: tile, overlap changed"),
        (["--tile", "64", "--overlap", "0.5"], "contains another prediction: overlap changed"),
        (["--overlap", "0.5"], "no tiles without --tile"),
        (["--tile", "64", "--num-explanations", "1"], "--num-explanations explains whole images"),
    ],
)
def test_another_tiling_and_options_that_do_not_fit_are_refused(
    options: Sequence[str], message: str, folder: Path
) -> None:
    predicted(folder, "of_64", "--tile", "64")
    with pytest.raises(SystemExit, match=message):
        predicted(folder, "of_64", *options)


def test_an_object_on_a_seam_is_one_row_of_the_prediction(tmp_path: Path) -> None:
    boxes, labels = [(10, 10, 30, 20), (60, 30, 140, 50), (120, 60, 180, 90)], [0, 1, 2]
    picture((200, 96), boxes, labels).save(tmp_path / "a.png")
    options = PredictOptions(
        precision="fp32", workers=IN_PROCESS, num_images=0, threshold=0.0, tiling=Tiling(96, 0.2), batch_size=2
    )
    detector = replace(seeing_detector(96), calibration=None)
    predict(detector, list_inputs([str(tmp_path / "a.png")]), str(tmp_path / "out"), options)
    (image,) = predicted_images(str(tmp_path / "out"))
    found = {(int(label), tuple(map(int, box))) for label, box in zip(image.labels, image.boxes, strict=True)}
    assert found == set(zip(labels, boxes, strict=True))
    assert len(image.names) == 3
    assert all(math.isfinite(score) for score in image.scores)
