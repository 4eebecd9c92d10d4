"""Weight files: released files, training checkpoints and backbones are read, the released layout is written.

    state_dict = read_checkpoint("dfine_s_coco.pth")
    load_weights(detector, state_dict)                                        # or raises, with the way out
    load_weights(detector.backbone, read_checkpoint("PPHGNetV2_B0_stage1.pth"))

Weights of other classes pass through `class_transfer`, those of other bins through `rebinning`, before they are loaded.
Constants that averaging or half precision has moved get their exact values back. Nothing here runs code from a file.
"""

import os
import pickle
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dfine_core.checkpoints.activation import STATED, stated_in_pickle
from dfine_core.config import ModelConfig
from dfine_core.model.decoder import anchors
from dfine_core.model.detector import DERIVED_KEYS

# Set by the configuration rather than learnt: equal shapes do not make them fit.
CONSTANT_LEAVES = ("up", "reg_scale", "num_points_scale")
# Relative. The released code averages constants too, and rounding moves them: by 1.5e-4 in 30,000 updates.
CONSTANT_TOLERANCE = 1e-3
SELF_ATTENTION = "self_attn.in_proj_weight"  # query, key and value, one below the other
SAME_PROJECTION = (
    0.5  # largest |key - value| / |key| of one matrix stored twice and trained on; 1.4 if they are independent
)
COUNTER = "num_batches_tracked"
DIRECT_OUTPUTS = 4  # outputs of a box head without distributions
SHOWN = 5  # keys of each kind that an error lists


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read the weights in a file, onto the CPU.

    Takes averaged weights before raw ones: `ema.module`, then `model`, then the file itself if it is a bare state dict.
    A leading `module.` of distributed training is dropped.

    Raises:
        ValueError: if the file is damaged, holds anything but plain data, or holds no weights.
    """
    return read_checkpoint_content(path)[0]


def read_checkpoint_content(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], str | None]:
    """Read as `read_checkpoint` does; also the activation, if the file states it."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except pickle.UnpicklingError as error:
        needed = re.search(r"GLOBAL (\S+)", str(error))
        raise ValueError(
            f"{path} is not a file of plain tensors: it needs {needed[1] if needed else 'code'}, and code out of a"
            " checkpoint is never run here. If you trust it, load it yourself and torch.save its state dict."
        ) from None  # torch's own message advises to run it
    except Exception as error:  # on arbitrary bytes the reader fails in arbitrary ways
        raise ValueError(
            f"{path} cannot be read as a checkpoint; it may be cut short or another kind of file"
        ) from error
    weights = _weights_of(content)
    if weights is None:
        keys = ", ".join(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise ValueError(
            f"{path} holds no weights: expected ema.module, model or a bare state dict, found {keys or 'nothing'}"
        )
    return {key.removeprefix("module."): tensor for key, tensor in weights.items()}, stated_in_pickle(content)


def load_weights(module: nn.Module, state_dict: Mapping[str, Tensor]) -> str | None:
    """Load weights into a detector, or into one of its parts, with every key accounted for.

    Anchors and their mask are ignored, whatever their size; so are batch counters where the model's norm is frozen. Where the
    weights come from a model with frozen norms, counters start at 0.

    Returns:
        One sentence about the constants that got their exact values back; None if all had them.

    Raises:
        ValueError: naming the first keys that are missing, unknown, of another shape or value, not finite; and a way out.
    """
    if reason := known_fault(state_dict):
        raise ValueError(reason)
    expected = module.state_dict()
    given = {
        key: tensor
        for key, tensor in state_dict.items()
        if key not in DERIVED_KEYS and not _counts_frozen(key, expected)
    }
    given |= _counters_of_frozen_norms(given, expected)
    missing = [key for key in expected if key not in given]
    unknown = [key for key in given if key not in expected]
    shared = [key for key in expected if key in given]
    reshaped = [key for key in shared if given[key].shape != expected[key].shape]
    constants = [key for key in shared if key.rsplit(".", 1)[-1] in CONSTANT_LEAVES and key not in reshaped]
    restored, note = restore_constants(given, expected)
    changed = [key for key in constants if not torch.equal(restored[key].to(expected[key]), expected[key])]
    broken = [key for key in shared if not given[key].isfinite().all()]
    problems = [
        _listing("missing from the checkpoint", missing),
        _listing("not in the model", unknown),
        _listing(
            "of another shape", [f"{k}: {_shape(given[k])}, the model has {_shape(expected[k])}" for k in reshaped]
        ),
        _listing(
            "of another value", [f"{k}: {given[k].tolist()}, the model has {expected[k].tolist()}" for k in changed]
        ),
        _listing("not finite", broken),
    ]
    if any(problems):
        lines = ["the checkpoint does not fit the model", *filter(None, problems), *_ways_out(given, expected, changed)]
        raise ValueError("\n  ".join(lines))
    module.load_state_dict(restored)
    return note


def restore_constants(
    state_dict: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], str | None]:
    """Put back the constants that averaging or half precision has moved a little; other values stay as they are.

    Returns:
        The weights, and one sentence about what was put back, if anything was.
    """
    exact: dict[str, Tensor] = {}
    largest = 0.0
    for key, value in expected.items():
        given = state_dict.get(key)
        if key.rsplit(".", 1)[-1] not in CONSTANT_LEAVES or given is None or given.shape != value.shape:
            continue
        drift = float(((given.to(value) - value) / value).abs().max())
        if 0 < drift <= _tolerance(given):
            exact[key], largest = value, max(largest, drift)
    if not exact:
        return dict(state_dict), None
    note = (
        f"{len(exact)} constants were off by at most {largest:.1e} (relative; averaging and half precision do that) and have"
        f" their exact values again: {_some(list(exact))}"
    )
    return {**state_dict, **exact}, note


