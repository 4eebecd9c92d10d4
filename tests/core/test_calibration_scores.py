"""Matches of detections, and scores as probabilities: against recordings, plain loops, pycocotools and known truth."""

import contextlib
import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor

from dfine_core.uncertainty import (
    CROWD,
    UNMATCHED,
    DetectedBoxes,
    ScoreCalibration,
    TrueBoxes,
    detection_calibration_error,
    fit_score_calibration,
    label_aware_calibration_error,
    match_for_calibration,
    matched_detections,
)
from tests.support.real_edges import real_detections


def test_matches_of_a_trained_detector_equal_the_recorded_ones() -> None:
    detected, true, recorded = real_detections()
    assert len(recorded) > 4000
    assert {UNMATCHED, CROWD} <= set(recorded.tolist())
    assert match_for_calibration(detected, true).tolist() == recorded.tolist()


def test_chunks_of_pairs_do_not_change_matches(monkeypatch: pytest.MonkeyPatch) -> None:
    detected, true, recorded = real_detections()
    monkeypatch.setattr(matched_detections, "PAIRS", 100)
    assert match_for_calibration(detected, true).tolist() == recorded.tolist()


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 12), st.integers(0, 8), st.sampled_from([0.3, 0.5, 0.75]))
def test_matches_equal_pycocotools(seed: int, detections: int, boxes: int, iou: float) -> None:
    generator = np.random.default_rng(seed)

    def some(count: int) -> Tensor:
        low = generator.integers(0, 6, (count, 2))
        return torch.from_numpy(np.concatenate([low, low + generator.integers(2, 6, (count, 2))], 1)).double()

    detected = DetectedBoxes(
        image=torch.from_numpy(generator.integers(1, 3, detections)),
        boxes=some(detections),
        labels=torch.from_numpy(generator.integers(0, 2, detections)),
        scores=torch.from_numpy(generator.permutation(detections) / 20 + 0.1),
    )
    true = TrueBoxes(
        image=torch.from_numpy(generator.integers(1, 3, boxes)),
        boxes=some(boxes),
        labels=torch.from_numpy(generator.integers(0, 2, boxes)),
        crowd=torch.from_numpy(generator.random(boxes) < 0.2),
    )
    assert match_for_calibration(detected, true, iou).tolist() == by_pycocotools(detected, true, iou)


def by_pycocotools(detected: DetectedBoxes, true: TrueBoxes, iou: float) -> list[int]:
    if not len(detected.labels):
        return []
    assert true.crowd is not None

    def xywh(box: list[float]) -> list[float]:
        return [box[0], box[1], box[2] - box[0], box[3] - box[1]]

    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = {
            "images": [{"id": 1}, {"id": 2}],
            "categories": [{"id": 0}, {"id": 1}],
            "annotations": [
                {
                    "id": n + 1,
                    "image_id": int(true.image[n]),
                    "category_id": int(true.labels[n]),
                    "bbox": xywh(true.boxes[n].tolist()),
                    "area": 10.0,
                    "iscrowd": int(true.crowd[n]),
                }
                for n in range(len(true.labels))
            ],
        }
        coco.createIndex()
        found = coco.loadRes(
            [
                {
                    "image_id": int(detected.image[n]),
                    "category_id": int(detected.labels[n]),
                    "bbox": xywh(detected.boxes[n].tolist()),
                    "score": float(detected.scores[n]),
                }
                for n in range(len(detected.labels))
            ]
        )
        evaluation = COCOeval(coco, found, "bbox")
        evaluation.params.iouThrs = np.array([iou])
        evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, 1e10]], ["all"]
        evaluation.evaluate()
    match = [UNMATCHED] * len(detected.labels)
    for image in filter(None, evaluation.evalImgs):
        rows = zip(image["dtIds"], image["dtMatches"][0], image["dtIgnore"][0], strict=True)
        for identity, matched, ignored in rows:
            if matched:
                match[identity - 1] = CROWD if ignored else int(matched) - 1
    return match


# Scores


