"""Linear layers and 1x1 convolutions that run on oneDNN where the products of MKL, PyTorch's usual choice, are slow.

On AMD's CPUs MKL computes with half of the vector width: 105 GFLOP/s a core in float32, where oneDNN reaches 200 to 250.
The choice follows from the CPU alone, never from a measurement, so that equal machines round equally.
"""

import math
from collections.abc import Sequence
from functools import cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

from dfine_core.cpu import made_by_amd

LINEAR = "_linear_pointwise"  # operator that Inductor generates for a linear layer on a CPU


@cache
def mkl_is_slow() -> bool:
    """Whether this CPU has wide vectors that MKL leaves unused."""
    built = torch.backends.mkl.is_available() and hasattr(torch.ops.mkldnn, LINEAR)
    if not built or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    return made_by_amd()


def on_onednn(x: Tensor) -> bool:
    """Whether products of x should be computed by oneDNN; never in a graph, which may run elsewhere."""
    if torch.compiler.is_compiling():
        return False
    return bool(
        x.dtype == torch.float32
        and x.device.type == "cpu"
        and mkl_is_slow()
        and torch.backends.mkldnn.enabled
        and not torch.is_autocast_enabled("cpu")
    )


class Linear(nn.Linear):
    """Linear layer whose products go through `linear`."""

    def forward(self, input: Tensor) -> Tensor:
        """Transform the last dimension."""
        return linear(input, self.weight, self.bias)


class Conv2d(nn.Conv2d):
    """Convolution; a 1x1 one does not fall back to MKL where a single thread computes."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        # PyTorch leaves 1x1 convolutions of few images to MKL in a process with one thread, unless they are dilated, which
        # means nothing for a single point. In other layouts oneDNN would have to reorder the map.
        dilation = self.dilation
        if self.kernel_size == (1, 1) and on_onednn(input) and input.is_contiguous(memory_format=torch.channels_last):
            dilation = (2, 2)
        return F.conv2d(input, weight, bias, self.stride, cast(tuple[int, int], self.padding), dilation, self.groups)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute x @ weight.T + bias: [..., D] to [..., E]."""
    if not on_onednn(x) or not x.numel():
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return cast(Tensor, _Product.apply(x, weight, bias))
    return _product(x, weight, bias)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return cast(Tensor, torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], ""))


class _Product(torch.autograd.Function):
    """Linear layer with all three of its products on oneDNN."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        rows = gradient.reshape(-1, gradient.shape[-1])  # [R, E]
        return (
            _product(gradient, weight.t()) if of_x else None,
            _product(rows.t(), x.reshape(-1, x.shape[-1]).t()) if of_weight else None,
            rows.sum(0) if of_bias else None,
        )


def _operations(x: Sequence[int], weight: Sequence[int], *_: Any, **__: Any) -> int:
    """Operations of a product, from the shapes of its inputs."""
    return 2 * math.prod(x) * weight[0]


if hasattr(torch.ops.mkldnn, LINEAR):
    register_flop_formula(torch.ops.mkldnn._linear_pointwise)(_operations)
