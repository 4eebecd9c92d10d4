"""Optimisation: parameter groups by module type, AdamW over them, and the learning rate as a function of the step."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from dfine_core.config import OptimizerConfig
from dfine_core.model.hgnetv2 import LearnableAffine
from dfine_core.parts import DEPTH, part_of

NORMS = (nn.BatchNorm2d, nn.LayerNorm)


def parameter_groups(detector: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Sort the trainable parameters into named groups for torch.optim: each into exactly one, empty groups left out.

    With a `layer_decay` below 1 each group is split by parts of the detector, the decoder first; "part" names them.
    """
    # DEIM's s and m train the backbone's norms at the full rate, without decay.
    groups: dict[str, dict[str, Any]] = {
        "backbone": {"lr": config.backbone_lr, "weight_decay": config.weight_decay},
        "backbone_no_decay": {"lr": config.backbone_lr, "weight_decay": 0.0},
        "no_decay": {"lr": config.lr, "weight_decay": 0.0},
        "rest": {"lr": config.lr, "weight_decay": config.weight_decay},
    }
    members: dict[tuple[str, str], list[nn.Parameter]] = {}
    split = config.layer_decay != 1
    for module, name, parameter in _trainable(detector):
        key = _group_of(module, name, config), part_of(name) if split else ""
        members.setdefault(key, []).append(parameter)
    return [
        {"name": name, "params": members[name, part], **settings, **_settings_of(part, settings["lr"], config)}
        for name, settings in groups.items()
        for part in (DEPTH if split else ("",))
        if (name, part) in members
    ]


def _settings_of(part: str, lr: float, config: OptimizerConfig) -> dict[str, Any]:
    return {"part": part, "lr": lr * config.layer_decay ** DEPTH[part]} if part else {}


def _group_of(module: nn.Module, name: str, config: OptimizerConfig) -> str:
    is_norm = isinstance(module, NORMS)
    is_bias = name.rsplit(".", 1)[-1].endswith("bias")
    if name.startswith("backbone.") and not (is_norm and config.param_groups == "deim"):
        undecayed = config.param_groups == "fixed" and (is_norm or isinstance(module, LearnableAffine))
        return "backbone_no_decay" if undecayed else "backbone"
    return "no_decay" if is_norm or (is_bias and not config.decay_biases) else "rest"


def _trainable(detector: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    for path, module in detector.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad:
                yield module, f"{path}.{leaf}", parameter


def make_optimizer(detector: nn.Module, config: OptimizerConfig, *, fused: bool = False) -> torch.optim.AdamW:
    """Build AdamW over the named groups; if `fused`, a flag on the device can decide whether a step takes effect."""
    groups = parameter_groups(detector, config)
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=1e-8, fused=fused)


def learning_rate_factor(
    step: int,
    *,
    warmup_steps: int = 500,
    warmup_power: float = 1.0,
    total_steps: int | None = None,
    min_lr_ratio: float = 1.0,
    flat_steps: int = 0,
    clean_steps: int = 0,
) -> float:
    """Factor on every group's learning rate at `step` (from 0).

    A warm-up, (step / `warmup_steps`) ** `warmup_power`, then constant as in D-FINE. With `total_steps` and a `min_lr_ratio`
    below 1 it is constant until `flat_steps`, then a cosine to that ratio, which it keeps in the last `clean_steps`.

    A linear warm-up counts steps from 1, so that no step has a rate of 0 and the last one has the full rate: D-FINE's. Every
    other one counts from 0: DEIM's, whose loop uses each rate one step late and so begins with rates 0.002 and 0 of the base
    rate. That delay is not repeated, and the first step has the rate of the second.
    """
    if step < warmup_steps:
        count = step + 1 if warmup_power == 1 else max(step, 1)
        return float((count / warmup_steps) ** warmup_power)
    start = max(flat_steps, warmup_steps)
    if total_steps is None or min_lr_ratio == 1.0 or step <= start:
        return 1.0
    progress = min(1.0, (step - start) / max(1, total_steps - clean_steps - start))
    return min_lr_ratio + (1 - min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress))
