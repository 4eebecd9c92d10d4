"""Backbone files: the released ones, timm's, and files that hold whole blocks of a backbone and not all of them.

weights = backbone_of(read_checkpoint("PPHGNetV2_B0_stage1.pth"))          # None if it is no backbone
random = load_backbone(detector.backbone, weights)                         # names of the blocks that the file lacks
"""

import re
from collections.abc import Mapping

from torch import Tensor

from dfine_core.checkpoints.weights import load_weights
from dfine_core.model.hgnetv2 import HGNetv2

PREFIX = "backbone."
CLASSIFIER = "head."  # timm's files end in one
BLOCK = re.compile(r"stem|stages\.\d+\.downsample|stages\.\d+\.blocks\.\d+")  # what may be missing as a whole
NORM_STATISTICS = "running_mean"


def backbone_of(weights: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """Weights of a backbone under its own keys, without a prefix or classifier; None if they are not a backbone's."""
    if weights and all(key.startswith(PREFIX) for key in weights):
        weights = {key.removeprefix(PREFIX): tensor for key, tensor in weights.items()}
    if not any(BLOCK.match(key) for key in weights):
        return None
    return {key: tensor for key, tensor in weights.items() if not key.startswith(CLASSIFIER)}


def load_backbone(backbone: HGNetv2, weights: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Load a backbone that may lack whole blocks, and return their names; they keep their random weights.

    Raises:
        ValueError: a block is there in part, a key is unknown or of another shape, or a missing block is frozen.
    """
    expected = backbone.state_dict()
    blocks: dict[str, list[str]] = {}
    for key in expected:
        if match := BLOCK.match(key):
            blocks.setdefault(match[0], []).append(key)
    missing = [block for block, keys in blocks.items() if not any(key in weights for key in keys)]
    if len(missing) == len(blocks):
        missing = []  # nothing fits: the ordinary error lists what is there
    if frozen := [block for block in missing if _is_frozen(backbone, block)]:
        raise ValueError(
            f"it lacks {', '.join(frozen)}, which model.freeze_at or model.freeze_norm freezes: it would stay random. Set"
            " freeze_at: -1 and freeze_norm: false, or take a file of the whole backbone"
        )
    kept = {key: expected[key] for block in missing for key in blocks[block]}
    load_weights(backbone, {**weights, **kept})
    return tuple(_whole_stages(missing, blocks))


def _is_frozen(backbone: HGNetv2, block: str) -> bool:
    module = backbone.get_submodule(block)
    trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    norms = {name.replace(NORM_STATISTICS, "weight") for name in module.state_dict() if name.endswith(NORM_STATISTICS)}
    return not trained or not norms <= trained


def _whole_stages(missing: list[str], blocks: Mapping[str, object]) -> list[str]:
    """Names of the blocks, with a stage's name for all of its blocks."""
    names: list[str] = []
    for block in missing:
        stage = block.rpartition(".blocks.")[0] or block.rpartition(".downsample")[0]
        whole = bool(stage) and all(other in missing for other in blocks if other.startswith(f"{stage}."))
        if (name := stage if whole else block) not in names:
            names.append(name)
    return names
