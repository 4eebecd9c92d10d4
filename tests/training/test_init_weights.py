"""Initial weights of a run: files of every origin, fitted to the run's detector, with what was done in the log."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dfine_core import Detector, ModelConfig
from dfine_core.inference import load
from pipeline.training.init_weights import load_initial
from tests.support.varied_detectors import varied_detector

NAMES = ("red", "green", "blue")
SMALL = ModelConfig.variant("n", num_classes=3, input_size=(128, 128), num_queries=30)


def drifted(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights as the released code's moving average leaves them after many updates."""
    moved = ("up", "reg_scale", "num_points_scale")
    return {
        key: value * (1 - 1.5e-4) if key.rsplit(".", 1)[-1] in moved else value for key, value in state_dict.items()
    }


def saved(content: object, path: Path) -> str:
    torch.save(content, path)
    return str(path)


def equal(ours: dict[str, Tensor], others: dict[str, Tensor]) -> bool:
    return ours.keys() == others.keys() and all(torch.equal(ours[key], others[key]) for key in ours)


def test_averaged_weights_of_the_released_code_are_taken_whole_and_the_log_names_their_constants(
    tmp_path: Path,
) -> None:
    source = varied_detector(SMALL, seed=1)
    averaged = {"module": drifted(source.state_dict()), "updates": 30_000}
    path = saved({"model": {}, "ema": averaged}, tmp_path / "best_stg2.pth")
    detector = Detector(SMALL)
    origin = load_initial(detector, path, NAMES)
    assert equal(detector.state_dict(), source.state_dict())
    noted = [line for line in origin.lines if "off by at most 1.5e-04" in line]
    assert len(noted) == 1
    assert not any("re-binned" in line for line in origin.lines)


def test_a_drifted_file_opens_as_a_detector_with_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = varied_detector(ModelConfig.variant("n", num_classes=3), seed=1)
    path = saved({"model": drifted(source.state_dict())}, tmp_path / "n.pth")
    opened = load(path, "cpu")
    assert (opened.config.up, opened.config.reg_scale) == (0.5, 4.0)
    assert equal(opened.detector.state_dict(), source.state_dict())
    (record,) = caplog.records
    assert record.getMessage().startswith(f"{path}: 7 constants were off")


def test_other_bins_are_still_re_binned_from_drifted_ones(tmp_path: Path) -> None:
    source = varied_detector(SMALL, seed=1)
    path = saved({"model": drifted(source.state_dict())}, tmp_path / "n.pth")
    detector = Detector(SMALL.with_(reg_max=16))
    origin = load_initial(detector, path, NAMES)
    assert any("re-binned from reg_max 32, reg_scale 4, up 0.5 to reg_max 16" in line for line in origin.lines)
    assert math.isclose(float(detector.state_dict()["decoder.up"]), 0.5)
