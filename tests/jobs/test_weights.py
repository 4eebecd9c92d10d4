"""`dfine weights`: the list, what `verify` says about files, and conversions that are read back."""

import hashlib
from pathlib import Path

import pytest
import torch

from dfine_core import Detector, ModelConfig, load
from dfine_core.checkpoints.folder import tensors_to_bytes
from dfine_core.checkpoints.transformers_layout import to_transformers
from jobs import weights
from pipeline.pretrained import table
from tests.support.varied_detectors import loaded, varied_detector

SMALL = ModelConfig.variant("n", num_classes=3, input_size=(128, 128), num_queries=30)


def run(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    weights.main(list(words))
    return capsys.readouterr().out


def failure(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as end:
        weights.main(list(words))
    return f"{end.value.code}\n{capsys.readouterr().err}"


def test_the_list_has_every_name_with_its_repository(capsys: pytest.CaptureFixture[str]) -> None:
    lines = run(capsys, "list").splitlines()
    for name, row in table().items():
        (line,) = [line for line in lines if line.startswith(f"{name} ")]
        assert line.endswith(row.repo)


def test_verify_names_variant_classes_and_digest_of_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(tensors_to_bytes(to_transformers(Detector(ModelConfig.variant("s")).state_dict())))
    shown = run(capsys, "verify", str(file))
    assert "detector: D-FINE-S, 640 x 640, reg_max 32, reg_scale 4" in shown
    assert "classes: 80 (person, bicycle" in shown
    assert hashlib.sha256(file.read_bytes()).hexdigest() in shown


@pytest.mark.parametrize(("variant", "name"), [("n", "B0"), ("m", "B2"), ("l", "B4")])
def test_verify_recognises_backbones(
    variant: str, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    backbone = Detector(ModelConfig.variant(variant, freeze_norm=False)).backbone.state_dict()
    torch.save(backbone, tmp_path / "whole.pth")
    assert f"backbone: HGNetv2-{name}, whole" in run(capsys, "verify", str(tmp_path / "whole.pth"))
    part = {key: tensor for key, tensor in backbone.items() if not key.startswith("stages.3.")}
    torch.save(part, tmp_path / "part.pth")
    assert f"backbone: HGNetv2-{name}, without stages.3" in run(capsys, "verify", str(tmp_path / "part.pth"))
    (tmp_path / "timm").mkdir()
    (tmp_path / "timm" / "config.json").write_text('{"architecture": "hgnetv2"}')
    (tmp_path / "timm" / "model.safetensors").write_bytes(tensors_to_bytes(backbone))
    assert f"backbone: HGNetv2-{name}, whole" in run(capsys, "verify", str(tmp_path / "timm"))


def test_verify_fails_on_files_that_are_damaged_wrong_or_something_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state_dict = varied_detector(ModelConfig.variant("n", num_classes=3)).state_dict()
    key = "decoder.decoder.layers.0.self_attn.in_proj_weight"
    query, _, value = state_dict[key].chunk(3)
    torch.save({"model": state_dict | {key: torch.cat([query, value, value])}}, tmp_path / "bad.pth")
    assert "keys are a copy of its values" in failure(capsys, "verify", str(tmp_path / "bad.pth"))
    (tmp_path / "cut.pth").write_bytes((tmp_path / "bad.pth").read_bytes()[:1000])
    assert "cut.pth cannot be read" in failure(capsys, "verify", str(tmp_path / "cut.pth"))
    torch.save({"stem.conv.weight": torch.ones(1)}, tmp_path / "resnet.pth")
    assert "a backbone that fits none of HGNetv2 B0" in failure(capsys, "verify", str(tmp_path / "resnet.pth"))
    assert "does not exist" in failure(capsys, "verify", str(tmp_path / "none.pth"))


@pytest.mark.parametrize("layout", weights.LAYOUTS)
def test_a_conversion_is_equal_in_every_tensor(layout: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = loaded(SMALL)
    model.save(tmp_path / "own")
    out = tmp_path / ("made.pth" if layout == "released" else "made")
    run(capsys, "convert", str(tmp_path / "own"), "--to", layout, "--out", str(out))
    again = load(out, "cpu").detector.state_dict()
    assert all(torch.equal(again[key], tensor) for key, tensor in model.detector.state_dict().items())
    assert "exists already" in failure(capsys, "convert", str(tmp_path / "own"), "--to", layout, "--out", str(out))


def test_a_released_file_of_deim_becomes_a_folder_that_names_its_activation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = ModelConfig.variant("n", num_classes=3, activation="silu")
    torch.save({"model": varied_detector(config).state_dict()}, tmp_path / "last.pth")
    assert load(tmp_path / "last.pth", "cpu").config.activation == "relu"  # which nothing contradicts
    words = ("--activation", "silu", "--to", "safetensors", "--out", str(tmp_path / "deim"))
    run(capsys, "convert", str(tmp_path / "last.pth"), *words)
    assert load(tmp_path / "deim", "cpu").config.activation == "silu"
    words = ("--activation", "relu", "--to", "safetensors", "--out", str(tmp_path / "other"))
    assert "were trained with silu, not relu" in failure(capsys, "convert", str(tmp_path / "deim"), *words)
    assert "activation silu" in run(capsys, "verify", str(tmp_path / "deim"))


def test_what_a_layout_cannot_express_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loaded(SMALL.with_(regression="direct")).save(tmp_path / "own")
    words = ("convert", str(tmp_path / "own"), "--to", "huggingface", "--out", str(tmp_path / "made"))
    assert "cannot express regression='direct'" in failure(capsys, *words)
    assert not (tmp_path / "made").exists()
    words = ("convert", str(tmp_path / "own"), "--to", "released", "--out", str(tmp_path / "made"))
    assert "give a path that ends in .pth" in failure(capsys, *words)
