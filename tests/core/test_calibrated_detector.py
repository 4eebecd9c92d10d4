"""A detector with a calibration: scores, thresholds, deviations and intervals, against plain loops."""

import hashlib
import json
import logging
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.stats import binom

from dfine_core import LoadedDetector, load
from dfine_core.image_detections import RawDetections, inner_outer
from dfine_core.images import read_image
from dfine_core.inference import image_sizes, prepare
from dfine_core.thresholds import ClassThresholds
from dfine_core.uncertainty import ScoreCalibration, edge_errors, fit_edge_calibration
from dfine_core.uncertainty.detector_calibration import LEVELS, DetectorCalibration
from pipeline.data.sources.synthetic import CLASSES
from tests.support.calibrations import FACTORS, JOINT, SLOPE, a_calibration
from tests.support.real_edges import REG_SCALE, real_edges
from tests.support.small_detectors import small_detector
from tests.support.synthetic_shards import synthetic_records


@pytest.fixture(scope="module")
def detector() -> LoadedDetector:
    return small_detector(CLASSES[:3])


@pytest.fixture(scope="module")
def images() -> list[bytes]:
    return [record.image for record in synthetic_records(3)]


def probability(score: float) -> float:
    """Score after the temperature, by its definition."""
    return 1 / (1 + math.exp(-SLOPE * math.log(score / (1 - score))))


# Scores and thresholds


def test_scores_are_calibrated_and_the_same_detections_are_kept(detector: LoadedDetector, images: list[bytes]) -> None:
    measured = replace(detector, thresholds=ClassThresholds((0.3, None, 0.6), (0.5, None, 0.7), 0.9))
    calibrated = replace(measured, calibration=a_calibration())
    for threshold in (None, "precision=0.9"):
        kept = 0
        for raw, shown in zip(measured(images, threshold), calibrated(images, threshold), strict=True):
            torch.testing.assert_close(shown.boxes, raw.boxes)
            assert shown.names == raw.names
            assert shown.scores.tolist() == pytest.approx(
                [probability(score) for score in raw.scores.tolist()], rel=1e-5
            )
            kept += len(raw)
        assert kept > 0
    assert calibrated.least_scores() == pytest.approx([probability(score) for score in (0.3, 0.4, 0.6)])
    assert "as calibrated scores: circle 0.40" in calibrated.threshold_text()
    assert (
        replace(calibrated, thresholds=None).threshold_text()
        == f"{probability(0.4):.2f}, the default of 0.4 calibrated"
    )
    assert "calibrated  on 40 images" in f"{calibrated}"
    assert "calibrated" not in f"{measured}"


def test_a_threshold_that_is_given_is_compared_with_the_scores_that_are_shown(
    detector: LoadedDetector, images: list[bytes]
) -> None:
    calibrated = replace(detector, calibration=a_calibration())
    every = calibrated(images, 0.0)
    given = float(torch.cat([found.scores for found in every]).median())
    some = calibrated(images, given)
    assert calibrated.least_scores(given) == (given,) * 3
    for all_of_them, kept in zip(every, some, strict=True):
        assert kept.scores.tolist() == [score for score in all_of_them.scores.tolist() if score >= given]
    assert 0 < sum(map(len, some)) < sum(map(len, every))
    assert sum(map(len, some)) != sum(map(len, detector(images, given)))


def test_a_detection_at_the_measured_threshold_is_kept_with_every_map(
    detector: LoadedDetector, images: list[bytes]
) -> None:
    score = float(detector(images[0], 0.0)[0].scores[7])
    steps = ScoreCalibration("isotonic", knots=((0.0, 0.1), (0.2, 0.1), (0.9, 0.7), (1.0, 0.7)))
    for scores in (steps, ScoreCalibration("platt", slope=3.0, offset=-1.0)):
        at_it = replace(
            detector,
            thresholds=ClassThresholds((score,) * 3, (None,) * 3, 0.9),
            calibration=replace(a_calibration(), scores=scores),
        )
        assert len(at_it(images[0])[0]) >= 8


# Deviations and intervals


def plain_edges(
    probabilities: NDArray[np.float64], bins: Sequence[float], box: Sequence[float], mass: float, reg_scale: float
) -> tuple[list[float], list[list[float]]]:
    """Deviation and central interval of the four edges of one box [cx, cy, w, h], value by value."""
    deviations, intervals = [], []
    for edge in range(4):
        p = probabilities[edge] / sum(probabilities[edge])
        unit = box[2 + edge % 2] / reg_scale
        mean = sum(value * bins[n] for n, value in enumerate(p))
        deviations.append(math.sqrt(sum(value * (bins[n] - mean) ** 2 for n, value in enumerate(p))) * unit)
        ends = []
        for level in ((1 - mass) / 2, (1 + mass) / 2):
            below, found = 0.0, bins[0] if level < p[0] / 2 else bins[-1]
            for n in range(len(bins) - 1):
                left, right = below + p[n] / 2, below + p[n] + p[n + 1] / 2
                if left <= level < right:
                    found = bins[n] + (bins[n + 1] - bins[n]) * (level - left) / (right - left)
                    break
                below += p[n]
            ends.append((reg_scale / 2 + found) * unit)
        centre = box[edge % 2]
        intervals.append([centre - ends[1], centre - ends[0]] if edge < 2 else [centre + ends[0], centre + ends[1]])
    return deviations, intervals


