"""Activation of weights that lie in a file alone: stated, told by norms or name, given, or asked for."""

import logging
from pathlib import Path

import pytest
import torch

from dfine_core import Detector, LoadError, ModelConfig, load
from dfine_core.checkpoints.activation import recognise_activation
from dfine_core.checkpoints.folder import tensors_to_bytes
from dfine_core.checkpoints.weights import read_checkpoint, save_released

SMALL = ModelConfig.variant("n", num_classes=3)
ASKED = "does not name its activation: taken as D-FINE's (relu)"


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    return Detector(SMALL).state_dict()


def opened(path: Path, caplog: pytest.LogCaptureFixture, given: str | None = None) -> tuple[str, str]:
    """Activation that a file is opened with, and the warnings."""
    caplog.clear()
    with caplog.at_level(logging.WARNING, "dfine_core"):
        activation = load(path, "cpu", activation=given).config.activation
    return activation, " ".join(caplog.messages)


@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_what_this_project_writes_states_its_activation_in_every_layout(
    activation: str, weights: dict[str, torch.Tensor], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = SMALL.with_(activation=activation)
    save_released(weights, config, tmp_path / "dfine.pth")  # the name is not looked at
    load(tmp_path / "dfine.pth", "cpu").save(tmp_path / "folder")
    for path in (tmp_path / "dfine.pth", tmp_path / "folder", tmp_path / "folder" / "model.safetensors"):
        assert opened(path, caplog) == (activation, "")
        other = "silu" if activation == "relu" else "relu"
        with pytest.raises(LoadError, match=f"were trained with {activation}, not {other}"):
            load(path, "cpu", activation=other)
    written = torch.load(tmp_path / "dfine.pth", weights_only=True)
    assert set(written) == {"model", "activation"}  # other programs take "model"
    assert read_checkpoint(tmp_path / "dfine.pth").keys() >= weights.keys()


@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_a_file_that_names_nothing_is_taken_as_d_fine_with_a_warning_unless_it_is_given(
    ending: str, weights: dict[str, torch.Tensor], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / f"best_stg2.{ending}"
    torch.save({"model": weights}, path) if ending == "pth" else path.write_bytes(tensors_to_bytes(weights))
    activation, said = opened(path, caplog)
    assert activation == "relu"
    assert ASKED in said
    assert f"dfine weights convert {path} --activation silu --to safetensors" in said
    for given in ("relu", "silu"):
        assert opened(path, caplog, given) == (given, "")


def test_the_name_of_a_file_tells_deim_from_d_fine(
    weights: dict[str, torch.Tensor], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name, activation in (("deim_dfine_hgnetv2_s_coco_120e", "silu"), ("DEIM-N", "silu"), ("dfine_n_coco", "relu")):
        path = tmp_path / f"{name}.pth"
        torch.save({"model": weights}, path)
        found, said = opened(path, caplog)
        assert found == activation
        assert said == (f"{path}: taken as weights of DEIM (silu), by the name of the file" if found == "silu" else "")
        assert opened(path, caplog, "relu") == ("relu", "")


def test_frozen_norms_of_the_backbone_tell_relu_whatever_the_name() -> None:
    trained = Detector(ModelConfig.variant("n", num_classes=3)).state_dict()
    frozen = Detector(ModelConfig.variant("n", num_classes=3, freeze_norm=True)).state_dict()
    assert recognise_activation(trained, "weights.pth", None) is None
    assert recognise_activation(frozen, "weights.pth", None) == "relu"
    assert recognise_activation(frozen, "deim_dfine_hgnetv2_x_obj2coco_24e.pth", None) == "relu"
    assert recognise_activation(frozen, "x.pth", "silu") == "silu"  # what is stated comes first
    assert recognise_activation({}, "model.pth", None) is None


def test_a_stated_activation_that_is_none_is_refused(weights: dict[str, torch.Tensor], tmp_path: Path) -> None:
    torch.save({"model": weights, "activation": "gelu"}, tmp_path / "odd.pth")
    with pytest.raises(LoadError, match="its activation 'gelu' is none of relu, silu"):
        load(tmp_path / "odd.pth", "cpu")
