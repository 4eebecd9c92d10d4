"""Hybrid encoder: self-attention on the coarsest map, then a feature pyramid down and up again.

Attribute names follow the released state dict.
"""

from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import fuse_conv_bn_eval

from dfine_core.config import ModelConfig
from dfine_core.model.layers import ConvNorm, SelfAttention, TableCache
from dfine_core.model.products import Linear


class RepVGGBlock(nn.Module):
    """3x3 plus 1x1 convolution, one activation; one convolution after `fuse`."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = ConvNorm(channels, channels, 3)
        self.conv2 = ConvNorm(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve a map [B, C, H, W]."""
        return F.silu(self.conv(x) if hasattr(self, "conv") else self.conv1(x) + self.conv2(x))

    def fuse(self) -> None:
        """Replace both branches by one 3x3 convolution, in place; in eval mode only."""
        if hasattr(self, "conv"):
            return
        wide = fuse_conv_bn_eval(self.conv1.conv, self.conv1.norm)
        point = fuse_conv_bn_eval(self.conv2.conv, self.conv2.norm)
        with torch.no_grad():
            wide.weight += F.pad(point.weight, (1, 1, 1, 1))
            cast(Tensor, wide.bias).add_(cast(Tensor, point.bias))
        self.conv = wide
        del self.conv1, self.conv2


class CSPLayer(nn.Module):
    """A stack of RepVGG blocks beside a plain 1x1 branch, summed."""

    def __init__(self, in_channels: int, out_channels: int, blocks: int):
        super().__init__()
        self.conv1 = ConvNorm(in_channels, out_channels, 1, silu=True)
        self.conv2 = ConvNorm(in_channels, out_channels, 1, silu=True)
        self.bottlenecks = nn.Sequential(*(RepVGGBlock(out_channels) for _ in range(blocks)))

    def forward(self, x: Tensor) -> Tensor:
        """Run both branches on a map [B, C, H, W]."""
        return self.bottlenecks(self.conv1(x)) + self.conv2(x)


class ELAN(nn.Module):
    """Two halves, the second of which goes through two CSP layers in a row; all four parts are joined."""

    def __init__(self, dim: int, inner: int, blocks: int):
        super().__init__()
        self.cv1 = ConvNorm(2 * dim, 2 * dim, 1, silu=True)
        self.cv2 = nn.Sequential(CSPLayer(dim, inner, blocks), ConvNorm(inner, inner, 3, silu=True))
        self.cv3 = nn.Sequential(CSPLayer(inner, inner, blocks), ConvNorm(inner, inner, 3, silu=True))
        self.cv4 = ConvNorm(2 * dim + 2 * inner, dim, 1, silu=True)

    def forward(self, x: Tensor) -> Tensor:
        """Fuse a map [B, 2 * dim, H, W] into [B, dim, H, W]."""
        halves = self.cv1(x)
        second = self.cv2(halves.chunk(2, dim=1)[1])
        return self.cv4(torch.cat([halves, second, self.cv3(second)], dim=1))


