"""Thresholds of a detector: which score decides, and that they travel with every folder that holds it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dfine_core import LoadedDetector, LoadError, load
from dfine_core.thresholds import ClassThresholds
from pipeline.data.sources.synthetic import CLASSES
from tests.support.small_detectors import small_detector
from tests.support.synthetic_shards import synthetic_records

OWN = ClassThresholds(best_f1=(0.3, None, 0.75), at_precision=(0.8, None, None), precision=0.9)


@pytest.fixture(scope="module")
def detector() -> LoadedDetector:
    return replace(small_detector(CLASSES[:3]), thresholds=OWN)


def test_each_class_has_its_own_threshold_the_default_or_the_given_one(detector: LoadedDetector) -> None:
    assert detector.least_scores() == (0.3, 0.4, 0.75)
    assert detector.least_scores(0.6) == (0.6, 0.6, 0.6)
    assert replace(detector, thresholds=None).least_scores() == (0.4, 0.4, 0.4)
    image = synthetic_records(1)[0].image
    (every,), (own,) = detector(image, threshold=0.0), detector(image)
    least = torch.tensor([0.3, 0.4, 0.75])
    expected = [n for n in range(len(every)) if every.scores[n] >= least[every.labels[n]]]
    assert 0 < len(expected) < len(every)
    assert own.scores.tolist() == every.scores[expected].tolist()
    assert own.labels.tolist() == every.labels[expected].tolist()


def test_their_origin_is_named(detector: LoadedDetector) -> None:
    first, second, third = detector.names
    text = f"best F1 on the validation images: {first} 0.30, {second} 0.40, {third} 0.75"
    assert detector.threshold_text() == text
    assert text in str(detector)
    assert detector.threshold_text(0.25) == "0.25, as given"
    assert replace(detector, thresholds=None).threshold_text() == "0.4, the default"
    nothing = ClassThresholds((None,) * 3, (None,) * 3, 0.9)  # no class was ever found
    assert replace(detector, thresholds=nothing).threshold_text() == "0.4, the default"


def test_a_wanted_precision_takes_the_scores_that_reached_it_and_nothing_of_other_classes(
    detector: LoadedDetector,
) -> None:
    own = ClassThresholds(best_f1=(0.3, None, 0.75), at_precision=(0.35, None, 0.3), precision=0.9)
    precise = replace(detector, thresholds=own)
    first, second, third = detector.names
    assert precise.threshold_text("precision=0.9") == (
        f"precision 0.9 on the validation images: {first} 0.35, {third} 0.30, nothing of {second}, which never reached it"
    )
    image = synthetic_records(1)[0].image
    (every,), (found,) = detector(image, threshold=0.0), precise(image, threshold="precision=0.9")
    least = torch.tensor([0.35, 2.0, 0.3])
    expected = [n for n in range(len(every)) if every.scores[n] >= least[every.labels[n]]]
    assert 0 < len(expected) < len(every)
    assert found.scores.tolist() == every.scores[expected].tolist()
    assert second in every.names
    assert second not in found.names


@pytest.mark.parametrize("threshold", ["precision=0.8", "0.5", "precision=", "precision=nan", "precision=2", 1.5])
def test_other_precisions_and_other_texts_are_refused(threshold: str | float, detector: LoadedDetector) -> None:
    with pytest.raises(
        ValueError, match=r"precision 0\.8, the detector has those of precision 0\.9 alone|threshold \("
    ):
        detector.least_scores(threshold)
    with pytest.raises(ValueError, match=r"the detector has none|threshold \("):
        replace(detector, thresholds=None).least_scores(threshold)


def test_they_are_saved_and_loaded_and_a_detector_without_them_has_none(
    detector: LoadedDetector, tmp_path: Path
) -> None:
    assert load(detector.save(tmp_path / "with"), "cpu").thresholds == OWN
    assert load(replace(detector, thresholds=None).save(tmp_path / "without"), "cpu").thresholds is None


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"best_f1": [0.3, 0.4]}, "thresholds of 2 classes for a detector of 3"),
        ({"at_precision": [0.3, 0.4, 1.5]}, r"threshold \(1.5\) must lie in 0..1"),
        ({"precision": None}, "detector of 3"),
        ({"best_f1": 7}, "cannot be read"),
    ],
)
def test_damaged_ones_are_refused(
    changed: dict[str, Any], message: str, detector: LoadedDetector, tmp_path: Path
) -> None:
    plain = OWN.to_plain()
    assert ClassThresholds.from_plain(plain, 3) == OWN
    with pytest.raises(ValueError, match=message):
        ClassThresholds.from_plain(plain | changed, 3)
    folder = detector.save(tmp_path / "saved")
    description = (folder / "detector.json").read_text()
    (folder / "detector.json").write_text(description.replace('"precision": 0.9', '"precision": 9'))
    with pytest.raises(LoadError, match=r"threshold \(9\) must lie"):
        load(folder, "cpu")
