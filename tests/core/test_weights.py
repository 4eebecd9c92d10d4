"""Weight files: those that are read, those that are refused with the reason, and the written layout."""

import math
import os
import pickle
from pathlib import Path
from typing import IO, Any

import pytest
import torch
from torch import Tensor

from dfine_core import Detector, ModelConfig
from dfine_core.checkpoints.weights import CONSTANT_LEAVES, load_weights, read_checkpoint, save_released, written_value
from tests.support.recorded import keys_and_shapes

SMALL = ModelConfig.variant("n", num_classes=3, input_size=(256, 256), num_queries=50)


@pytest.fixture(scope="module")
def detector() -> Detector:
    torch.manual_seed(0)
    return Detector(SMALL)


@pytest.fixture
def state_dict(detector: Detector) -> dict[str, Tensor]:
    return dict(detector.state_dict())


def saved(content: Any, path: Path) -> Path:
    torch.save(content, path)
    return path


# Reading


def test_averaged_weights_come_before_raw_ones(tmp_path: Path) -> None:
    raw, averaged = {"w": torch.zeros(1)}, {"w": torch.ones(1)}
    training = {
        "date": "2025-01-01",
        "last_epoch": 3,
        "model": raw,
        "ema": {"module": averaged, "updates": 9},
        "optimizer": {},
    }
    assert read_checkpoint(saved(training, tmp_path / "last.pth"))["w"] == 1
    assert read_checkpoint(saved({"model": raw}, tmp_path / "released.pth"))["w"] == 0
    assert read_checkpoint(saved({"model": raw, "ema": None}, tmp_path / "no_ema.pth"))["w"] == 0
    assert read_checkpoint(saved(averaged, tmp_path / "bare.pth"))["w"] == 1


def test_the_prefix_of_distributed_training_is_dropped(tmp_path: Path) -> None:
    path = saved({"model": {"module.decoder.up": torch.ones(1)}}, tmp_path / "ddp.pth")
    assert list(read_checkpoint(path)) == ["decoder.up"]


class RunsCode:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_a_file_that_needs_code_is_refused_and_its_code_not_run(tmp_path: Path) -> None:
    trap = tmp_path / "sprung"
    path = saved({"model": {"w": torch.ones(1)}, "note": RunsCode(trap)}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match=r"evil.pth is not a file of plain tensors: it needs .*mkdir") as caught:
        read_checkpoint(path)
    assert "weights_only" not in str(caught.value)  # torch's advice is to run it
    (tmp_path / "evil.pkl").write_bytes(pickle.dumps(RunsCode(trap)))
    with pytest.raises(ValueError, match=r"evil.pkl"):
        read_checkpoint(tmp_path / "evil.pkl")
    assert not trap.exists()


