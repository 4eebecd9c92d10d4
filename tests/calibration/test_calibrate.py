"""Calibration of a detector: fitted on one half of the images, measured on the other, written for `load` and for people."""

import hashlib
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dfine_core import LoadedDetector
from dfine_core.boxes import xyxy_to_cxcywh
from dfine_core.model.distribution import weighting_function
from dfine_core.uncertainty import DetectedBoxes, TrueBoxes, edge_errors
from dfine_core.uncertainty.detector_calibration import LEVELS, DetectorCalibration
from jobs import calibrate as calibrate_job
from pipeline.calibration.fit import fit
from pipeline.calibration.measure import MASSES, MeasuredDetections, measure
from pipeline.calibration.recommended import recommended
from pipeline.data.shards.records import ImageRecord
from pipeline.errors import UserError
from pipeline.evaluation.ground_truth import read_ground_truth
from tests.support.small_detectors import small_detector
from tests.support.synthetic_shards import synthetic_records, write_shards


def drawn_detections(images: int, *, relative_error: float = 1.0) -> tuple[MeasuredDetections, TrueBoxes]:
    """One true box per image and a detection whose errors are normal with the predicted deviation times a factor."""
    generator = torch.Generator().manual_seed(0)
    low = torch.rand(images, 2, generator=generator) * 200
    true = torch.cat([low, low + 60 + 80 * torch.rand(images, 2, generator=generator)], -1)
    std = 0.5 + 4 * torch.rand(images, 4, generator=generator)
    boxes = true + relative_error * std * torch.randn(images, 4, generator=generator)
    z = torch.tensor([torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor((1 + mass) / 2)) for mass in MASSES])
    half = std.unsqueeze(1) * z.reshape(1, -1, 1)
    intervals = torch.stack([boxes.unsqueeze(1) - half, boxes.unsqueeze(1) + half], -1)
    right = torch.rand(images, generator=generator) < 0.7
    found = DetectedBoxes(
        image=torch.arange(images),
        boxes=torch.where(right.unsqueeze(-1), boxes, boxes + 500),
        labels=torch.zeros(images, dtype=torch.int64),
        scores=torch.full((images,), 0.6),
    )
    truth = TrueBoxes(torch.arange(images), true, torch.zeros(images, dtype=torch.int64))
    return MeasuredDetections(found, xyxy_to_cxcywh(boxes), std, intervals), truth


def test_errors_as_predicted_are_found_to_be_so() -> None:
    calibration, measured = fit(*drawn_detections(4000), 4000, least_score=0.3)
    assert measured.poor is None
    assert measured.width_error < 0.1
    for mass, held in measured.own_coverage.items():
        assert np.mean(held) == pytest.approx(mass, abs=0.03)
    for level, expected in zip(LEVELS, (0.674, 1.282, 1.645, 1.960), strict=True):
        assert calibration.at(level).factor == pytest.approx(expected, rel=0.06)
        assert measured.conformal[level] == pytest.approx(level, abs=0.03)
        assert measured.conformal_boxes[level] == pytest.approx(level, abs=0.05)
        assert calibration.at(level, joint=True).factor > calibration.at(level).factor
    assert measured.score_error[0] == pytest.approx(0.1, abs=0.03)  # scores are .6, and .7 of them are right
    assert measured.score_error[1] < 0.03
    width, inside = measured.widths["distribution"]
    assert inside == pytest.approx(0.9, abs=0.03)
    assert width < measured.widths["constant"][0]


def test_widths_that_are_too_small_are_mended_by_the_factor() -> None:
    calibration, measured = fit(*drawn_detections(4000, relative_error=2.0), 4000, least_score=0.3)
    assert measured.poor is not None
    assert "ENCE" in measured.poor
    assert np.mean(measured.own_coverage[0.9]) < 0.7
    assert calibration.at(0.9).factor == pytest.approx(2 * 1.645, rel=0.08)
    assert measured.conformal[0.9] == pytest.approx(0.9, abs=0.03)


