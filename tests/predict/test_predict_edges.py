"""Predictions with intervals of edges, calibrated scores and drift, through files and the command."""

import hashlib
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from scipy.stats import binom

from dfine_core.uncertainty import DetectedBoxes, TrueBoxes, match_for_calibration
from jobs import calibrate as calibrate_job
from jobs import predict as predict_job
from pipeline.data.shards.records import ImageRecord
from pipeline.predict.predicted_images import PredictedImage, predicted_images
from tests.support.labelled_by_detector import labelled_by
from tests.support.small_detectors import small_detector
from tests.support.synthetic_shards import synthetic_records, write_shards

FITTED, SEEN = 40, 24  # images: the first are calibrated on


@pytest.fixture(scope="module")
def records() -> list[ImageRecord]:
    return labelled_by(small_detector(), FITTED + SEEN)


@pytest.fixture(scope="module")
def folder(records: list[ImageRecord], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Detector that is calibrated on some images, with others beside it."""
    out = tmp_path_factory.mktemp("calibrated")
    loaded = small_detector()
    write_shards(out / "fitted", records[:FITTED])
    write_shards(out / "seen", records[FITTED:])
    loaded.save(out / "raw")
    calibrate_job.main([str(loaded.save(out / "detector")), str(out / "fitted")])
    return out


def predicted(folder: Path, out: str, *options: str, detector: str = "detector") -> list[PredictedImage]:
    given = [str(folder / detector), str(folder / "seen"), "--out", str(folder / out), "--num-images", "1", *options]
    predict_job.main([*given, "--precision", "fp32"])
    return list(predicted_images(str(folder / out)))


def share_inside(truth: list[ImageRecord], images: list[PredictedImage]) -> tuple[float, float, int]:
    """Shares of true edges, and of boxes with all four, inside the intervals of the detections that found something, and their
    number."""
    found = DetectedBoxes(
        image=torch.tensor([n for n, image in enumerate(images) for _ in image.names]),
        boxes=torch.tensor(np.concatenate([image.boxes for image in images])),
        labels=torch.tensor(np.concatenate([image.labels for image in images])).long(),
        scores=torch.tensor(np.concatenate([image.scores for image in images])),
    )
    true = TrueBoxes(
        image=torch.tensor([n for n, record in enumerate(truth) for _ in record.labels]),
        boxes=torch.tensor(np.concatenate([record.boxes for record in truth])),
        labels=torch.tensor(np.concatenate([record.labels for record in truth])).long(),
    )
    match = match_for_calibration(found, true).tolist()
    intervals = np.concatenate([image.edge_intervals for image in images if image.edge_intervals is not None])
    inside, whole, objects = 0, 0, 0
    for row, target in enumerate(match):
        if target >= 0:
            objects += 1
            held = 0
            for edge in range(4):
                low, high = intervals[row, edge].tolist()
                held += low <= float(true.boxes[target, edge]) <= high
            inside, whole = inside + held, whole + (held == 4)
    return inside / (4 * objects), whole / objects, objects


def test_intervals_of_the_command_hold_the_wanted_share_of_other_images(
    records: list[ImageRecord], folder: Path
) -> None:
    for coverage in (0.5, 0.9):
        images = predicted(folder, f"found-{coverage}", "--coverage", f"{coverage}")
        share, whole, objects = share_inside(records[FITTED:], images)
        lowest, highest = binom.interval(0.999, objects, coverage)
        assert objects > 200
        assert lowest / objects <= share <= highest / objects
        assert whole < lowest / objects  # the edges of a box miss one by one
        images = predicted(folder, f"joint-{coverage}", "--coverage", f"{coverage}", "--joint")
        _, whole, _ = share_inside(records[FITTED:], images)
        assert lowest / objects <= whole <= highest / objects
        plan = json.loads((folder / f"joint-{coverage}/plan.json").read_text())
        assert plan["interval_text"].startswith(
            f"{100 * coverage:g} % of the true boxes with all four edges, conformal"
        )


def test_parts_and_coco_results_have_scores_deviations_and_intervals(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = predicted(folder, "whole", "--coverage", "0.9")
    shown = capsys.readouterr().out
    assert "intervals: 90 % of the true edges, conformal, fitted on 20 images" in shown
    assert "scores: calibrated on 20 images" in shown
    assert "drift: none found against the calibration images (Kolmogorov-Smirnov over images, level 0.01)" in shown
    raw = predicted(folder, "raw-found", detector="raw")
    results = json.loads((folder / "whole/detections.json").read_text())
    row = 0
    for image, plain in zip(images, raw, strict=True):
        assert plain.edge_std_px is None
        assert plain.edge_intervals is None
        np.testing.assert_array_equal(image.boxes, plain.boxes)  # the same detections, with other scores
        assert image.edge_std_px is not None
        assert image.edge_intervals is not None
        for index in range(len(image.names)):
            assert results[row]["edge_std_px"] == pytest.approx(image.edge_std_px[index].tolist())
            assert np.array(results[row]["edge_intervals"]) == pytest.approx(image.edge_intervals[index])
            assert results[row]["score"] == pytest.approx(float(image.scores[index]))
            row += 1
    assert row == len(results) > 100
    assert any(not np.allclose(image.scores, plain.scores) for image, plain in zip(images, raw, strict=True))
    info = json.loads((folder / "whole/images.json").read_text())["info"]
    assert info["scores"] == "calibrated"
    assert info["edge_intervals"].startswith("90 %")
    loaded = COCO(str(folder / "whole/images.json")).loadRes(str(folder / "whole/detections.json"))
    assert len(loaded.getAnnIds()) == row
    # Without a calibration and a coverage, files have what they always had.
    assert set(json.loads((folder / "raw-found/detections.json").read_text())[0]) == {
        *("image_id", "category_id", "bbox", "score")
    }
    assert not (folder / "raw-found/drift.json").exists()


def test_without_a_calibration_intervals_are_the_distributions_own(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = predicted(folder, "own", "--coverage", "0.9", detector="raw")
    assert "by the distributions alone: the detector has no calibration" in capsys.readouterr().out
    widest = [image.edge_intervals for image in images if image.edge_intervals is not None and len(image.names)]
    assert widest
    assert all((each[..., 0] <= each[..., 1]).all() for each in widest)
    plan = json.loads((folder / "own/plan.json").read_text())
    assert (plan["intervals"], plan["calibration"]) == ("own", None)


def test_another_coverage_or_calibration_does_not_join_a_prediction(folder: Path) -> None:
    predicted(folder, "once", "--coverage", "0.9")
    with pytest.raises(SystemExit, match="contains another prediction: coverage changed"):
        predicted(folder, "once", "--coverage", "0.8")
    with pytest.raises(SystemExit, match="calibration"):
        predicted(folder, "once", "--coverage", "0.9", detector="raw")


def test_joint_intervals_without_coverage_or_calibration_are_refused_with_the_way_out(folder: Path) -> None:
    with pytest.raises(SystemExit, match=r"--joint says what --coverage counts: give --coverage 0\.9, too"):
        predicted(folder, "never", "--joint")
    with pytest.raises(
        SystemExit, match=r"--coverage 0\.9 --joint: joint .* the detector has no calibration: run dfine calibrate"
    ):
        predicted(folder, "never", "--coverage", "0.9", "--joint", detector="raw")
    assert not (folder / "never").exists()


@pytest.mark.parametrize("given", ["0", "1", "1.5", "nan"])
def test_a_coverage_outside_its_range_is_refused(given: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        predicted(folder, "never", "--coverage", given)
    assert "must lie between 0 and 1" in capsys.readouterr().err


def test_direct_regression_has_no_intervals(folder: Path) -> None:
    small_detector(regression="direct").save(folder / "direct")
    with pytest.raises(SystemExit, match=r"--coverage 0.9: .* its edges have no distributions"):
        predicted(folder, "never", "--coverage", "0.9", detector="direct")
    assert len(predicted(folder, "direct-found", detector="direct")) == SEEN


def test_images_of_another_kind_are_reported_as_drift(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dark = [replace(record, image=darkened(record.image)) for record in synthetic_records(SEEN, longest_side=64)]
    write_shards(folder / "dark", dark)
    given = [str(folder / "detector"), str(folder / "dark"), "--out", str(folder / "drifted"), "--precision", "fp32"]
    predict_job.main([*given, "--threshold", "0.9"])
    assert "drift: these images are not like those of the calibration" in capsys.readouterr().out
    content = json.loads((folder / "drifted/drift.json").read_text())
    assert content["moved"] is True
    assert content["level"] == 0.01
    for name, test in content["tests"].items():
        histogram = content["histograms"][name]
        assert test["images"] == [sum(histogram["calibration"]), sum(histogram["prediction"])]
        assert test["moved"] == (test["p_value"] is not None and test["p_value"] < 0.01 / 3)
    assert content["tests"]["number"]["images"] == [FITTED, SEEN]  # whatever the threshold of the prediction
    assert (folder / "drifted/drift.png").read_bytes().startswith(b"\x89PNG")


def darkened(content: bytes) -> bytes:
    import io

    from PIL import Image, ImageEnhance

    with Image.open(io.BytesIO(content)) as image:
        dark = ImageEnhance.Brightness(image.convert("RGB")).enhance(0.15)
    stream = io.BytesIO()
    dark.save(stream, "PNG")
    return stream.getvalue()


def test_the_calibration_names_its_weights_and_images(folder: Path) -> None:
    content = json.loads((folder / "detector/calibration.json").read_text())
    assert content["sha256"] == hashlib.sha256((folder / "detector/model.safetensors").read_bytes()).hexdigest()
    assert len(content["reference"]["number"]) == FITTED
    assert content["reference"]["least_score"] == 0.3
    counts = [number for number in content["reference"]["number"] if number is not None]
    assert math.fsum(counts) > FITTED