def drawn(slope: float, offset: float, count: int = 40_000) -> tuple[Tensor, Tensor]:
    """Scores whose true probability is sigmoid(slope * logit + offset)."""
    generator = torch.Generator().manual_seed(3)
    score = torch.rand(count, generator=generator, dtype=torch.float64) * 0.9 + 0.05
    probability = torch.sigmoid(slope * torch.logit(score) + offset)
    return score, torch.rand(count, generator=generator, dtype=torch.float64) < probability


def test_temperature_and_platt_find_the_map_that_scores_were_drawn_from() -> None:
    assert fit_score_calibration(*drawn(1 / 0.43, 0.0)).temperature == pytest.approx(0.43, abs=0.01)
    fitted = fit_score_calibration(*drawn(0.7, -1.0), method="platt")
    assert (fitted.slope, fitted.offset) == (pytest.approx(0.7, abs=0.03), pytest.approx(-1.0, abs=0.04))


def test_one_temperature_mends_the_scores_of_a_trained_detector() -> None:
    """All 1,000 images: temperature .427 from scores above .3, error .125 before."""
    detected, true, _ = real_detections()
    match = match_for_calibration(detected, true)
    counted = (match != CROWD) & (detected.scores >= 0.3)
    score, is_true = detected.scores[counted], match[counted] >= 0
    before, _ = detection_calibration_error(score, is_true)
    fitted = fit_score_calibration(score[::2], is_true[::2])
    after, _ = detection_calibration_error(fitted(score[1::2]), is_true[1::2])
    assert before == pytest.approx(0.125, abs=0.03)
    assert fitted.temperature == pytest.approx(0.427, abs=0.06)
    assert after < 0.5 * before


@pytest.mark.parametrize("method", ["temperature", "platt", "isotonic"])
def test_maps_rise_and_travel_as_plain_values(method: str) -> None:
    fitted = fit_score_calibration(*drawn(0.7, -1.0, 2000), method=method)  # type: ignore[arg-type]
    grid = torch.linspace(0, 1, 101)
    mapped = fitted(grid)
    assert (mapped.diff() >= 0).all()
    assert ((mapped >= 0) & (mapped <= 1)).all()
    assert mapped.dtype == grid.dtype
    assert ScoreCalibration.from_plain(fitted.to_plain()) == fitted


def test_isotonic_regression_has_no_calibration_error_where_it_was_fitted() -> None:
    score, is_true = drawn(0.4, 0.5, 3000)
    mapped = fit_score_calibration(score, is_true, method="isotonic")(score)
    assert detection_calibration_error(score, is_true)[0] > 0.05
    assert detection_calibration_error(mapped, is_true)[0] < 0.01


def test_a_map_of_true_detections_alone_is_refused() -> None:
    with pytest.raises(ValueError, match="3 of 3 detections are true: a map needs true and false ones"):
        fit_score_calibration(torch.rand(3), torch.ones(3, dtype=torch.bool))


@pytest.mark.parametrize(
    "broken", [{"slope": -1.0}, {"method": "magic"}, {"knots": [[0, float("inf")]]}, {"method": "isotonic"}]
)
def test_broken_maps_are_refused(broken: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="score calibration"):
        ScoreCalibration.from_plain(ScoreCalibration("temperature", 2.0).to_plain() | broken)


def test_calibration_errors_by_hand() -> None:
    score, is_true = torch.tensor([0.1, 0.2, 0.8, 0.9]), torch.tensor([False, True, True, True])
    error, table = detection_calibration_error(score, is_true, bins=2)
    assert error == pytest.approx((2 * abs(0.15 - 0.5) + 2 * abs(0.85 - 1.0)) / 4)
    assert table[:, 2].tolist() == [2, 2]
    iou, labels = torch.tensor([0.0, 0.6, 0.7, 0.9]), torch.tensor([0, 0, 0, 1])
    first = (2 * abs(0.15 - 0.5 * 0.6) + 1 * abs(0.8 - 0.7)) / 3
    second = abs(0.9 - 0.9)
    expected = (first + second) / 2
    assert label_aware_calibration_error(score, labels, is_true, iou, bins=2) == pytest.approx(expected)