@pytest.mark.parametrize("kind", ["cut short", "text", "empty"])
def test_a_damaged_file_is_named(kind: str, tmp_path: Path) -> None:
    path = saved({"model": {"w": torch.ones(1000)}}, tmp_path / "damaged.pth")
    whole = path.read_bytes()
    path.write_bytes({"cut short": whole[: len(whole) // 2], "text": b"hello world", "empty": b""}[kind])
    with pytest.raises(ValueError, match=r"damaged.pth cannot be read as a checkpoint"):
        read_checkpoint(path)


def test_a_missing_file_is_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere.pth"):
        read_checkpoint(tmp_path / "nowhere.pth")


@pytest.mark.parametrize("content", [{"date": "today", "epoch": 3}, [torch.ones(1)], {}, {"model": {}}], ids=str)
def test_a_file_without_weights_is_refused_with_its_content(content: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no weights: expected ema.module, model or a bare state dict, found"):
        read_checkpoint(saved(content, tmp_path / "x.pth"))


# Loading


def test_derived_keys_of_any_size_and_integer_scales_are_taken(
    detector: Detector, state_dict: dict[str, Tensor]
) -> None:
    """Released files hold anchors for 640 x 640, and reg_scale as an integer."""
    state_dict["decoder.anchors"] = torch.full((1, 2000, 4), math.inf)
    state_dict["decoder.valid_mask"] = torch.zeros(1, 2000, 1, dtype=torch.bool)
    state_dict["decoder.reg_scale"] = state_dict["decoder.decoder.reg_scale"] = torch.tensor([4])
    model = Detector(SMALL)
    load_weights(model, state_dict)
    loaded = model.state_dict()
    assert all(torch.equal(tensor, loaded[key]) for key, tensor in detector.state_dict().items())


def test_batch_counters_fit_a_frozen_backbone_and_no_other_key_does() -> None:
    frozen = Detector(ModelConfig.variant("l", input_size=(160, 160)))
    backbone_file = dict(frozen.backbone.state_dict())
    for key in list(backbone_file):
        if key.endswith("running_mean"):
            backbone_file[key.replace("running_mean", "num_batches_tracked")] = torch.tensor(7)
    load_weights(frozen.backbone, backbone_file)
    backbone_file["stem.num_batches_tracked"] = torch.tensor(7)
    with pytest.raises(ValueError, match=r"1 not in the model: stem.num_batches_tracked"):
        load_weights(frozen.backbone, backbone_file)


def test_a_backbone_file_is_sent_to_the_backbone(detector: Detector) -> None:
    with pytest.raises(ValueError, match=r"It is a backbone file: load it into detector.backbone"):
        load_weights(detector, detector.backbone.state_dict())


def test_a_misfit_names_keys_of_both_sides_and_changes_nothing(state_dict: dict[str, Tensor]) -> None:
    model = Detector(SMALL)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    for leaf in ("weight", "bias"):
        del state_dict[f"decoder.enc_output.proj.{leaf}"]
    state_dict |= {f"teacher.{i}": torch.ones(1) for i in range(8)}
    with pytest.raises(ValueError, match="does not fit") as caught:
        load_weights(model, state_dict)
    message = str(caught.value)
    assert "2 missing from the checkpoint: decoder.enc_output.proj.weight; decoder.enc_output.proj.bias\n" in message
    assert "8 not in the model: teacher.0; teacher.1; teacher.2; teacher.3; teacher.4, and 3 more" in message
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_other_classes_are_sent_to_class_transfer(detector: Detector) -> None:
    other = Detector(SMALL.with_(num_classes=5)).state_dict()
    with pytest.raises(
        ValueError, match=r"It has 5 classes, the model 3: .* dfine_core.checkpoints.class_transfer"
    ) as caught:
        load_weights(detector, other)
    assert "decoder.enc_score_head.bias: (5,), the model has (3,)" in str(caught.value)


def test_another_number_of_bins_is_sent_to_rebinning(detector: Detector) -> None:
    other = Detector(SMALL.with_(reg_max=16)).state_dict()
    with pytest.raises(
        ValueError, match=r"\(reg_max 16, the model 32\): convert them with dfine_core.checkpoints.rebinning"
    ):
        load_weights(detector, other)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_constants_that_a_file_rounds_are_still_the_same(dtype: torch.dtype, detector: Detector) -> None:
    state = detector.state_dict()
    constants = [key for key in state if key.endswith("num_points_scale")]
    assert any((state[key].half().float() != state[key]).any() for key in constants)
    other = Detector(SMALL)
    load_weights(other, {key: value.to(dtype) if value.is_floating_point() else value for key, value in state.items()})
    for key in constants:
        assert torch.equal(other.state_dict()[key], state[key])  # the exact value, not the rounded one
    changed = {key: value.half() * 1.01 if key in constants else value for key, value in state.items()}
    with pytest.raises(ValueError, match="of another value"):
        load_weights(other, changed)


@pytest.mark.parametrize("setting", [{"reg_scale": 8.0}, {"up": 0.25}], ids=str)
def test_other_bins_of_the_same_number_are_noticed(setting: dict[str, float], detector: Detector) -> None:
    """All shapes fit, and every box would be wrong."""
    other = Detector(SMALL.with_(**setting)).state_dict()
    with pytest.raises(ValueError, match=r"other bins \(reg_scale or up\)") as caught:
        load_weights(detector, other)
    (name,) = setting
    assert f"2 of another value: decoder.{name}: [{setting[name]}], the model has" in str(caught.value)


def averaged(constants: Tensor, updates: int) -> Tensor:
    """Constants after the released code's moving average of the whole state dict, in single precision."""
    average = constants.clone()
    for update in range(1, updates + 1):
        decay = 0.9999 * (1 - math.exp(-update / 1000))
        average.mul_(decay).add_(constants, alpha=1 - decay)
    return average


def constants_of(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    found = {key: value for key, value in state_dict.items() if key.rsplit(".", 1)[-1] in CONSTANT_LEAVES}
    assert len(found) == 7  # three layers; up and reg_scale under two names each
    return found


def test_constants_that_averaging_has_moved_get_their_exact_values_back(
    detector: Detector, state_dict: dict[str, Tensor]
) -> None:
    constants = constants_of(state_dict)
    moved = {key: averaged(value, 20_000) for key, value in constants.items()}
    off = [key for key, value in moved.items() if not torch.equal(value, constants[key])]
    assert off, "averaging moves nothing"
    model = Detector(SMALL)
    note = load_weights(model, state_dict | moved)
    assert note is not None
    assert note.startswith(f"{len(off)} constants were off by at most")
    loaded = model.state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in constants.items())
    assert load_weights(model, state_dict) is None


@pytest.mark.parametrize("precision", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_files_are_taken_with_exact_constants(
    precision: torch.dtype, detector: Detector, state_dict: dict[str, Tensor]
) -> None:
    halved = {key: tensor.to(precision) if tensor.is_floating_point() else tensor for key, tensor in state_dict.items()}
    model = Detector(SMALL)
    assert load_weights(model, halved)
    loaded = model.state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in constants_of(state_dict).items())
    key = "decoder.enc_output.proj.weight"
    torch.testing.assert_close(loaded[key], state_dict[key], rtol=torch.finfo(precision).eps, atol=1e-6)


def test_constants_beyond_the_tolerance_are_another_configuration(state_dict: dict[str, Tensor]) -> None:
    key = "decoder.decoder.layers.1.cross_attn.num_points_scale"
    state_dict[key] = state_dict[key] * 1.002
    with pytest.raises(ValueError, match=f"1 of another value: {key}"):
        load_weights(Detector(SMALL), state_dict)


def test_a_drifted_constant_is_read_as_it_was_written() -> None:
    assert written_value(torch.tensor([0.49993])) == 0.5
    assert written_value(torch.tensor([8.0], dtype=torch.bfloat16)) == 8
    assert written_value(torch.tensor([0.4], dtype=torch.bfloat16)) == 0.4
    assert written_value(torch.tensor([4])) == 4
    assert written_value(torch.tensor([0.125])) == 0.125


@pytest.mark.parametrize("trained_on", [0.0, 0.1])
def test_attention_whose_keys_are_its_values_is_refused_as_what_it_is(
    trained_on: float, state_dict: dict[str, Tensor]
) -> None:
    key = "decoder.decoder.layers.0.self_attn.in_proj_weight"
    query, _, value = state_dict[key].chunk(3)
    noise = trained_on * value.norm() * torch.nn.functional.normalize(torch.ones_like(value).flatten(), dim=0)
    state_dict[key] = torch.cat([query, value + noise.view_as(value), value])
    with pytest.raises(ValueError, match=r"keys are a copy of its values in decoder.decoder.layers.0.*August 2025"):
        load_weights(Detector(SMALL), state_dict)


def test_weights_without_distributions_do_not_pass_for_few_bins(detector: Detector) -> None:
    other = Detector(SMALL.with_(regression="direct")).state_dict()
    with pytest.raises(ValueError, match="One regresses boxes directly"):
        load_weights(detector, other)


def test_deployed_weights_are_recognised(detector: Detector) -> None:
    deployed = Detector(SMALL).deploy().state_dict()
    with pytest.raises(ValueError, match=r"It was saved after deploy\(\)"):
        load_weights(detector, deployed)


def test_broken_weights_are_named(detector: Detector, state_dict: dict[str, Tensor]) -> None:
    broken = state_dict["decoder.enc_output.proj.bias"].clone()
    broken[3] = math.nan
    state_dict["decoder.enc_output.proj.bias"] = broken
    with pytest.raises(ValueError, match=r"1 not finite: decoder.enc_output.proj.bias"):
        load_weights(detector, state_dict)


# Writing


@pytest.mark.parametrize(("variant", "side"), [("n", 320), ("s", 160), ("m", 160), ("l", 160), ("x", 160)])
def test_a_written_file_has_the_released_keys_and_shapes(variant: str, side: int, tmp_path: Path) -> None:
    config = ModelConfig.variant(variant, input_size=(side, side))
    model = Detector(config)
    save_released(model.state_dict(), config, tmp_path / "model.pth")
    content = torch.load(tmp_path / "model.pth", weights_only=True)
    assert list(content) == ["model", "activation"]
    assert {key: list(tensor.shape) for key, tensor in content["model"].items()} == keys_and_shapes(variant)
    load_weights(model, content["model"])


def test_written_anchors_are_those_of_the_input_size(detector: Detector, tmp_path: Path) -> None:
    config = SMALL.with_(input_size=(256, 320))  # strides 16 and 32: maps of 16 x 20 and 8 x 10
    save_released(detector.state_dict(), config, tmp_path / "model.pth")
    weights = read_checkpoint(tmp_path / "model.pth")
    boxes = weights["decoder.anchors"].sigmoid()
    assert boxes.shape == (1, 16 * 20 + 8 * 10, 4)
    torch.testing.assert_close(boxes[0, 3 * 20 + 5], torch.tensor([5.5 / 20, 3.5 / 16, 0.05, 0.05]))
    torch.testing.assert_close(boxes[0, 320 + 2 * 10 + 7], torch.tensor([7.5 / 10, 2.5 / 8, 0.1, 0.1]))
    assert weights["decoder.valid_mask"].all()
    assert weights["decoder.valid_mask"].dtype == torch.bool


def test_half_precision_is_written_as_single(state_dict: dict[str, Tensor], tmp_path: Path) -> None:
    halved = {key: tensor.bfloat16() if tensor.is_floating_point() else tensor for key, tensor in state_dict.items()}
    save_released(halved, SMALL, tmp_path / "model.pth")
    weights = read_checkpoint(tmp_path / "model.pth")
    assert weights["decoder.enc_output.proj.weight"].dtype == torch.float32
    assert weights["encoder.input_proj.0.norm.num_batches_tracked"].dtype == torch.int64


def test_views_do_not_drag_their_storage_into_the_file(state_dict: dict[str, Tensor], tmp_path: Path) -> None:
    save_released(state_dict, SMALL, tmp_path / "plain.pth")
    flat = torch.cat([tensor.flatten().float() for tensor in state_dict.values()])
    state_dict["decoder.enc_output.proj.bias"] = flat[:128]
    save_released(state_dict, SMALL, tmp_path / "view.pth")
    assert (tmp_path / "view.pth").stat().st_size == pytest.approx((tmp_path / "plain.pth").stat().st_size, rel=0.01)


def test_a_failed_write_leaves_the_old_file(
    state_dict: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.pth"
    save_released(state_dict, SMALL, path)
    before = path.read_bytes()

    def disk_full(_: object, file: IO[bytes]) -> None:
        file.write(b"half a file")
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", disk_full)
    with pytest.raises(OSError, match="no space left"):
        save_released(state_dict, SMALL, path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_deployed_weights_are_not_written_as_released(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"before deploy\(\)"):
        save_released(Detector(SMALL).deploy().state_dict(), SMALL, tmp_path / "model.pth")