def written_value(constant: Tensor) -> float:
    """Value of a constant as somebody wrote it into a configuration: 0.5 for 0.49993, if no more than drift is between."""
    value = float(constant)
    short = round(value, 2)
    return short if short and abs(value - short) <= _tolerance(constant) * short else value


def known_fault(state_dict: Mapping[str, Tensor]) -> str | None:
    """Recognise files that are known to be wrong by their tensors; return what is wrong and the way out."""
    doubled = []
    for key, tensor in state_dict.items():
        if key.endswith(SELF_ATTENTION) and tensor.dim() == 2 and len(tensor) % 3 == 0:
            _, keys, values = tensor.float().chunk(3)
            if (keys - values).norm() < SAME_PROJECTION * keys.norm():
                doubled.append(key)
    if not doubled:
        return None
    return (
        f"the attention's keys are a copy of its values in {_some(doubled)}: files of D-FINE-N on the Hugging Face hub were"
        " converted so until August 2025 (transformers issue 40253), and what was fine-tuned from them has it too. The true"
        " weights are not in this file: take the hub's present file (dfine-n-coco), or the released dfine_n_coco.pth"
    )


def save_released(state_dict: Mapping[str, Tensor], config: ModelConfig, path: str | os.PathLike[str]) -> None:
    """Write a detector's weights as a released file: {"model": state dict}, float32, with the anchors of `input_size`.

    Its activation is stated beside them. The file appears whole or not at all.
    """
    if "decoder.up" not in state_dict or any("conv_bn_fused" in key for key in state_dict):
        raise ValueError(
            f"{path}: the released layout holds a whole detector before deploy(); save its state dict from then"
        )
    anchor_logits, valid = anchors(config.level_shapes(*config.input_size), torch.device("cpu"))
    # Cloned, because the file would otherwise hold the whole storage behind every view.
    model = {key: tensor.detach().cpu().clone() for key, tensor in state_dict.items()}
    model = {key: tensor.float() if tensor.is_floating_point() else tensor for key, tensor in model.items()}
    model.update(zip(DERIVED_KEYS, (anchor_logits, valid), strict=True))

    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as stream:  # given a path, torch.save writes its name into the file
            torch.save({"model": model, STATED: config.activation}, stream)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _weights_of(content: Any) -> dict[str, Tensor] | None:
    if not isinstance(content, dict):
        return None
    averaged = content.get("ema")
    candidates = [averaged.get("module") if isinstance(averaged, dict) else None, content.get("model"), content]
    return next((candidate for candidate in candidates if _is_state_dict(candidate)), None)


def _is_state_dict(value: Any) -> bool:
    tensors = isinstance(value, dict) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items())
    return tensors and len(value) > 0


def _counts_frozen(key: str, expected: Mapping[str, Tensor]) -> bool:
    """Whether a key is the batch counter of a norm that is frozen in the model, and so has none."""
    norm, _, leaf = key.rpartition(".")
    return leaf == COUNTER and key not in expected and f"{norm}.running_mean" in expected


def _counters_of_frozen_norms(given: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Batch counters, 0, of norms that were frozen where the weights come from, and so have none."""
    counters = [key for key in expected if key.endswith(f".{COUNTER}") and key not in given]
    frozen = [key for key in counters if f"{key.removesuffix(COUNTER)}running_mean" in given]
    return {key: torch.zeros_like(expected[key]) for key in frozen}


def _ways_out(given: Mapping[str, Tensor], expected: Mapping[str, Tensor], changed: Sequence[str]) -> list[str]:
    ways = []
    classes, expected_classes = (
        _rows(weights, "decoder.denoising_class_embed.weight") for weights in (given, expected)
    )
    if classes and expected_classes and classes != expected_classes:
        ways.append(
            f"It has {classes - 1} classes, the model {expected_classes - 1}: carry them over by name with"
            " dfine_core.checkpoints.class_transfer."
        )
    outputs, expected_outputs = (
        _rows(weights, "decoder.dec_bbox_head.0.layers.2.bias") for weights in (given, expected)
    )
    other_bins = outputs != expected_outputs or not {"decoder.up", "decoder.reg_scale"}.isdisjoint(changed)
    if outputs != expected_outputs and DIRECT_OUTPUTS in (outputs, expected_outputs):
        ways.append(
            "One regresses boxes directly, the other by distributions: build the model with the other regression."
        )
    elif outputs and expected_outputs and other_bins:
        same = outputs == expected_outputs
        what = "reg_scale or up" if same else f"reg_max {outputs // 4 - 1}, the model {expected_outputs // 4 - 1}"
        ways.append(
            f"Its edge distributions have other bins ({what}): convert them with dfine_core.checkpoints.rebinning."
        )
    if any("conv_bn_fused" in key for key in given):
        ways.append("It was saved after deploy(), which cannot be undone: take the weights from before.")
    if any(f"backbone.{key}" in expected for key in given):
        ways.append("It is a backbone file: load it into detector.backbone, or with backbones.load_backbone.")
    return ways


def _tolerance(constant: Tensor) -> float:
    """Relative deviation that still counts as the same constant; a step of its precision, where that is coarser."""
    precision = torch.finfo(constant.dtype).eps if constant.is_floating_point() else 0.0
    return max(CONSTANT_TOLERANCE, precision)


def _rows(state_dict: Mapping[str, Tensor], key: str) -> int:
    return len(state_dict[key]) if key in state_dict else 0


def _listing(what: str, entries: list[str]) -> str:
    return f"{len(entries)} {what}: {_some(entries)}" if entries else ""


def _some(entries: Sequence[str]) -> str:
    more = f", and {len(entries) - SHOWN} more" if len(entries) > SHOWN else ""
    return "; ".join(entries[:SHOWN]) + more


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))
