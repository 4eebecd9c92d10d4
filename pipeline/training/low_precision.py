"""Weights in the precision of autocast, cast once a step: one launch for each part of the network instead of one a tensor.

Autocast casts every weight where it is used, and its gradient on the way back: 500 to 1,000 launches a step. Here a part's
weights are cast together before it runs, so autocast finds nothing left to do; values and gradients are equal to the bit.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dfine_core import Detector, DetectorOutput
from dfine_core.model.hgnetv2 import LearnableAffine
from dfine_core.model.layers import SelfAttention

# Modules whose weights autocast, or their own code, casts to the dtype of their input; norms and embeddings stay in float32.
CAST_MODULES = (nn.Conv2d, nn.Linear, SelfAttention, LearnableAffine)

Slot = tuple[nn.Module, str]  # module and name of one of its parameters


class CastDetector(nn.Module):
    """A detector that runs on casts of its weights; gradients arrive at the weights themselves.

    Weights are cast in groups, so that DistributedDataParallel can exchange the gradients of one part while those of another are
    still being computed.

    Args:
        in_place: keep the memory of the casts, since a replayed graph reads the weights of its modules where they were
            recorded. A step then has to end its backward pass before the next forward pass.
    """

    def __init__(self, detector: Detector, dtype: torch.dtype, *, in_place: bool = False):
        super().__init__()
        self.detector = detector
        self.dtype = dtype
        self.groups = [slots for part in _parts(detector) if (slots := _slots(part))]
        self._casts = [
            [torch.empty_like(_weight(slot), dtype=dtype) for slot in slots] if in_place else None
            for slots in self.groups
        ]

    def forward(self, *args: Any, **kwargs: Any) -> DetectorOutput:
        """Call the detector; arguments as its own."""
        groups = [[module._parameters[name] for module, name in slots] for slots in self.groups]
        try:
            # As torch.func.functional_call does, which takes milliseconds to find the places of 400 weights.
            for slots, weights, casts in zip(self.groups, groups, self._casts, strict=True):
                _put(slots, _Cast.apply(self.dtype, casts, *weights))
            output: DetectorOutput = self.detector(*args, **kwargs)
        finally:
            for slots, weights in zip(self.groups, groups, strict=True):
                _put(slots, weights)
        return output


def _parts(detector: Detector) -> list[nn.Module]:
    """Parts whose weights are cast together."""
    return [detector.backbone.stem, *detector.backbone.stages, detector.encoder, detector.decoder]


def _slots(part: nn.Module) -> list[Slot]:
    return [
        (module, name)
        for module in part.modules()
        if isinstance(module, CAST_MODULES)
        for name, parameter in module._parameters.items()
        if parameter is not None
    ]


def _weight(slot: Slot) -> Tensor:
    module, name = slot
    return module.get_parameter(name).detach()


def _put(slots: Sequence[Slot], tensors: Sequence[Tensor | None]) -> None:
    for (module, name), tensor in zip(slots, tensors, strict=True):
        module._parameters[name] = tensor  # type: ignore[assignment]  # a cast is no nn.Parameter


class _Cast(torch.autograd.Function):
    """Casts of tensors, in the memory of others if given; gradients are cast back."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, into: Sequence[Tensor] | None, *tensors: Tensor) -> tuple[Tensor, ...]:
        casts = [t.detach() for t in into] if into is not None else [torch.empty_like(t, dtype=dtype) for t in tensors]
        torch._foreach_copy_(casts, tensors)
        # Else gradients of frozen weights would be computed.
        ctx.mark_non_differentiable(*(c for c, t in zip(casts, tensors, strict=True) if not t.requires_grad))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        return tuple(casts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        wide = [
            None if gradient is None else torch.empty_like(tensor)
            for tensor, gradient in zip(ctx.saved_tensors, gradients, strict=True)
        ]
        found = [(w, g) for w, g in zip(wide, gradients, strict=True) if w is not None and g is not None]
        if found:
            into, gradients_found = zip(*found, strict=True)
            torch._foreach_copy_(into, gradients_found)
        return None, None, *wide
