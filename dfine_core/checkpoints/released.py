"""Released `.pth` files and bare `.safetensors`: they hold weights alone, and the configuration is read off their shapes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from dfine_core.checkpoints.activation import settle_activation, stated_in_safetensors
from dfine_core.checkpoints.class_transfer import categories_of
from dfine_core.checkpoints.folder import LoadError, StoredDetector, tensors_from_bytes
from dfine_core.checkpoints.transformers_layout import from_transformers, is_transformers
from dfine_core.checkpoints.weights import DIRECT_OUTPUTS, read_checkpoint_content, written_value
from dfine_core.config import VARIANTS, ModelConfig
from dfine_core.model.detector import DERIVED_KEYS


def read_released(path: str, activation: str | None = None) -> StoredDetector:
    """Read variant, classes and bins off the shapes; the names are COCO's or Objects365's if there are as many classes.

    The number of queries is in no shape: it is the published one, or all positions of a smaller input.

    Args:
        activation: of the weights, "relu" or "silu"; None: as recognised, else D-FINE's with a warning.

    Raises:
        LoadError: it cannot be opened, does not hold a published variant, or states another activation.
    """
    try:
        weights, stated = _read(path)
        settled = settle_activation(weights, path, stated, activation)
        config = _config_of(weights, path).with_(activation=settled)
    except FileNotFoundError:
        raise LoadError(f"{path} does not exist on this disk, where a weights file must lie") from None
    except OSError as error:
        raise LoadError(f"{path}: {error.strerror}; a weights file must lie on this disk") from None
    except ValueError as error:
        raise LoadError(f"{error}") from None
    return StoredDetector(config, weights, categories_of(config.num_classes), folder=path, path=path, named=False)


def read_weights(path: str) -> dict[str, Tensor]:
    """Read the weights of a file on this disk, under our keys.

    Raises:
        ValueError: the file is damaged, holds no weights, or would run code.
    """
    return _read(path)[0]


def _read(path: str) -> tuple[dict[str, Tensor], str | None]:
    """Weights of a file, and the activation that it states."""
    if not path.endswith(".safetensors"):
        return read_checkpoint_content(path)
    content = Path(path).read_bytes()
    tensors = tensors_from_bytes(content, path)
    if is_transformers(tensors):
        return from_transformers(tensors), "relu"  # its layout has no other one
    return tensors, stated_in_safetensors(content)


def _config_of(weights: Mapping[str, Tensor], path: str) -> ModelConfig:
    """Published variant with as many decoder layers and as wide an encoder; any other difference fails at loading."""
    try:
        outputs = len(weights["decoder.dec_bbox_head.0.layers.2.bias"])
        width = len(weights["encoder.input_proj.0.conv.weight"])
        settings: dict[str, Any] = {
            "num_classes": len(weights["decoder.denoising_class_embed.weight"]) - 1,
            "up": written_value(weights["decoder.up"]),
            "reg_scale": written_value(weights["decoder.reg_scale"]),
        }
    except KeyError as error:
        raise ValueError(f"{path}: not the weights of a detector, {error} is missing") from None
    settings |= {"regression": "direct"} if outputs == DIRECT_OUTPUTS else {"reg_max": outputs // 4 - 1}
    layers = sum(key.startswith("decoder.dec_bbox_head.") and key.endswith(".layers.2.bias") for key in weights)
    for variant in VARIANTS:
        config = ModelConfig.variant(variant, **settings)
        if (config.num_layers, config.encoder_dim) == (layers, width):
            return _for_anchors(config, weights)
    raise ValueError(
        f"{path}: no published variant ({', '.join(VARIANTS)}) has {layers} decoder layers and an encoder of width {width};"
        " build the detector's ModelConfig yourself and use weights.load_weights, or load a folder"
        " with its detector.json"
    )


def _for_anchors(config: ModelConfig, weights: Mapping[str, Tensor]) -> ModelConfig:
    """Set the input size that stored anchors were made for; neighbours in a row of the finest map are 1 / width apart."""
    if DERIVED_KEYS[0] not in weights:
        return config
    boxes = weights[DERIVED_KEYS[0]][0].float().sigmoid()  # [T, 4]; 1 where an anchor is not usable
    finest = boxes[boxes[:, 2] < 0.075]
    apart = finest[1:, 0] - finest[:-1, 0]
    if len(apart) == 0:
        return config
    columns = round(1 / float(apart[apart > 0].median()))
    width = columns * config.strides[0]
    height = round(len(boxes) / sum(width / stride**2 for stride in config.strides))
    return config.with_(input_size=(height, width), num_queries=min(config.num_queries, len(boxes)))
