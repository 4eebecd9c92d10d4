"""Parameter groups by module type, and the learning rate as a function of the step."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from dfine_core.hgnetv2 import LearnableAffine

NORMS = (nn.BatchNorm2d, nn.LayerNorm)


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW as released. `released` groups decay the backbone's norms and affine scalars; `fixed` groups do not."""

    lr: float = 2e-4
    backbone_lr: float = 1e-4
    weight_decay: float = 1e-4
    decay_biases: bool = False  # of encoder and decoder; the released l and x decay them
    groups: Literal["released", "fixed"] = "released"
    betas: tuple[float, float] = (0.9, 0.999)

    @classmethod
    def for_variant(cls, name: str, **settings: Any) -> "OptimizerConfig":
        """The COCO recipe of a published variant (n, s, m, l, x)."""
        recipes: dict[str, dict[str, Any]] = {
            "n": {"lr": 8e-4, "backbone_lr": 4e-4},
            "s": {"lr": 2e-4, "backbone_lr": 1e-4},
            "m": {"lr": 2e-4, "backbone_lr": 2e-5},
            "l": {"lr": 2.5e-4, "backbone_lr": 1.25e-5, "weight_decay": 1.25e-4, "decay_biases": True},
            "x": {"lr": 2.5e-4, "backbone_lr": 2.5e-6, "weight_decay": 1.25e-4, "decay_biases": True},
        }
        return cls(**{**recipes[name], **settings})


def parameter_groups(detector: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Trainable parameters as named groups for torch.optim: every parameter in exactly one, empty groups left out."""
    groups: dict[str, dict[str, Any]] = {
        "backbone": {"lr": config.backbone_lr, "weight_decay": config.weight_decay},
        "backbone_no_decay": {"lr": config.backbone_lr, "weight_decay": 0.0},
        "no_decay": {"lr": config.lr, "weight_decay": 0.0},
        "rest": {"lr": config.lr, "weight_decay": config.weight_decay},
    }
    members: dict[str, list[nn.Parameter]] = {name: [] for name in groups}
    for module, name, parameter in _trainable(detector):
        members[_group_of(module, name, config)].append(parameter)
    return [{"name": name, "params": members[name], **settings} for name, settings in groups.items() if members[name]]


def _group_of(module: nn.Module, name: str, config: OptimizerConfig) -> str:
    is_norm = isinstance(module, NORMS)
    is_bias = name.rsplit(".", 1)[-1].endswith("bias")
    if name.startswith("backbone."):
        undecayed = config.groups == "fixed" and (is_norm or isinstance(module, LearnableAffine))
        return "backbone_no_decay" if undecayed else "backbone"
    return "no_decay" if is_norm or (is_bias and not config.decay_biases) else "rest"


def _trainable(detector: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    for path, module in detector.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad:
                yield module, f"{path}.{leaf}", parameter


def make_optimizer(detector: nn.Module, config: OptimizerConfig, *, fused: bool = False) -> torch.optim.AdamW:
    """AdamW over the named groups; fused, a step can be made to depend on a flag on the device."""
    groups = parameter_groups(detector, config)
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=1e-8, fused=fused)


def learning_rate_factor(
    step: int, *, warmup_steps: int = 500, total_steps: int | None = None, final_factor: float = 1.0
) -> float:
    """What every group's learning rate is multiplied by at `step` (from 0).

    Linear warm-up to 1 at step `warmup_steps` - 1, then constant as released; with `total_steps` and a `final_factor` below 1
    a cosine from 1 to it.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if total_steps is None or final_factor == 1.0:
        return 1.0
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return final_factor + (1 - final_factor) * 0.5 * (1 + math.cos(math.pi * progress))