def test_widths_without_relation_to_errors_are_called_poor() -> None:
    measured, truth = drawn_detections(2000)
    order = torch.randperm(2000, generator=torch.Generator().manual_seed(1))
    _, reliability = fit(replace(measured, std=measured.std[order]), truth, 2000, least_score=0.3)
    assert reliability.poor is not None
    assert "hardly follow" in reliability.poor


def test_halves_share_no_image() -> None:
    """Errors of the fitted half alone are known to the fit: other images change nothing but the report."""
    measured, truth = drawn_detections(400)
    calibration, _ = fit(measured, truth, 400, least_score=0.3)
    order = torch.randperm(400, generator=torch.Generator().manual_seed(0))
    other = order[200:]
    boxes = measured.found.boxes.clone()
    boxes[other] += 3.0
    changed = replace(measured, found=replace(measured.found, boxes=boxes))
    again, _ = fit(changed, truth, 400, least_score=0.3)
    assert again == calibration


def test_too_few_objects_are_refused_with_the_ways_out() -> None:
    with pytest.raises(
        UserError, match="two halves of the images, and 40 are needed in each: give more images or a lower"
    ):
        fit(*drawn_detections(60), 60, least_score=0.3)


def test_a_detector_without_distributions_is_refused(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "shards", synthetic_records(2))
    direct = small_detector(regression="direct")
    with pytest.raises(UserError, match="regresses boxes directly"):
        measure(direct, shards, read_ground_truth(shards), batch_size=2)


def test_a_set_without_images_is_refused(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "shards", synthetic_records(1))
    empty = replace(shards, manifest=shards.manifest.model_copy(update={"images": 0}))
    with pytest.raises(UserError, match="it holds no image to calibrate on"):
        measure(small_detector(), empty, read_ground_truth(shards), batch_size=2)