@pytest.mark.parametrize(("calibrated", "joint"), [(False, False), (True, False), (True, True)])
def test_deviations_and_intervals_equal_a_loop_over_the_output(
    calibrated: bool, joint: bool, detector: LoadedDetector, images: list[bytes]
) -> None:
    used = replace(detector, calibration=a_calibration()) if calibrated else detector
    found = used(images[1], 0.0, coverage=0.8, joint=joint)[0]
    assert found.intervals == ("conformal" if calibrated else "own")
    assert found.edge_std_px is not None
    assert found.edge_intervals is not None

    picture = read_image(images[1])
    with torch.no_grad():
        output = detector.detector(prepare([picture], (64, 64)).float() / 255, every_layer=True)
    width, height = picture.size
    scores = output.logits[0].sigmoid().flatten()
    for rank, pair in enumerate(scores.argsort(descending=True)[:30].tolist()):
        query, label = divmod(pair, 3)
        probabilities = output.matching.edge_logits[-1, 0, query].double().softmax(-1).numpy()
        box = [
            value * side
            for value, side in zip(output.matching.initial_boxes[0, query].tolist(), (width, height) * 2, strict=True)
        ]
        bins = detector.detector.decoder.bins.tolist()
        deviations, intervals = plain_edges(probabilities, bins, box, 0.8, detector.config.reg_scale)
        assert found.edge_std_px[rank].tolist() == pytest.approx(deviations, rel=1e-3, abs=1e-3)
        if calibrated:
            factor = FACTORS[0.8] * (2 if label == 1 else 1) * (JOINT if joint else 1)
            corners = found.boxes[rank].tolist()
            intervals = [[at - factor * d, at + factor * d] for at, d in zip(corners, deviations, strict=True)]
        assert found.edge_intervals[rank].tolist() == pytest.approx(np.array(intervals), rel=1e-3, abs=2e-2)


def test_a_coverage_that_was_not_fitted_takes_the_distributions_and_the_text_says_so(detector: LoadedDetector) -> None:
    calibrated = replace(detector, calibration=a_calibration())
    assert calibrated.edges().kind(0.7) == "own"
    assert calibrated.edges().text(0.7) == (
        "70 % of the true edges, by the distributions alone: the calibration has 0.5, 0.8, 0.9, 0.95"
    )
    assert calibrated.edges().text(0.9) == "90 % of the true edges, conformal, fitted on 40 images"
    assert detector.edges().text(0.9).endswith("by the distributions alone: the detector has no calibration")
    with pytest.raises(ValueError, match=r"coverage \(1\) must lie between 0 and 1"):
        detector.edges().kind(1.0)
    with pytest.raises(ValueError, match="it regresses boxes directly, so its edges have no distributions"):
        small_detector(regression="direct").edges()


def test_joint_intervals_are_those_of_a_calibration_or_refused(detector: LoadedDetector, images: list[bytes]) -> None:
    calibrated = replace(detector, calibration=a_calibration())
    expected = "90 % of the true boxes with all four edges, conformal, fitted on 40 images"
    assert calibrated.edges().text(0.9, joint=True) == expected
    with pytest.raises(
        ValueError, match=r"joint intervals of 70 % need .* the calibration has 0\.5, 0\.8, 0\.9, 0\.95: run"
    ):
        calibrated(images[0], 0.0, coverage=0.7, joint=True)
    with pytest.raises(
        ValueError, match="joint intervals of 90 % need a calibration, and the detector has no calibration"
    ):
        detector(images[0], 0.0, coverage=0.9, joint=True)
    with pytest.raises(ValueError, match=r"give coverage=0\.9, too, or leave joint out"):
        calibrated(images[0], joint=True)


def test_without_calibration_and_coverage_nothing_is_measured(detector: LoadedDetector, images: list[bytes]) -> None:
    (found,) = detector(images[0], 0.0)
    assert (found.edge_std_px, found.edge_intervals, found.intervals) == (None, None, None)
    (measured,) = replace(detector, calibration=a_calibration())(images[0], 0.0)
    assert measured.edge_std_px is not None
    assert (measured.edge_intervals, measured.intervals) == (None, None)
    (nothing,) = detector(images[0], 1.0, coverage=0.9)
    assert nothing.edge_intervals is not None
    assert nothing.edge_intervals.shape == (0, 4, 2)


