"""Small blocks shared by several parts of the network. Attribute names follow the released state dict."""

import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import fuse_conv_bn_eval

from dfine_core.model.products import Conv2d, Linear, linear

T = TypeVar("T")
MAX_TABLES = 32  # more sizes than multi-scale training has
ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "silu": F.silu}


class BatchNorm2d(nn.BatchNorm2d):
    """Batch norm that does not count its batches: one launch less.

    The counter matters to averages over all batches alone; it stays because released state dicts have it, and the training step
    advances those of all norms at once.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalise a map [B, C, H, W]."""
        momentum = cast(float, self.momentum)
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.training, momentum, self.eps
        )


class ConvNorm(nn.Module):
    """Bias-free convolution, batch norm, optional SiLU."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int, stride: int = 1, *, groups: int = 1, silu: bool = False
    ):
        super().__init__()
        self.conv = Conv2d(in_channels, out_channels, kernel, stride, (kernel - 1) // 2, groups=groups, bias=False)
        self.norm = BatchNorm2d(out_channels)
        self.silu = silu

    def forward(self, x: Tensor) -> Tensor:
        """Convolve a map [B, C, H, W]."""
        x = self.conv_bn_fused(x) if hasattr(self, "conv_bn_fused") else self.norm(self.conv(x))
        return F.silu(x) if self.silu else x

    def fuse(self) -> None:
        """Replace convolution and norm by one convolution, in place; in eval mode only."""
        if not hasattr(self, "conv_bn_fused"):
            self.conv_bn_fused = fuse_conv_bn_eval(self.conv, self.norm)
            del self.conv, self.norm


class FrozenBatchNorm2d(nn.Module):
    """Batch norm whose four vectors are constants, for backbones trained at small batch sizes; one launch, in the dtype of x."""

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.register_buffer("weight", torch.ones(channels))
        self.register_buffer("bias", torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise a map [B, C, H, W]."""
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: object) -> None:
        state_dict.pop(prefix + "num_batches_tracked", None)  # backbone files come from ordinary batch norms
        super()._load_from_state_dict(state_dict, prefix, *args)


class MLP(nn.Module):
    """Linear layers with an activation between them."""

    def __init__(self, dims: Iterable[int], activation: str = "relu"):
        super().__init__()
        self.activation = activation
        self.layers = nn.ModuleList(Linear(a, b) for a, b in pairwise(dims))

    def forward(self, x: Tensor) -> Tensor:
        """Transform the last dimension."""
        for layer in self.layers[:-1]:
            x = ACTIVATIONS[self.activation](layer(x))
        return self.layers[-1](x)

    def zero_last(self) -> None:
        """Initialise the output to the constant 0, so that the head changes nothing before training."""
        last = cast(nn.Linear, self.layers[-1])
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)


class SelfAttention(nn.Module):
    """Multi-head self-attention whose queries and keys carry a position and whose values do not."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = Linear(dim, dim)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x: Tensor, position: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend among tokens [B, T, D]; position may broadcast; mask: [T, T] from `additive_mask`."""
        dim = x.shape[-1]
        query_key = linear(x + position, self.in_proj_weight[: 2 * dim], self.in_proj_bias[: 2 * dim])
        query, key = query_key.chunk(2, dim=-1)
        value = linear(x, self.in_proj_weight[2 * dim :], self.in_proj_bias[2 * dim :])
        query, key, value = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (query, key, value))
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.out_proj(attended.transpose(1, 2).flatten(-2))


def additive_mask(allowed: Tensor, x: Tensor) -> Tensor:
    """Mask [T, T] to add to attention logits, 0 where `allowed` and else -inf, in the precision in which tokens x attend."""
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    return torch.zeros(allowed.shape, dtype=dtype, device=x.device).masked_fill_(~allowed, -math.inf)


def side_by_side(linears: Sequence[nn.Linear], x: Tensor) -> Tensor:
    """Apply a linear layer of its own to each of L inputs at once, [L, R, D] to [L, R, E]: as many launches as for one."""
    if len(linears) == 1:
        return linears[0](x)
    weights = torch.stack([linear.weight for linear in linears])
    biases = torch.stack([linear.bias for linear in linears])
    return torch.baddbmm(biases.unsqueeze(1), x, weights.transpose(1, 2))


def mlps_side_by_side(mlps: Sequence[MLP], x: Tensor) -> Tensor:
    """Apply an MLP of its own to each of L inputs at once, [L, R, D] to [L, R, E]."""
    *inner, last = zip(*(cast(Iterable[nn.Linear], mlp.layers) for mlp in mlps), strict=True)
    for linears in inner:
        x = ACTIVATIONS[mlps[0].activation](side_by_side(linears, x))
    return side_by_side(last, x)


class TableCache:
    """Tensors that follow from map sizes alone, kept for the sizes that were seen: they are many small launches to make.

    Nothing is kept while a graph is captured or exported, whose sizes are symbols.
    """

    def __init__(self) -> None:
        self._tables: dict[Hashable, Any] = {}

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """Return what `make` has returned for this key."""
        if torch.compiler.is_compiling():
            return make()
        if key not in self._tables:
            if len(self._tables) >= MAX_TABLES:
                self._tables.clear()
            with torch.inference_mode(False), torch.no_grad():  # a table made for inference could not be trained with
                self._tables[key] = make()
        return cast(T, self._tables[key])

    def __deepcopy__(self, memo: dict[int, Any]) -> "TableCache":
        return TableCache()

    def __reduce__(self) -> tuple[type["TableCache"], tuple[()]]:
        return TableCache, ()


def bias_for_prior(probability: float = 0.01) -> float:
    """Bias of a score head so that every class starts at this probability."""
    return -math.log((1 - probability) / probability)
