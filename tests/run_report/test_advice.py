"""What the page of results advises: each rule speaks where its facts hold, and is silent elsewhere."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.evaluation.evaluate import evaluate_detections
from pipeline.evaluation.report import EvaluationReport
from pipeline.run_report.advice import advice_for
from pipeline.run_report.results import ImageScore, RunResults, image_scores
from pipeline.training.checkpoint import Metadata
from pipeline.training.stage_two import EvaluationHistory
from tests.support.small_detectors import small_detector
from tests.support.synthetic_scenes import AWAY, BOX, detections_of, ground_truth_of

NAMES = ("class 0", "class 1", "class 2")
RIGHT = [(100 + image, 0, 0.9, BOX) for image in range(60)]


def report_on(*detections: tuple[int, int, float, Any]) -> EvaluationReport:
    """Evaluation of 60 images with a box of class 0 in each."""
    made = evaluate_detections([detections_of(*detections)], ground_truth_of(*([(0, BOX)] for _ in range(60))))
    assert made is not None
    return made


def results(**changed: Any) -> RunResults:
    """A finished run without anything to advise."""
    aps = changed.pop("aps", [0.5, 0.79, 0.8])
    metadata = Metadata.model_construct(
        run="run",
        step=30,
        history=EvaluationHistory(evaluated=tuple((10 * n, ap) for n, ap in enumerate(aps, start=1))),
        parent={"path": "weights.pth"},
    )
    made = RunResults(
        run="runs/run",
        finished=True,
        loaded=small_detector(NAMES, input_size=(64, 64)),
        metadata=metadata,
        experiment={"model": {"variant": "n"}},
        val=SimpleNamespace(uri="/val"),  # type: ignore[arg-type]  # a name is all that is asked of it
        report=report_on(*RIGHT),
        thresholds=(0.5, 0.5, 0.5),
        images=(),
        curves={},
        notice=None,
        train_boxes=(100, 100, 100),
    )
    return replace(made, **changed)


def steps(**changed: Any) -> list[str]:
    return [f"{advice.step} {advice.reason}" for advice in advice_for(results(**changed))]


def test_a_run_without_a_weakness_gets_no_advice() -> None:
    assert steps(aps=[0.5, 0.8, 0.8]) == []


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"finished": False}, "Let the training finish: the same command goes on. it is at step 30"),
        (
            {"aps": [0, 0, 0], "report": report_on(*((100 + n, 0, 0.9, AWAY) for n in range(60)))},
            "little was learned: AP is 0.000 after 30",
        ),
        ({"aps": [0.3, 0.5, 0.6]}, "Train longer: more schedule.epochs. AP rose by 0.100 over the last 1 evaluation"),
        ({"aps": [0.3, 0.6, 0.5]}, "AP was best after evaluation 2 of 3 (0.600), and fell to 0.500"),
    ],
)
def test_the_curve_of_ap_decides_about_the_length(changed: dict[str, Any], text: str) -> None:
    found = steps(**changed)
    assert any(text in line for line in found), found


def test_a_run_from_random_weights_is_advised_to_take_published_ones() -> None:
    scratch = results(aps=[0.5, 0.8, 0.8]).metadata.model_copy(update={"parent": {}})
    (line,) = steps(metadata=scratch)
    assert "--set init=dfine-n-coco" in line


@pytest.mark.parametrize(
    ("detections", "error"),
    [
        (RIGHT[:30], "missed"),
        ([*RIGHT, *((100 + image, 0, 0.95, AWAY) for image in range(60))], "background"),
        ([(100 + image, 1, 0.9, BOX) for image in range(60)], "classification"),
    ],
)
def test_the_costliest_error_is_named_with_its_cost(detections: list[Any], error: str) -> None:
    found = [line for line in steps(report=report_on(*detections)) if f"{error} errors cost" in line]
    assert len(found) == 1, steps(report=report_on(*detections))


def test_a_class_that_no_score_makes_precise_and_few_images_are_named() -> None:
    truth = ground_truth_of([(0, BOX)], [(0, BOX)])
    report = evaluate_detections([detections_of((100, 0, 0.9, AWAY), (101, 0, 0.5, BOX))], truth)
    assert report is not None
    found = steps(report=report)
    assert any("Do not rely on single detections of class 0." in line for line in found)
    assert any("AP over 2 images varies widely" in line for line in found)


def test_images_are_scored_by_what_is_found_missed_and_wrong_above_the_thresholds() -> None:
    truth = ground_truth_of([(0, BOX), (1, AWAY)], [(0, BOX)], [], [(2, BOX)])
    table = detections_of(
        (100, 0, 0.9, BOX),
        (100, 1, 0.3, AWAY),  # below its threshold
        (101, 0, 0.9, BOX),
        (101, 0, 0.8, AWAY),
        (103, 1, 0.6, BOX),  # another class
    )
    scores = image_scores(truth, table, (0.5, 0.5, 0.5))
    assert scores == (ImageScore(0, 1, 1, 0), ImageScore(1, 1, 0, 1), ImageScore(2, 0, 0, 0), ImageScore(3, 0, 1, 1))
    assert [score.f1 for score in scores] == pytest.approx([2 / 3, 2 / 3, 1, 0])
    assert image_scores(truth, table, (0.5, 0.2, 0.5))[0] == ImageScore(0, 2, 0, 0)