def test_a_fused_detector_has_the_same_intervals(images: list[bytes]) -> None:
    whole, fused = small_detector()(images, coverage=0.9), small_detector().deploy()(images, coverage=0.9)
    for one, other in zip(whole, fused, strict=True):
        assert one.edge_intervals is not None
        torch.testing.assert_close(one.edge_intervals, other.edge_intervals, rtol=1e-3, atol=1e-2)


def test_bands_are_drawn_where_the_intervals_are(detector: LoadedDetector, images: list[bytes]) -> None:
    (found,) = detector(images[0], 0.0, coverage=0.5)
    with_bands, without = found.draw(images[0]), replace(found, edge_intervals=None).draw(images[0])
    assert np.any(np.asarray(with_bands) != np.asarray(without))
    inner, outer = inner_outer([[1.0, 3.0], [2.0, 4.0], [7.0, 9.0], [8.0, 10.0]])
    assert (inner, outer) == ((3.0, 4.0, 7.0, 8.0), (1.0, 2.0, 9.0, 10.0))


# Files


def test_a_calibration_is_read_from_the_folder_of_its_weights(
    detector: LoadedDetector, images: list[bytes], tmp_path: Path
) -> None:
    folder = replace(detector, calibration=a_calibration("of another file")).save(tmp_path / "saved")
    opened = load(folder, "cpu")
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert opened.calibration == a_calibration(digest)
    assert opened.calibration.digest == a_calibration().digest
    (one,), (other,) = opened(images[0]), replace(detector, calibration=a_calibration())(images[0])
    torch.testing.assert_close(one.scores, other.scores)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (a_calibration("0" * 64).to_json(), r"fitted to other weights \(SHA-256 000000000000\)"),
        (a_calibration(None).to_json(), r"fitted to other weights \(SHA-256 unknown\)"),
        (b"{", "run dfine calibrate again, or delete it"),
        (b"[]", "calibration cannot be read"),
        (json.dumps(json.loads(a_calibration().to_json()) | {"reference": [1]}).encode(), "reference of drift"),
    ],
)
def test_a_calibration_that_does_not_fit_is_ignored_loudly(
    content: bytes, message: str, detector: LoadedDetector, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = detector.save(tmp_path / "saved")
    (folder / "calibration.json").write_bytes(content)
    with caplog.at_level(logging.WARNING):
        assert load(folder, "cpu").calibration is None
    (warning,) = [record.getMessage() for record in caplog.records]
    assert f"{folder}/calibration.json is ignored, scores stay raw" in warning
    assert re.search(message, warning)
    assert "delete it" in warning


def test_a_file_of_an_earlier_version_without_reference_is_read() -> None:
    plain = json.loads(a_calibration().to_json())
    del plain["reference"]
    assert DetectorCalibration.from_json(json.dumps(plain).encode()) == replace(a_calibration(), reference=None)


# Real distributions


@pytest.mark.parametrize("joint", [False, True])
def test_intervals_of_a_real_detector_hold_what_they_promise(joint: bool, detector: LoadedDetector) -> None:
    """Detections of a trained detector, through the path of every prediction; the bound is binomial over boxes."""
    real = real_edges()
    half = torch.arange(len(real.scores)) % 2 == 0
    errors = edge_errors(real.boxes, real.true_boxes)
    fitted = tuple(fit_edge_calibration(real.std[half], errors[half], level, joint) for level in LEVELS)
    calibration = replace(a_calibration(), **{"boxes" if joint else "edges": fitted})
    assert torch.equal(detector.detector.decoder.bins, real.bins.float())
    assert detector.config.reg_scale == REG_SCALE
    count = len(real.scores)
    raw = RawDetections(
        boxes=real.boxes,
        scores=real.scores,
        labels=torch.zeros(count, dtype=torch.int64),
        size=torch.ones(2),
        queries=torch.arange(count),
        edge_logits=real.probabilities.float().clamp(min=1e-12).log(),
        initial_boxes=real.reference_boxes,
    )
    for level in LEVELS:
        found = replace(detector, calibration=calibration).keep(raw, torch.zeros(3), coverage=level, joint=joint)
        assert found.edge_intervals is not None
        low, high = found.edge_intervals.unbind(-1)
        held = ((low <= real.true_boxes) & (real.true_boxes <= high))[~half]
        inside = (held.all(-1) if joint else held).double().mean()
        boxes = int((~half).sum())
        lowest, highest = binom.interval(0.999, boxes, level)
        assert lowest / boxes <= inside <= highest / boxes


def test_raw_detections_are_those_of_the_batch(detector: LoadedDetector, images: list[bytes]) -> None:
    opened = [read_image(image) for image in images]
    pixels, sizes = prepare(opened, (64, 64)), image_sizes(opened)
    detections = detector.detect(pixels, sizes)
    for index, raw in enumerate(detector.find(pixels, sizes)):
        torch.testing.assert_close(raw.scores, detections.scores[index])
        torch.testing.assert_close(raw.boxes, detections.boxes[index])
