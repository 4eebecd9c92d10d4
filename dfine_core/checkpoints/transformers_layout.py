"""Layout of D-FINE in Hugging Face Transformers: `config.json` and the names of its tensors, without that library.

    tensors = to_transformers(detector.state_dict())           # as its model.safetensors has them
    weights = from_transformers(tensors)                       # and back, bit for bit
    config = config_from_transformers(json.loads(...), (640, 640), weights)

The names are those of the files, which every version of Transformers writes and opens. `pipeline/export/huggingface.py` writes
folders with the library itself.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from dfine_core.checkpoints.class_transfer import objects365_names
from dfine_core.checkpoints.weights import written_value
from dfine_core.config import LossConfig, ModelConfig
from dfine_core.model.hgnetv2 import SIZES

MODEL_TYPE = "d_fine"
CLASS_ROWS = "decoder.dec_score_head.0.bias"  # one value per class

_LAYER = (("linear1.", "fc1."), ("linear2.", "fc2."), ("norm1.", "self_attn_layer_norm."))
_CSP = (
    ("cv1.", "conv1."),
    ("cv2.0.", "csp_rep1."),
    ("cv2.1.", "conv2."),
    ("cv3.0.", "csp_rep2."),
    ("cv3.1.", "conv3."),
)
# First characters of our keys and of theirs; the first pair that fits renames a key. # is a number.
PREFIXES = (
    ("backbone.stem.", "model.backbone.model.embedder."),
    ("backbone.stages.", "model.backbone.model.encoder.stages."),
    # hybrid encoder
    ("encoder.input_proj.#.conv.", "model.encoder_input_proj.#.0."),
    ("encoder.input_proj.#.norm.", "model.encoder_input_proj.#.1."),
    *(
        (f"encoder.encoder.#.layers.#.{ours}", f"model.encoder.encoder.#.layers.#.{theirs}")
        for ours, theirs in (*_LAYER, ("norm2.", "final_layer_norm."))
    ),
    ("encoder.encoder.", "model.encoder.encoder."),
    *(
        (f"encoder.{way}_blocks.#.{ours}", f"model.encoder.{way}_blocks.#.{theirs}")
        for way in ("fpn", "pan")
        for ours, theirs in (*_CSP, ("cv4.", "conv4."))
    ),
    ("encoder.downsample_convs.#.0.cv1.", "model.encoder.downsample_convs.#.conv1."),
    ("encoder.downsample_convs.#.0.cv2.", "model.encoder.downsample_convs.#.conv2."),
    ("encoder.lateral_convs.", "model.encoder.lateral_convs."),
    # decoder
    ("decoder.input_proj.#.conv.", "model.decoder_input_proj.#.0."),
    ("decoder.input_proj.#.norm.", "model.decoder_input_proj.#.1."),
    ("decoder.enc_output.proj.", "model.enc_output.0."),
    ("decoder.enc_output.norm.", "model.enc_output.1."),
    *((f"decoder.{name}.", f"model.{name}.") for name in ("enc_score_head", "enc_bbox_head", "denoising_class_embed")),
    ("decoder.dec_score_head.", "model.decoder.class_embed."),
    ("decoder.dec_bbox_head.", "model.decoder.bbox_embed."),
    *(
        (f"decoder.{name}", f"model.decoder.{name}")
        for name in ("up", "reg_scale", "query_pos_head.", "pre_bbox_head.")
    ),
    *(
        (f"decoder.decoder.layers.#.{ours}", f"model.decoder.layers.#.{theirs}")
        for ours, theirs in (*_LAYER, ("norm3.", "final_layer_norm."), ("cross_attn.", "encoder_attn."))
    ),
    ("decoder.decoder.", "model.decoder."),
)
IN_BACKBONE = ((".conv.weight", ".convolution.weight"), (".bn.", ".normalization."))
TWICE = ("up", "reg_scale")  # below `decoder` and `decoder.decoder` of ours, once in theirs
# Names of modules in memory, which a plain dump of a state dict has, to those of files.
IN_MEMORY = (
    (r"^(class|bbox)_embed\.", r"model.decoder.\1_embed."),
    (r"^model\.encoder\.aifi\.", "model.encoder.encoder."),
    (r"\.mlp\.layers\.0\.", ".fc1."),
    (r"\.mlp\.layers\.1\.", ".fc2."),
    (r"\.self_attn\.o_proj\.", ".self_attn.out_proj."),
)
PACKED = re.compile(r"(.*\.self_attn)\.in_proj_(weight|bias)")  # query, key and value in one tensor
UNPACKED = re.compile(r"(.*\.self_attn)\.[qkv]_proj\.(weight|bias)")

# Settings that this detector does not have, with the one value that it computes; also Transformers' default.
FIXED: dict[str, Any] = {
    "encoder_layers": 1,
    "encoder_activation_function": "gelu",
    "activation_function": "silu",
    "decoder_activation_function": "relu",
    "normalize_before": False,
    "learn_initial_query": False,
    "layer_norm_eps": 1e-5,
    "batch_norm_eps": 1e-5,
    "eval_idx": -1,
    "layer_scale": 1.0,
    "top_prob_values": 4,
    "lqe_hidden_dim": 64,
    "lqe_layers": 2,
    "decoder_offset_scale": 0.5,
}


def is_transformers(keys: Iterable[str]) -> bool:
    """Whether tensors have the names of Transformers' D-FINE."""
    return any(key.startswith("model.backbone.model.") for key in keys)


