"""Thresholds of every class against a plain loop that matches detections one by one, and against cases by hand."""

import math
from collections.abc import Sequence

import numpy as np
import pytest

from pipeline.evaluation.detections import DetectionTable, concatenate
from pipeline.evaluation.evaluate import evaluate_detections
from pipeline.evaluation.ground_truth import LARGEST_AREA, GroundTruth
from pipeline.evaluation.operating_points import OperatingPoint, OperatingPoints
from pipeline.evaluation.report import EvaluationReport
from tests.support.synthetic_scenes import AWAY, BOX, detections_of, ground_truth_of, random_scene


def report_on(truth: GroundTruth, *tables: DetectionTable, wanted_precision: float = 0.9) -> EvaluationReport:
    report = evaluate_detections(tables, truth, wanted_precision=wanted_precision)
    assert report is not None
    return report


def points_in(truth: GroundTruth, *tables: DetectionTable, wanted_precision: float = 0.9) -> OperatingPoints:
    return report_on(truth, *tables, wanted_precision=wanted_precision).points


def overlap(a: Sequence[float], b: Sequence[float], *, crowd: bool) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    area, other = ((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b))
    return width * height / (area if crowd else area + other - width * height)


def judged(truth: GroundTruth, table: DetectionTable, label: int) -> tuple[list[tuple[float, bool]], int]:
    """(score, right) of every detection of a class that counts, and the number of true boxes that do."""
    result, boxes = [], 0
    for image, image_id in enumerate(truth.image_id):
        here = [n for n in range(len(truth.label)) if truth.image[n] == image and truth.label[n] == label]
        ignored = {n: bool(truth.crowd[n]) or not 0 <= truth.area[n] <= LARGEST_AREA for n in here}
        boxes += sum(not each for each in ignored.values())
        found = [n for n in range(len(table)) if table.image_id[n] == image_id and table.label[n] == label]
        free = set(here)
        for one in sorted(found, key=lambda n: -table.score[n])[:100]:
            box = table.box[one].tolist()
            overlaps = {n: overlap(box, truth.box[n].tolist(), crowd=bool(truth.crowd[n])) for n in free}
            hits = [n for n in free if overlaps[n] >= 0.5]
            counted = [n for n in hits if not ignored[n]]
            if counted:
                free.discard(max(counted, key=lambda n: (overlaps[n], n)))
                result.append((float(table.score[one]), True))
            elif hits:
                best = max(hits, key=lambda n: overlaps[n])
                free -= set() if truth.crowd[best] else {best}
            elif 0 <= (box[2] - box[0]) * (box[3] - box[1]) <= LARGEST_AREA:
                result.append((float(table.score[one]), False))
    return result, boxes


@pytest.mark.parametrize("seed", range(4))
def test_the_thresholds_are_those_of_a_plain_loop_over_all_scores(seed: int) -> None:
    truth, table = random_scene(seed)
    points = points_in(truth, table, wanted_precision=0.55)
    compared = 0
    for label in range(len(truth.categories)):
        rows, boxes = judged(truth, table, label)
        candidates = []
        for least in sorted({score for score, _ in rows}):
            right = sum(good for score, good in rows if score >= least)
            kept = sum(score >= least for score, _ in rows)
            if boxes:
                candidates.append((2 * right / (kept + boxes), least, right / kept, right / boxes))
        best, precise = points.best_f1[label], points.at_precision[label]
        reached = [each for each in candidates if each[2] >= 0.55]
        assert (best is None) == (not candidates)
        assert (precise is None) == (not reached)
        if best is not None:
            wanted = max(candidates)  # of equal ones the highest score
            assert (best.f1, best.score, best.precision, best.recall) == pytest.approx(wanted)
            compared += 1
        if precise is not None:
            wanted = min(reached, key=lambda each: each[1])
            assert (precise.score, precise.precision, precise.recall) == pytest.approx(wanted[1:])
    assert compared >= 4


def test_detections_of_equal_scores_are_kept_together() -> None:
    truth = ground_truth_of([(0, BOX)], [(0, BOX)])
    tied = detections_of((100, 0, 0.8, BOX), (100, 0, 0.5, AWAY), (101, 0, 0.5, BOX))
    points = points_in(truth, tied)
    assert points.best_f1[0] == OperatingPoint(0.5, pytest.approx(2 / 3), 1.0)
    assert points.at_precision[0] == OperatingPoint(pytest.approx(0.8), 1.0, 0.5)
    assert report_on(truth, tied).mean_f1 == pytest.approx(0.8)


def test_a_precision_out_of_reach_a_class_without_boxes_and_one_without_detections_have_no_threshold() -> None:
    truth = ground_truth_of([(0, BOX)], [(2, BOX)])
    points = points_in(truth, detections_of((100, 0, 0.9, AWAY), (100, 0, 0.4, BOX), (100, 1, 0.9, BOX)))
    assert points.best_f1 == (OperatingPoint(pytest.approx(0.4), 0.5, 1.0), None, None)
    assert points.at_precision == (None, None, None)
    assert points.thresholds.best_f1[1:] == (None, None)
    found_and_not = report_on(truth, detections_of((100, 0, 0.4, BOX)))
    assert found_and_not.mean_f1 == pytest.approx((1 + 0) / 2)  # class 1 has no boxes, class 2 is never found
    assert math.isnan(report_on(ground_truth_of([]), detections_of()).mean_f1)


def test_the_table_and_the_csv_name_the_thresholds_and_none() -> None:
    truth = ground_truth_of([(0, BOX)], [(0, BOX)])
    report = report_on(truth, detections_of((100, 0, 0.9, AWAY), (101, 0, 0.5, BOX)))
    assert "thresholds (best F1; precision 0.9)" in report.table()
    assert "class 0: 0.50 with precision 0.50, recall 0.50, F1 0.50; none" in report.table()
    assert report.metrics(final=True)["val/final/best_F1"] == pytest.approx(0.5)
    assert report.per_class_csv().splitlines()[1].endswith(",0.500000,0.500000,0.500000,,,")
    assert report.as_json()["points"]["at_precision"] == [None] * 3


def test_the_order_in_which_tables_arrive_does_not_matter() -> None:
    truth, table = random_scene(7)
    halves = [table[table.image_id < 140], table[table.image_id >= 140]]
    assert all(len(half) for half in halves)
    assert points_in(truth, *halves) == points_in(truth, concatenate(halves[::-1]))
    assert np.isfinite([point.score for point in points_in(truth, table).best_f1[:5] if point]).all()
