"""Initial weights of a run: files of every origin, fitted to the run's detector, with what was done in the log."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dfine_core import Detector, ModelConfig
from dfine_core.checkpoints.folder import tensors_to_bytes
from dfine_core.checkpoints.transformers_layout import to_transformers
from dfine_core.inference import load
from pipeline.config import ConfigError
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
    path = saved({"model": drifted(source.state_dict())}, tmp_path / "dfine_n.pth")
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


# Layouts of others


def transformers_file(source: Detector, path: Path) -> str:
    path.write_bytes(tensors_to_bytes(to_transformers(source.state_dict())))
    return str(path)


def test_a_safetensors_file_with_the_names_of_transformers_is_taken(tmp_path: Path) -> None:
    source = varied_detector(SMALL, seed=1)
    detector = Detector(SMALL)
    load_initial(detector, transformers_file(source, tmp_path / "model.safetensors"), NAMES)
    assert equal(detector.state_dict(), source.state_dict())


def test_a_folder_of_timm_is_a_backbone(tmp_path: Path) -> None:
    source = varied_detector(SMALL, seed=1).backbone
    weights = {**source.state_dict(), "head.fc.weight": torch.ones(2, 2)}
    (tmp_path / "model.safetensors").write_bytes(tensors_to_bytes(weights))
    (tmp_path / "config.json").write_text('{"architecture": "hgnetv2_b0"}')
    detector = Detector(SMALL)
    origin = load_initial(detector, str(tmp_path), NAMES)
    assert equal(detector.backbone.state_dict(), source.state_dict())
    assert origin.lines == (f"backbone from {tmp_path}",)
    assert origin.parent["file"] == f"{tmp_path}/model.safetensors"


# Backbones in part


@pytest.mark.parametrize("prefix", ["", "backbone."])
def test_what_a_backbone_file_lacks_stands_in_log_and_record(prefix: str, tmp_path: Path) -> None:
    source = varied_detector(SMALL, seed=1).backbone.state_dict()
    part = {f"{prefix}{key}": value for key, value in source.items() if not key.startswith("stages.3.")}
    (tmp_path / "part.safetensors").write_bytes(tensors_to_bytes(part))
    detector = Detector(SMALL)
    before = {key: value.clone() for key, value in detector.state_dict().items()}
    origin = load_initial(detector, str(tmp_path / "part.safetensors"), NAMES)
    (line,) = origin.lines
    random = sum(p.numel() for p in detector.backbone.stages[3].parameters())
    assert line.endswith(f"it lacks stages.3, which stay random: {random:,} of 1,850,396 parameters")
    assert origin.parent["random"] == "stages.3"
    for key, value in detector.state_dict().items():
        assert torch.equal(value, part.get(prefix + key.removeprefix("backbone."), before[key])), key


def test_a_backbone_in_parts_of_blocks_is_refused(tmp_path: Path) -> None:
    part = varied_detector(SMALL, seed=1).backbone.state_dict()
    del part["stages.3.blocks.0.aggregation.1.conv.weight"]
    (tmp_path / "part.safetensors").write_bytes(tensors_to_bytes(part))
    with pytest.raises(ConfigError, match=r"part.safetensors: .*does not fit.*\n.*1 missing from the checkpoint"):
        load_initial(Detector(SMALL), str(tmp_path / "part.safetensors"), NAMES)