def to_transformers(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename a state dict, taken before `deploy()`, as files of Transformers have it."""
    renamed: dict[str, Tensor] = {}
    for key, tensor in state_dict.items():
        name = _renamed(key, ours_first=True)
        if packed := PACKED.fullmatch(name):
            parts = zip("qkv", tensor.chunk(3), strict=True)
            renamed |= {f"{packed[1]}.{letter}_proj.{packed[2]}": part.clone() for letter, part in parts}
        else:
            renamed[name] = tensor
    return renamed


def from_transformers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors of a file of Transformers, or of its model's state dict; unknown names stay as they are."""
    for pattern, replacement in IN_MEMORY:
        tensors = {re.sub(pattern, replacement, name): tensor for name, tensor in tensors.items()}
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        key = _renamed(name, ours_first=False)
        if unpacked := UNPACKED.fullmatch(name):
            names = [f"{unpacked[1]}.{letter}_proj.{unpacked[2]}" for letter in "qkv"]
            if all(part in tensors for part in names):
                parts = [tensors[part] for part in names]
                key, tensor = re.sub(r"[qkv]_proj\.", "in_proj_", key), torch.cat(parts)
        renamed[key] = tensor
    for leaf in TWICE:
        if f"decoder.{leaf}" in renamed:
            renamed[f"decoder.decoder.{leaf}"] = renamed[f"decoder.{leaf}"]
    return renamed


def config_from_transformers(
    content: Mapping[str, Any], input_size: tuple[int, int], weights: Mapping[str, Tensor]
) -> ModelConfig:
    """Translate a `config.json`.

    The positional table is "grid", which Transformers has for any input; on square ones it is the released table. The number of
    classes, `up` and `reg_scale` are those of the weights, whatever a configuration claims.

    Args:
        input_size: (height, width), which the configuration does not contain; the image processor's.
        weights: under our keys.

    Raises:
        ValueError: it is of another model, or has settings that this detector does not have.
    """
    if (kind := content.get("model_type")) != MODEL_TYPE:
        raise ValueError(f"model_type is {kind!r}, expected {MODEL_TYPE!r}: another model")
    problems = [
        f"{key} is {content[key]!r}, this detector has {value!r}"
        for key, value in FIXED.items()
        if content.get(key, value) != value
    ]
    if problems:
        raise ValueError("; ".join(problems))
    backbone = content.get("backbone_config") or {}
    points = content.get("decoder_n_points", 4)
    levels = content.get("num_feature_levels", 3)
    frozen = content.get("freeze_backbone_batch_norms", True)
    return ModelConfig(
        num_classes=len(weights[CLASS_ROWS]),
        input_size=input_size,
        backbone=_backbone_name(backbone),
        learnable_affine=backbone.get("use_learnable_affine_block", False),
        backbone_stages=tuple(int(name.removeprefix("stage")) - 1 for name in backbone["out_features"]),
        freeze_at=0 if frozen else -1,  # the published detectors freeze the stem where they freeze norms
        freeze_norm=frozen,
        encoder_dim=content.get("encoder_hidden_dim", 256),
        encoder_ffn_dim=content.get("encoder_ffn_dim", 1024),
        encoder_heads=content.get("encoder_attention_heads", 8),
        expansion=content.get("hidden_expansion", 1.0),
        depth=content.get("depth_mult", 1.0),
        positional_temperature=float(content.get("positional_encoding_temperature", 10000)),
        positional_table="grid",
        decoder_dim=content.get("d_model", 256),
        decoder_ffn_dim=content.get("decoder_ffn_dim", 1024),
        decoder_heads=content.get("decoder_attention_heads", 8),
        num_layers=content.get("decoder_layers", 6),
        num_points=tuple(points) if isinstance(points, list) else (points,) * levels,
        num_queries=content.get("num_queries", 300),
        sampling=content.get("decoder_method", "default"),
        reg_max=content.get("max_num_bins", 32),
        reg_scale=written_value(weights["decoder.reg_scale"]),
        up=written_value(weights["decoder.up"]),
        num_denoising=content.get("num_denoising", 100),
        label_noise_ratio=content.get("label_noise_ratio", 0.5),
        box_noise_scale=content.get("box_noise_scale", 1.0),
        loss=_loss(content),
    )


def labels_from_transformers(content: Mapping[str, Any], num_classes: int) -> list[str] | None:
    """Class names by label; None if the configuration has only placeholders.

    Also None for the 366 rows of Objects365: a row is a category id there, while some label files number from 0 and
    others from 1.

    Raises:
        ValueError: the labels are not those of this number of classes.
    """
    names = {int(label): str(name) for label, name in (content.get("id2label") or {}).items()}
    objects365 = objects365_names()
    if num_classes == len(objects365) and len(set(names.values()) & set(objects365)) > len(objects365) // 2:
        return None
    if sorted(names) != list(range(num_classes)):
        raise ValueError(
            f"id2label has {len(names)} labels ({sorted(names)[:3]} …) for {num_classes} classes in the weights"
        )
    return (
        None
        if all(name == f"LABEL_{label}" for label, name in names.items())
        else [names[i] for i in range(num_classes)]
    )


def input_size_of_processor(content: Mapping[str, Any], otherwise: tuple[int, int]) -> tuple[int, int]:
    """Input size (height, width) in a `preprocessor_config.json`.

    Raises:
        ValueError: it prepares images otherwise than by stretching them and scaling pixels to 0..1.
    """
    others = [key for key in ("do_normalize", "do_pad") if content.get(key)]
    size = content.get("size") or {}
    if others or not (size.keys() <= {"height", "width"}):
        raise ValueError(
            f"the image processor has {', '.join(others) or f'size {size}'}: this detector takes images stretched to height"
            " and width, with pixels in 0..1"
        )
    return (int(size["height"]), int(size["width"])) if size else otherwise


def _backbone_name(content: Mapping[str, Any]) -> Any:
    for name, size in SIZES.items():
        sizes = {
            "stem_channels": [3, *size.stem],
            "stage_in_channels": [stage.in_channels for stage in size.stages],
            "stage_mid_channels": [stage.mid_channels for stage in size.stages],
            "stage_out_channels": [stage.out_channels for stage in size.stages],
            "stage_num_blocks": [stage.blocks for stage in size.stages],
            "stage_numb_of_layers": [size.layers] * len(size.stages),
        }
        if all(content.get(key) == value for key, value in sizes.items()):
            return name
    raise ValueError(f"backbone_config is none of HGNetv2 {', '.join(SIZES)}")


def _loss(content: Mapping[str, Any]) -> LossConfig:
    theirs = {
        **{term: f"weight_loss_{term}" for term in ("vfl", "bbox", "giou", "fgl", "ddf")},
        **{"vfl_alpha": "focal_loss_alpha", "vfl_gamma": "focal_loss_gamma"},
        **{"match_class": "matcher_class_cost", "match_bbox": "matcher_bbox_cost", "match_giou": "matcher_giou_cost"},
        **{"match_alpha": "matcher_alpha", "match_gamma": "matcher_gamma"},
    }
    return LossConfig(**{ours: content[key] for ours, key in theirs.items() if key in content})


def _pattern(prefix: str) -> re.Pattern[str]:
    return re.compile(re.escape(prefix).replace(r"\#", r"(\d+)"))


def _replacement(prefix: str) -> str:
    parts = prefix.split("#")
    return "".join(f"{part}\\g<{number}>" for number, part in enumerate(parts[:-1], start=1)) + parts[-1]


_TO_THEIRS = tuple((_pattern(ours), _replacement(theirs)) for ours, theirs in PREFIXES)
_TO_OURS = tuple((_pattern(theirs), _replacement(ours)) for ours, theirs in PREFIXES)


def _renamed(key: str, *, ours_first: bool) -> str:
    for pattern, replacement in _TO_THEIRS if ours_first else _TO_OURS:
        if match := pattern.match(key):
            renamed = match.expand(replacement) + key[match.end() :]
            break
    else:
        return key
    if "backbone." in renamed:
        for ours, theirs in IN_BACKBONE:
            renamed = renamed.replace(ours, theirs) if ours_first else renamed.replace(theirs, ours)
    return renamed
