"""Error analysis on cases small enough to compute by hand."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pipeline.evaluation.analysis import precision_recall
from pipeline.evaluation.coco_metrics import coco_numbers, run_hotcoco
from pipeline.evaluation.detections import DetectionTable
from pipeline.evaluation.error_types import ERROR_TYPES, Errors
from pipeline.evaluation.evaluate import evaluate_detections
from pipeline.evaluation.ground_truth import GroundTruth
from tests.support.synthetic_scenes import AWAY, BOX, detections_of, ground_truth_of, random_scene

NEAR = (10.0, 10.0, 50.0, 22.0)  # IoU 12 / 40 = 0.3 with BOX
HALF = (51 + 50 * 2 / 3) / 101  # AP: right, wrong, right

CASES: dict[str, tuple[GroundTruth, DetectionTable, dict[str, int], float]] = {
    # the only box is covered, with another class: relabelled, it would be right
    "classification": (ground_truth_of([(0, BOX)]), detections_of((100, 1, 0.9, BOX)), {"classification": 1}, 1),
    # it overlaps at IoU 0.3: moved, it would be right
    "localisation": (ground_truth_of([(0, BOX)]), detections_of((100, 0, 0.9, NEAR)), {"localisation": 1}, 1),
    # neither the position nor the class: removed, and the box stays missed
    "both": (
        ground_truth_of([(0, BOX)], [(1, BOX)]),
        detections_of((100, 1, 0.9, NEAR), (101, 1, 0.8, BOX)),
        {"both": 1, "missed": 1},
        (1 - 1 / 2) / 2,  # the mean of two classes; class 1 has a wrong detection before its right one
    ),
    # the second detection of the first box, scored above the only one of the second
    "duplicate": (
        ground_truth_of([(0, BOX)], [(0, BOX)]),
        detections_of((100, 0, 0.9, BOX), (100, 0, 0.8, BOX), (101, 0, 0.7, BOX)),
        {"duplicate": 1},
        1 - HALF,
    ),
    # there is no object
    "background": (
        ground_truth_of([(0, BOX)]),
        detections_of((100, 0, 0.9, AWAY), (100, 0, 0.8, BOX)),
        {"background": 1},
        1 - 1 / 2,
    ),
    # one of two boxes found: recalls 0 .. 0.50
    "missed": (ground_truth_of([(0, BOX)], [(0, BOX)]), detections_of((100, 0, 0.9, BOX)), {"missed": 1}, 1 - 51 / 101),
}


HOTCOCO_NAMES = ("Cls", "Loc", "Both", "Dupe", "Bkg", "Miss")  # in the order of `ERROR_TYPES`


def errors_in(truth: GroundTruth, table: DetectionTable) -> Errors:
    report = evaluate_detections([table], truth)
    assert report is not None
    return report.errors


def confusion_in(truth: GroundTruth, table: DetectionTable) -> NDArray[np.int64]:
    report = evaluate_detections([table], truth)
    assert report is not None
    assert (report.confusion.score, report.confusion.iou) == (0.25, 0.5)
    return report.confusion.matrix


@pytest.mark.parametrize("error", ERROR_TYPES)
def test_each_error_is_counted_and_weighted_as_tide_defines_it(error: str) -> None:
    truth, table, counts, gain = CASES[error]
    errors = errors_in(truth, table)
    assert errors.count == {name: counts.get(name, 0) for name in ERROR_TYPES}
    assert errors.gain[error] == pytest.approx(gain)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), images=st.integers(1, 60), classes=st.integers(2, 9), ties=st.booleans())
def test_the_errors_are_those_that_hotcoco_finds(seed: int, images: int, classes: int, ties: bool) -> None:
    truth, table = random_scene(seed, images=images, classes=classes)
    if not ties:
        table = replace(table, score=np.random.default_rng(seed).permutation(len(table)).astype(np.float32))
    expected = run_hotcoco(truth, table, range(classes)).tide_errors(pos_thr=0.5, bg_thr=0.1)
    errors = errors_in(truth, table)
    assert list(errors.count.values()) == [expected["counts"][name] for name in HOTCOCO_NAMES]
    assert list(errors.gain.values()) == pytest.approx(
        [expected["delta_ap"][name] for name in HOTCOCO_NAMES], abs=1e-12
    )


def test_more_than_a_hundred_detections_of_a_class_in_an_image_are_no_errors() -> None:
    truth = ground_truth_of([(0, BOX)])
    table = detections_of(*[(100, 0, 0.9, AWAY)] * 100, *[(100, 1, 0.9, AWAY)] * 7, (100, 0, 0.1, BOX))
    assert errors_in(truth, table).count == {**dict.fromkeys(ERROR_TYPES, 0), "background": 107, "missed": 1}


def test_perfect_detections_have_no_errors() -> None:
    errors = errors_in(ground_truth_of([(0, BOX), (1, AWAY)]), detections_of((100, 0, 0.9, BOX), (100, 1, 0.8, AWAY)))
    assert set(errors.count.values()) == {0}
    assert set(errors.gain.values()) == {0}


def test_confusion_by_hand() -> None:
    truth = ground_truth_of([(0, BOX), (1, AWAY)], [(2, BOX)], [])
    table = detections_of(
        (100, 0, 0.9, BOX),  # right
        (100, 1, 0.8, BOX),  # the box is taken: background called 1
        (100, 2, 0.7, AWAY),  # 1 called 2
        (101, 2, 0.2, BOX),  # below the score: not seen, so 2 is missed
        (102, 0, 0.3, BOX),  # background called 0
    )
    expected = np.zeros((4, 4), int)
    for true, detected in ((0, 0), (3, 1), (1, 2), (2, 3), (3, 0)):
        expected[true, detected] += 1
    assert np.array_equal(confusion_in(truth, table), expected)


def test_a_detection_in_a_crowd_region_of_its_class_is_confused_with_nothing() -> None:
    truth = ground_truth_of([(0, BOX), (0, (100, 100, 300, 300))], [(1, BOX)], crowd=[1])
    table = detections_of((100, 0, 0.9, AWAY), (100, 1, 0.8, AWAY), (101, 0, 0.7, AWAY), (100, 0, 0.6, BOX))
    matrix = confusion_in(truth, table)
    assert matrix[0, 0] == 1
    assert matrix[3].tolist() == [1, 1, 0, 0]  # another class in the region; the same position in another image
    assert matrix[1, 3] == 1
    assert matrix.sum() == 4


def test_every_true_box_is_in_the_confusion_matrix_once() -> None:
    truth, table = random_scene(1)
    matrix = confusion_in(truth, table)
    assert np.array_equal(matrix[:-1].sum(1), truth.boxes_of_class)
    nothing = confusion_in(truth, replace(table, score=table.score / 5))
    assert np.array_equal(nothing[:-1, -1], truth.boxes_of_class)
    assert nothing.sum() == truth.boxes_of_class.sum()


def test_curves_average_to_the_numbers() -> None:
    truth, table = random_scene(2)
    result = coco_numbers(truth, table)
    curves = precision_recall(result)
    assert curves.mean.mean() == pytest.approx(result.numbers["AP"])
    assert curves.mean[0].mean() == pytest.approx(result.numbers["AP50"])
    assert curves.mean[5].mean() == pytest.approx(result.numbers["AP75"])
    assert curves.iou[5] == pytest.approx(0.75)
    assert curves.per_class.mean(1) == pytest.approx([c.ap50 for c in result.per_class], nan_ok=True)


def test_curves_without_true_boxes_are_nan() -> None:
    curves = precision_recall(coco_numbers(ground_truth_of([]), detections_of((100, 0, 0.9, BOX))))
    assert np.isnan(curves.mean).all()
