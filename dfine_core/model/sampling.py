"""Fused deformable sampling: all levels, heads and points in one launch, in both directions, where Triton and a GPU are there.

The operator replaces the plain path of `attention`, launch by launch grid sampling, and equals it up to rounding. It reads tokens
as the encoder leaves them, in any precision, and computes in float32; locations are not rounded to the tokens' precision.
Kernels are in `sampling_triton.py`, which is imported at the first call.

Gradients of tokens are sums of many contributions, in an order that a GPU does not fix. Under
`torch.use_deterministic_algorithms(True)` they are added as whole numbers, whose sum has no order: equal to the bit in every run.
PyTorch's own grid sampling has no deterministic gradient on a GPU.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dfine_core import fused_kernels

MAX_LEVELS = 4  # that the kernels have arguments for


def usable(tokens: Tensor, levels: int) -> bool:
    """Whether tokens of so many levels are sampled by the fused operator."""
    return fused_kernels.usable(tokens) and levels <= MAX_LEVELS


@torch.library.custom_op("dfine::deformable_sampling", mutates_args=())
def deformable_sampling(
    tokens: Tensor, locations: Tensor, weights: Tensor, shapes: Sequence[int], points: Sequence[int]
) -> Tensor:
    """Add up bilinear samples with their weights; outside of a map there are zeros.

    Args:
        tokens: [B, T, D] of all levels, row-major and end to end; each head has its own D / heads channels.
        locations: [B, Q, heads, P, 2] x and y in [0, 1] of a map, float32; the points of the first level come first.
        weights: [B, Q, heads, P].
        shapes: height and width of every level, flat.
        points: number of points in every level, adding up to P.

    Returns:
        [B, Q, D] in the wider precision of tokens and weights.
    """
    from dfine_core.model import sampling_triton

    return sampling_triton.forward(tokens, locations, weights, shapes, points)


@deformable_sampling.register_fake
def _(tokens: Tensor, _locations: Tensor, weights: Tensor, *_: Sequence[int]) -> Tensor:
    batch, queries = weights.shape[:2]
    dtype = torch.promote_types(tokens.dtype, weights.dtype)
    return tokens.new_empty(batch, queries, tokens.shape[-1], dtype=dtype)


@torch.library.custom_op("dfine::deformable_sampling_backward", mutates_args=())
def deformable_sampling_backward(
    gradient: Tensor, tokens: Tensor, locations: Tensor, weights: Tensor, shapes: Sequence[int], points: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of tokens, locations and weights from that of the output."""
    from dfine_core.model import sampling_triton

    return sampling_triton.backward(gradient, tokens, locations, weights, shapes, points)


@deformable_sampling_backward.register_fake
def _(
    _gradient: Tensor, tokens: Tensor, locations: Tensor, weights: Tensor, *_: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(tokens), torch.empty_like(locations), torch.empty_like(weights)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001  # called by name
    *tensors, ctx.shapes, ctx.points = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    found = deformable_sampling_backward(gradient.contiguous(), *ctx.saved_tensors, ctx.shapes, ctx.points)
    return *found, None, None


deformable_sampling.register_autograd(_gradients, setup_context=_keep)
