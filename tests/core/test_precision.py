"""Precisions of inference: equal results within the gate's tolerances, and a choice that holds for a whole job."""

from typing import get_args

import pytest
import torch

from dfine_core import precision_choice
from dfine_core.config import PrecisionName
from dfine_core.inference import LoadedDetector
from dfine_core.model.postprocess import Detections
from dfine_core.precision import AUTO, PRECISIONS
from dfine_core.precision_choice import _agreement, _detect_all, choose_precision, scenes
from tests.support.varied_detectors import loaded, small


@pytest.fixture
def detector(monkeypatch: pytest.MonkeyPatch) -> LoadedDetector:
    monkeypatch.setattr(precision_choice, "BUDGET_S", 0.0)
    monkeypatch.setattr(precision_choice, "multiplies_bf16", lambda: True)
    return loaded(small()).deploy()


def test_the_command_line_knows_every_precision() -> None:
    assert set(get_args(PrecisionName)) == {AUTO, *PRECISIONS}


@pytest.mark.parametrize("name", ["fp32-channels-last", "bf16-channels-last", "bf16"])
def test_detections_agree_within_the_tolerances_of_exported_files(detector: LoadedDetector, name: str) -> None:
    images, sizes = scenes(detector.config.input_size), torch.tensor([[640, 480]])
    expected = _detect_all(detector, "fp32", images, sizes)
    actual = _detect_all(detector, name, images, sizes)
    share, wanted = _agreement(expected, actual, sizes, name)
    assert share >= wanted
    assert all(each.scores.dtype == each.boxes.dtype == torch.float32 for each in actual)
    if name.startswith("bf16"):  # else nothing was compared
        assert not torch.equal(expected[0].scores, actual[0].scores)


def test_a_named_precision_repeats_its_results_to_the_bit(detector: LoadedDetector) -> None:
    images, sizes = scenes(detector.config.input_size)[:1], torch.tensor([[640, 480]])
    one = detector.with_precision("bf16-channels-last").detect(images, sizes)
    detector.with_precision("fp32")
    other = detector.with_precision("bf16-channels-last").detect(images, sizes)
    assert torch.equal(one.scores, other.scores)
    assert torch.equal(one.boxes, other.boxes)


def test_the_fastest_is_chosen_and_named_in_one_line(detector: LoadedDetector, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = 0.0
    cost = {"fp32": 0.3, "fp32-channels-last": 0.2, "bf16-channels-last": 0.1}
    detect = LoadedDetector.detect

    def slow(self: LoadedDetector, pixels: torch.Tensor, sizes: torch.Tensor) -> Detections:
        nonlocal clock
        clock += cost[self.precision]
        return detect(self, pixels, sizes)

    monkeypatch.setattr(LoadedDetector, "detect", slow)
    monkeypatch.setattr(precision_choice.time, "perf_counter", lambda: clock)
    choice = choose_precision(detector)
    assert choice.name == "bf16-channels-last"
    assert choice.line() == (
        "precision bf16-channels-last, by measurement (fp32 300 ms, fp32-channels-last 200 ms, bf16-channels-last 100 ms);"
        " --precision bf16-channels-last repeats it"
    )
    cost |= dict.fromkeys(cost, 0.3)
    assert choose_precision(detector).name == "fp32"  # nothing is gained


def test_a_precision_whose_detections_differ_is_refused(
    detector: LoadedDetector, monkeypatch: pytest.MonkeyPatch
) -> None:
    detect = LoadedDetector.detect

    def wrong(self: LoadedDetector, pixels: torch.Tensor, sizes: torch.Tensor) -> Detections:
        found = detect(self, pixels, sizes)
        if self.precision.startswith("bf16"):
            found = Detections(labels=found.labels, boxes=found.boxes + 100, scores=found.scores)
        return found

    monkeypatch.setattr(LoadedDetector, "detect", wrong)
    choice = choose_precision(detector)
    assert choice.name != "bf16-channels-last"
    assert choice.refused["bf16-channels-last"] < 0.9
    assert "bf16-channels-last refused" in choice.line()


def test_without_instructions_for_bf16_only_float32_is_measured(
    detector: LoadedDetector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision_choice, "multiplies_bf16", lambda: False)
    assert list(choose_precision(detector).milliseconds) == ["fp32", "fp32-channels-last"]


def test_an_unknown_precision_is_refused(detector: LoadedDetector) -> None:
    with pytest.raises(ValueError, match="unknown precision 'int8': choose auto or one of fp32"):
        detector.with_precision("int8")
