"""Error analysis on cases small enough to compute by hand."""

import numpy as np
import pytest

from pipeline.evaluation.analysis import TIDE_NAMES, confusion, precision_recall, tide_errors
from pipeline.evaluation.coco_metrics import coco_numbers, run_hotcoco
from pipeline.evaluation.detections import DetectionTable
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


@pytest.mark.parametrize("error", list(TIDE_NAMES))
def test_each_error_is_counted_and_weighted_as_tide_defines_it(error: str) -> None:
    truth, table, counts, gain = CASES[error]
    errors = tide_errors(run_hotcoco(truth, table))
    assert errors.count == {name: counts.get(name, 0) for name in TIDE_NAMES}
    assert errors.gain[error] == pytest.approx(gain)


def test_perfect_detections_have_no_errors() -> None:
    errors = tide_errors(
        run_hotcoco(ground_truth_of([(0, BOX), (1, AWAY)]), detections_of((100, 0, 0.9, BOX), (100, 1, 0.8, AWAY)))
    )
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
    result = confusion(truth, table, score=0.25)
    assert np.array_equal(result.matrix, expected)
    assert (result.score, result.iou) == (0.25, 0.5)


def test_a_detection_in_a_crowd_region_of_its_class_is_confused_with_nothing() -> None:
    truth = ground_truth_of([(0, BOX), (0, (100, 100, 300, 300))], [(1, BOX)], crowd=[1])
    table = detections_of((100, 0, 0.9, AWAY), (100, 1, 0.8, AWAY), (101, 0, 0.7, AWAY), (100, 0, 0.6, BOX))
    matrix = confusion(truth, table).matrix
    assert matrix[0, 0] == 1
    assert matrix[3].tolist() == [1, 1, 0, 0]  # another class in the region; the same position in another image
    assert matrix[1, 3] == 1
    assert matrix.sum() == 4


def test_every_true_box_is_in_the_confusion_matrix_once() -> None:
    truth, table = random_scene(1)
    matrix = confusion(truth, table).matrix
    assert np.array_equal(matrix[:-1].sum(1), truth.boxes_of_class)
    nothing = confusion(truth, table, score=1.1).matrix
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
