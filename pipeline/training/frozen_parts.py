"""Frozen parts of a detector: no gradient, no update, and norms that use their running statistics and leave them as they are."""

from collections.abc import Collection

from torch import nn

from dfine_core import Detector
from dfine_core.parts import part_of


def freeze(detector: Detector, parts: Collection[str], trainable: Collection[nn.Parameter]) -> None:
    """Freeze these parts of a detector, and let all others train.

    Args:
        trainable: parameters that train unless their part is frozen; the model's own settings may freeze others for good.
    """
    chosen = {id(parameter) for parameter in trainable}
    for name, parameter in detector.named_parameters():
        frozen = part_of(name) in parts
        parameter.requires_grad_(id(parameter) in chosen and not frozen)
        if frozen:
            parameter.grad = None
    for name, module in detector.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.train(part_of(name) not in parts)


def names_in(detector: Detector, parts: Collection[str]) -> set[str]:
    """Names of all modules and tensors of these parts."""
    named = (*detector.named_modules(), *detector.named_parameters(), *detector.named_buffers())
    return {name for name, _ in named if part_of(name) in parts}