class SCDown(nn.Module):
    """Downsampling by two: 1x1 convolution, then a depthwise one of stride 2."""

    def __init__(self, dim: int):
        super().__init__()
        self.cv1 = ConvNorm(dim, dim, 1)
        self.cv2 = ConvNorm(dim, dim, 3, 2, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        """Halve a map [B, C, H, W]."""
        return self.cv2(self.cv1(x))


class TransformerEncoderLayer(nn.Module):
    """Post-norm self-attention and feed-forward with GELU."""

    def __init__(self, dim: int, heads: int, ffn_dim: int):
        super().__init__()
        self.self_attn = SelfAttention(dim, heads)
        self.linear1 = Linear(dim, ffn_dim)
        self.linear2 = Linear(ffn_dim, dim)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        """Transform tokens [B, T, D]."""
        x = self.norm1(x + self.self_attn(x, position))
        return self.norm2(x + self.linear2(F.gelu(self.linear1(x))))


class TransformerEncoder(nn.Module):
    """Stack of one layer, as the released state dict has it."""

    def __init__(self, layer: TransformerEncoderLayer):
        super().__init__()
        self.layers = nn.ModuleList([layer])

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        """Transform tokens [B, T, D]."""
        for layer in self.layers:
            x = layer(x, position)
        return x


def positional_table(
    height: int, width: int, dim: int, temperature: float, order: Literal["released", "grid"], device: torch.device
) -> Tensor:
    """Sine-cosine positions of row-major tokens, [1, height * width, dim].

    "grid" encodes a token's row in the first half and its column in the second. "released" enumerates the map column-wise
    while tokens lie row-wise: the same for square maps, scrambled for others.
    """
    frequencies = temperature ** (-torch.arange(dim // 4, device=device, dtype=torch.float32) / (dim // 4))
    token = torch.arange(height * width, device=device)
    divisor = width if order == "grid" else height
    row = torch.div(token, divisor, rounding_mode="floor").float().unsqueeze(1) * frequencies
    column = (token % divisor).float().unsqueeze(1) * frequencies
    return torch.cat([row.sin(), row.cos(), column.sin(), column.cos()], dim=1).unsqueeze(0)


class HybridEncoder(nn.Module):
    """Attention on the coarsest map, then the pyramid top-down and bottom-up."""

    def __init__(self, config: ModelConfig, in_channels: list[int]):
        super().__init__()
        dim = config.encoder_dim
        levels = len(in_channels)
        inner = int(config.expansion * dim // 2)
        blocks = round(3 * config.depth)
        self.temperature = config.positional_temperature
        self.positional_order = config.positional_table
        self._tables = TableCache()
        self.input_proj = nn.ModuleList(ConvNorm(channels, dim, 1) for channels in in_channels)
        self.encoder = nn.ModuleList(
            [TransformerEncoder(TransformerEncoderLayer(dim, config.encoder_heads, config.encoder_ffn_dim))]
        )
        self.lateral_convs = nn.ModuleList(ConvNorm(dim, dim, 1) for _ in range(levels - 1))
        self.fpn_blocks = nn.ModuleList(ELAN(dim, inner, blocks) for _ in range(levels - 1))
        self.downsample_convs = nn.ModuleList(nn.Sequential(SCDown(dim)) for _ in range(levels - 1))
        self.pan_blocks = nn.ModuleList(ELAN(dim, inner, blocks) for _ in range(levels - 1))

    def forward(self, maps: list[Tensor], *, with_attended: bool = False) -> list[Tensor]:
        """Turn backbone maps, fine to coarse, into maps of the same sizes with `encoder_dim` channels.

        Args:
            with_attended: put the coarsest map after its attention, before the pyramid, at the end of the list.
        """
        projected = [project(x) for project, x in zip(self.input_proj, maps, strict=True)]
        projected[-1] = self._attend(projected[-1])

        coarse = projected[-1]
        laterals = []  # coarse to fine; the bottom-up path joins them again
        for lateral, fuse, fine in zip(self.lateral_convs, self.fpn_blocks, reversed(projected[:-1]), strict=True):
            laterals.append(lateral(coarse))
            coarse = fuse(torch.cat([F.interpolate(laterals[-1], scale_factor=2.0, mode="nearest"), fine], dim=1))

        outputs = [coarse]
        for down, fuse, lateral_map in zip(self.downsample_convs, self.pan_blocks, reversed(laterals), strict=True):
            outputs.append(fuse(torch.cat([down(outputs[-1]), lateral_map], dim=1)))
        return [*outputs, projected[-1]] if with_attended else outputs

    def deploy(self, *, as_released: bool = False) -> None:
        """Fuse convolutions with their norms; the release leaves the input projections as they are."""
        pyramid = (self.lateral_convs, self.fpn_blocks, self.downsample_convs, self.pan_blocks)
        for part in pyramid if as_released else (self.input_proj, *pyramid):
            for module in list(part.modules()):
                if isinstance(module, ConvNorm | RepVGGBlock):
                    module.fuse()

    def _attend(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        tokens = x.flatten(2).transpose(1, 2)
        position = self._tables.get(
            (height, width, x.device, tokens.dtype),
            lambda: positional_table(height, width, x.shape[1], self.temperature, self.positional_order, x.device).to(
                tokens.dtype
            ),
        )
        for encoder in self.encoder:
            tokens = encoder(tokens, position)
        return tokens.transpose(1, 2).unflatten(-1, (height, width)).contiguous()
