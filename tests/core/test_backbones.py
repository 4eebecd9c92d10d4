"""Backbone files: timm's against its recorded maps, whole ones, and those that lack whole blocks."""

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from dfine_core import Detector, ModelConfig
from dfine_core.checkpoints.backbones import backbone_of, load_backbone
from dfine_core.model.hgnetv2 import HGNetv2
from tests.support import recorded

SMALL = ModelConfig.variant("n", num_classes=3, input_size=(128, 128), num_queries=30)


def backbone_like(config: ModelConfig = SMALL, seed: int = 1) -> HGNetv2:
    backbone = HGNetv2(config)
    recorded.fill(backbone, seed)
    return backbone


def without(weights: dict[str, Tensor], *starts: str) -> dict[str, Tensor]:
    kept = {key: tensor for key, tensor in weights.items() if not key.startswith(starts)}
    assert 0 < len(kept) < len(weights)
    return kept


@pytest.mark.parametrize("size", ["B0", "B4"])
def test_a_file_of_timm_gives_its_recorded_maps(size: str) -> None:
    recording = recorded.load(f"timm_hgnetv2_{size.lower()}")
    case = recording.case
    tensors = {
        key: torch.zeros(shape, dtype=torch.int64 if key.endswith("num_batches_tracked") else torch.float32)
        for key, shape in case["shapes"].items()
    }
    recorded.fill(cast(Any, SimpleNamespace(state_dict=lambda: tensors)), case["seed"])
    assert any(key.startswith("head.") for key in tensors)
    variant = {"B0": "s", "B4": "l"}[size]
    config = ModelConfig.variant(variant, backbone_stages=(0, 1, 2, 3), num_points=(3, 3, 3, 3))
    backbone = HGNetv2(config).eval()
    weights = backbone_of(tensors)
    assert weights is not None
    assert load_backbone(backbone, weights) == ()
    with torch.no_grad():
        maps = backbone(recorded.images(*case["image"]))
    for stage, ours in enumerate(maps):
        theirs = recording.tensor(f"stage_{stage}")
        assert (ours - theirs).abs().max() < 1e-5, stage


@pytest.mark.parametrize("prefix", ["", "backbone."])
def test_a_backbone_is_recognised_with_or_without_its_prefix(prefix: str) -> None:
    source = backbone_like()
    weights = backbone_of({prefix + key: tensor for key, tensor in source.state_dict().items()})
    assert weights is not None
    target = HGNetv2(SMALL)
    assert load_backbone(target, weights) == ()
    assert all(torch.equal(target.state_dict()[key], tensor) for key, tensor in source.state_dict().items())


def test_a_detector_is_no_backbone() -> None:
    assert backbone_of(Detector(SMALL).state_dict()) is None
    assert backbone_of({"decoder.up": torch.ones(1)}) is None
    assert backbone_of({}) is None


def test_missing_blocks_stay_random_and_are_named_and_all_else_is_taken() -> None:
    source = backbone_like().state_dict()
    part = without(source, "stages.2.blocks.1.", "stages.3.", "stages.1.downsample.")
    target = HGNetv2(SMALL)
    before = {key: tensor.clone() for key, tensor in target.state_dict().items()}
    assert load_backbone(target, part) == ("stages.1.downsample", "stages.2.blocks.1", "stages.3")
    for key, tensor in target.state_dict().items():
        assert torch.equal(tensor, part.get(key, before[key])), key


@pytest.mark.parametrize(
    "start", ["stages.2.blocks.1.aggregation.", "stages.3.downsample.conv.", "stem.stem4.lab.scale"]
)
def test_a_block_that_is_there_in_part_is_refused(start: str) -> None:
    part = without(backbone_like().state_dict(), start)
    target = HGNetv2(SMALL)
    before = {key: tensor.clone() for key, tensor in target.state_dict().items()}
    with pytest.raises(ValueError, match=f"missing from the checkpoint: {start}"):
        load_backbone(target, part)
    assert all(torch.equal(tensor, before[key]) for key, tensor in target.state_dict().items())


def test_a_key_that_no_backbone_has_is_refused() -> None:
    weights = without(backbone_like().state_dict(), "stages.3.") | {"stages.7.blocks.0.conv.weight": torch.ones(1)}
    with pytest.raises(ValueError, match=r"1 not in the model: stages.7"):
        load_backbone(HGNetv2(SMALL), weights)


def test_a_file_of_another_backbone_is_refused() -> None:
    with pytest.raises(ValueError, match="of another shape"):
        load_backbone(HGNetv2(SMALL), HGNetv2(ModelConfig.variant("m")).state_dict())


@pytest.mark.parametrize(
    ("settings", "missing"), [({"freeze_at": 0}, "stem"), ({"freeze_norm": True}, "stages.3.blocks.0")]
)
def test_a_missing_block_that_would_be_frozen_is_refused(settings: dict[str, Any], missing: str) -> None:
    part = without(backbone_like().state_dict(), f"{missing}.")
    load_backbone(HGNetv2(SMALL), part)
    with pytest.raises(ValueError, match=f"lacks {missing}, which model.freeze_at or model.freeze_norm freezes"):
        load_backbone(HGNetv2(SMALL.with_(**settings)), part)