def test_measured_widths_equal_a_loop_over_images(tmp_path: Path) -> None:
    records = synthetic_records(5)
    shards, loaded = write_shards(tmp_path / "shards", records), small_detector()
    truth = read_ground_truth(shards)
    measured = measure(loaded, shards, truth, batch_size=2)  # the last batch is padded
    assert set(measured.found.image.tolist()) == set(range(5))
    bins = weighting_function(loaded.config.reg_max, loaded.config.up, loaded.config.reg_scale)
    row = 0
    for number, record in enumerate(records):
        (single,) = loaded([record.image], threshold=0.05)
        assert (measured.found.image[row : row + len(single)] == number).all()
        torch.testing.assert_close(measured.found.boxes[row : row + len(single)], single.boxes, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(measured.found.scores[row : row + len(single)], single.scores, rtol=1e-4, atol=1e-5)
        row += len(single)
    assert row == len(measured.found.scores)
    # The outermost bins bound every interval and deviation.
    unit = measured.sides / loaded.config.reg_scale
    assert (measured.std <= unit * (bins[-1] - bins[0]) / 2 + 1e-4).all()
    widths = measured.intervals.diff(dim=-1).squeeze(-1)  # [D, masses, 4]
    assert (widths.diff(dim=1) >= -1e-4).all()
    assert (measured.std > 0).all()


def records_as_detected(loaded: LoadedDetector, count: int) -> list[ImageRecord]:
    """Images whose true boxes are most of the detector's own, moved by a few pixels."""
    generator = np.random.default_rng(0)
    records = []
    for record in synthetic_records(count, longest_side=64):
        (found,) = loaded([record.image], threshold=0.3)
        kept = generator.random(len(found)) < 0.7
        moved = found.boxes.numpy()[kept] + generator.normal(0, 1, (int(kept.sum()), 4))
        boxes = moved.astype(np.float32)
        records.append(
            replace(
                record,
                boxes=boxes,
                labels=found.labels.numpy()[kept].astype(np.int32),
                areas=((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).astype(np.float32),
                crowd=np.zeros(len(boxes), bool),
            )
        )
    return records


def test_the_command_writes_the_calibration_beside_the_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded = small_detector()
    shards = write_shards(tmp_path / "shards", records_as_detected(loaded, 60))
    folder = loaded.save(tmp_path / "detector")
    calibrate_job.main([str(folder), str(tmp_path / "shards"), "--score", "0.05"])
    shown = capsys.readouterr().out
    content = json.loads((folder / "calibration.json").read_text())
    calibration = DetectorCalibration.from_json((folder / "calibration.json").read_bytes())
    assert calibration.images == 30
    assert content["data"] == shards.uri
    assert re.search("widths (hardly follow|are off)", shown)  # errors were drawn without regard to widths
    assert calibration.sha256 == hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert content["measured"]["conformal"]["0.9"] == pytest.approx(0.9, abs=0.1)
    assert content["measured"]["objects"] > 100
    page = (folder / "calibration.html").read_text()
    assert 'class="first poor"' in page
    assert re.findall(r'(?:src|href)="(?!data:)', page) == []
    assert len(re.findall("<img", page)) == 3
    # Its own files are replaced; files of others in a folder of --out are not.
    calibrate_job.main([str(folder), str(tmp_path / "shards"), "--score", "0.05"])
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "notes.txt").write_text("mine")
    with pytest.raises(SystemExit):
        calibrate_job.main([str(folder), str(tmp_path / "shards"), "--out", str(tmp_path / "foreign")])
    assert sorted(path.name for path in (tmp_path / "foreign").iterdir()) == ["notes.txt"]


def test_a_calibration_travels_as_json_and_broken_ones_are_refused() -> None:
    calibration, _ = fit(*drawn_detections(400), 400, least_score=0.3, method="isotonic", sha256="ab")
    content = calibration.to_json(more=1)
    assert DetectorCalibration.from_json(content) == calibration
    plain = json.loads(content)
    for broken in (b"[]", b"{", b"[" * 100_000, json.dumps(plain | {"edges": 3}).encode()):
        with pytest.raises(ValueError, match=r"cannot be read|Expecting"):
            DetectorCalibration.from_json(broken)
    with pytest.raises(
        ValueError, match=r"coverage \(0.7\) must be one of those that were fitted: 0.5, 0.8, 0.9, 0.95"
    ):
        calibration.at(0.7)


def test_half_widths_of_the_fit_hold_the_errors_of_its_own_images() -> None:
    measured, truth = drawn_detections(1000)
    calibration, _ = fit(measured, truth, 1000, least_score=0.3)
    errors = edge_errors(measured.found.boxes, truth.boxes)
    right = errors.amax(-1) < 100
    inside = errors[right] <= calibration.at(0.9).half_width(measured.std[right])
    assert float(inside.double().mean()) == pytest.approx(0.9, abs=0.03)


def test_recommended_thresholds_equal_a_loop_over_scores() -> None:
    measured, truth = drawn_detections(200)
    scores = torch.rand(200, generator=torch.Generator().manual_seed(3))
    measured = replace(measured, found=replace(measured.found, scores=scores))
    calibration, _ = fit(measured, truth, 200, least_score=0.0)
    (row, none) = recommended(measured, truth, calibration.scores, ("a", "b"))
    right = (measured.found.boxes - truth.boxes).abs().amax(-1) < 100
    best: tuple[float, float] = (0.0, 0.0)
    reached = []
    for at in sorted(scores.tolist(), reverse=True):
        kept = [bool(good) for good, score in zip(right, scores.tolist(), strict=True) if score >= at]
        precision, recall = sum(kept) / len(kept), sum(kept) / 200
        best = max(best, (2 * precision * recall / (precision + recall) if sum(kept) else 0.0, at))
        reached += [at] if precision >= 0.9 else []
    assert row.best_f1 is not None
    assert row.best_f1.raw == best[1]
    assert row.best_f1.calibrated == pytest.approx(float(calibration.scores(torch.tensor(best[1]))))
    assert (None if row.at_precision is None else row.at_precision.raw) == (reached[-1] if reached else None)
    assert (none.boxes, none.best_f1, none.at_precision) == (0, None, None)
