"""HGNetv2, the backbone: a stem and four stages of HG blocks, strides 4, 8, 16, 32.

An HG block keeps the output of each of its layers, concatenates them all with its input and squeezes the result by two
1x1 convolutions. Attribute names follow the released state dict.
"""

from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import fuse_conv_bn_eval

from dfine_core.config import ModelConfig
from dfine_core.model.layers import BatchNorm2d, FrozenBatchNorm2d
from dfine_core.model.products import Conv2d


class StageSize(NamedTuple):
    """Channels and number of blocks of one stage."""

    in_channels: int
    mid_channels: int
    out_channels: int
    blocks: int


class BackboneSize(NamedTuple):
    """Channels and depths of one backbone."""

    stem: tuple[int, int]  # middle and output channels
    layers: int  # per block
    stages: tuple[StageSize, StageSize, StageSize, StageSize]


def _size(stem: tuple[int, int], layers: int, *stages: tuple[int, int, int, int]) -> BackboneSize:
    first, second, third, fourth = (StageSize(*stage) for stage in stages)
    return BackboneSize(stem, layers, (first, second, third, fourth))


SIZES = {
    "B0": _size((16, 16), 3, (16, 16, 64, 1), (64, 32, 256, 1), (256, 64, 512, 2), (512, 128, 1024, 1)),
    "B1": _size((24, 32), 3, (32, 32, 64, 1), (64, 48, 256, 1), (256, 96, 512, 2), (512, 192, 1024, 1)),
    "B2": _size((24, 32), 4, (32, 32, 96, 1), (96, 64, 384, 1), (384, 128, 768, 3), (768, 256, 1536, 1)),
    "B3": _size((24, 32), 5, (32, 32, 128, 1), (128, 64, 512, 1), (512, 128, 1024, 3), (1024, 256, 2048, 1)),
    "B4": _size((32, 48), 6, (48, 48, 128, 1), (128, 96, 512, 1), (512, 192, 1024, 3), (1024, 384, 2048, 1)),
    "B5": _size((32, 64), 6, (64, 64, 128, 1), (128, 128, 512, 2), (512, 256, 1024, 5), (1024, 512, 2048, 2)),
    "B6": _size((48, 96), 6, (96, 96, 192, 2), (192, 192, 512, 3), (512, 384, 1024, 6), (1024, 768, 2048, 3)),
}


class LearnableAffine(nn.Module):
    """Affine map scale * x + bias with two learned scalars, in the dtype of x."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        """Apply the map to a tensor of any shape."""
        return torch.addcmul(self.bias.to(x.dtype), x, self.scale.to(x.dtype))


class ConvBNAct(nn.Module):
    """Bias-free convolution, batch norm, then ReLU and learnable affine if `act`; convolution and a bound after `fuse`."""

    at_least: float | None = None  # bound of a fused module
    at_most: float | None = None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        stride: int = 1,
        *,
        groups: int = 1,
        act: bool = True,
        affine: bool = False,
    ):
        super().__init__()
        self.conv = Conv2d(in_channels, out_channels, kernel, stride, (kernel - 1) // 2, groups=groups, bias=False)
        self.bn: nn.Module = BatchNorm2d(out_channels)
        self.act = act
        self.lab = LearnableAffine() if act and affine else None

    def forward(self, x: Tensor) -> Tensor:
        """Convolve a map [B, C, H, W]."""
        if not hasattr(self, "bn"):
            x = self.conv(x)
            return x.clamp_(self.at_least, self.at_most) if self.act else x
        x = self.bn(self.conv(x))
        if self.act:
            x = F.relu(x)
        return x if self.lab is None else cast(Tensor, self.lab(x))

    @torch.no_grad()
    def fuse(self) -> None:
        """Replace all parts by one convolution and a bound of its output, in place; in eval mode only.

        The affine map of the ReLU is max(s y + b, b) for a scale s >= 0 and min(s y + b, b) else.
        """
        if not hasattr(self, "bn"):
            return
        scale, bias = (1.0, 0.0) if self.lab is None else (float(self.lab.scale), float(self.lab.bias))
        self.conv = fuse_conv_bn_eval(self.conv, cast(nn.BatchNorm2d, self.bn))
        self.conv.weight.mul_(scale)
        cast(Tensor, self.conv.bias).mul_(scale).add_(bias)
        self.at_least, self.at_most = (bias, None) if scale >= 0 else (None, bias)
        del self.bn, self.lab


class LightConv(nn.Module):
    """1x1 convolution without activation, then a depthwise one."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, affine: bool):
        super().__init__()
        self.conv1 = ConvBNAct(in_channels, out_channels, 1, act=False)
        self.conv2 = ConvBNAct(out_channels, out_channels, kernel, groups=out_channels, affine=affine)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve a map [B, C, H, W]."""
        return self.conv2(self.conv1(x))


class Stem(nn.Module):
    """Convolutions from the image to stride 4. The 2x2 kernels are padded on the right and bottom only."""

    def __init__(self, mid: int, out: int, affine: bool):
        super().__init__()
        self.stem1 = ConvBNAct(3, mid, 3, 2, affine=affine)
        self.stem2a = ConvBNAct(mid, mid // 2, 2, affine=affine)
        self.stem2b = ConvBNAct(mid // 2, mid, 2, affine=affine)
        self.stem3 = ConvBNAct(2 * mid, mid, 3, 2, affine=affine)
        self.stem4 = ConvBNAct(mid, out, 1, affine=affine)

    def forward(self, images: Tensor) -> Tensor:
        """Reduce images [B, 3, H, W] to a map of stride 4."""
        x = F.pad(self.stem1(images), (0, 1, 0, 1))
        pooled = _max_pool(x)
        convolved = self.stem2b(F.pad(self.stem2a(x), (0, 1, 0, 1)))
        return self.stem4(self.stem3(torch.cat([pooled, convolved], dim=1)))


def _max_pool(x: Tensor) -> Tensor:
    """Maximum over all 2x2 windows of a map [B, C, H, W]: [B, C, H - 1, W - 1]."""
    if x.device.type != "cpu" or x.requires_grad or torch.compiler.is_compiling():
        return F.max_pool2d(x, kernel_size=2, stride=1)
    # PyTorch's own also finds where the maximum lies, which only gradients need: 5 times the work.
    rows = torch.maximum(x[:, :, 1:], x[:, :, :-1])
    return torch.maximum(rows[..., 1:], rows[..., :-1])


class HGBlock(nn.Module):
    """Layers in a row whose outputs, and the input, are concatenated and squeezed."""

    def __init__(
        self,
        in_channels: int,
        mid: int,
        out: int,
        *,
        layers: int,
        kernel: int,
        light: bool,
        residual: bool,
        affine: bool,
    ):
        super().__init__()
        inputs = [in_channels] + [mid] * (layers - 1)
        self.layers = nn.ModuleList(
            LightConv(c, mid, kernel, affine) if light else ConvBNAct(c, mid, kernel, affine=affine) for c in inputs
        )
        gathered = in_channels + layers * mid
        self.aggregation = nn.Sequential(
            ConvBNAct(gathered, out // 2, 1, affine=affine), ConvBNAct(out // 2, out, 1, affine=affine)
        )
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        """Run the block on a map [B, C, H, W]."""
        outputs = [x]
        for layer in self.layers:
            outputs.append(layer(outputs[-1]))
        y = self.aggregation(torch.cat(outputs, dim=1))
        return y + x if self.residual else y


class HGStage(nn.Module):
    """Depthwise downsampling, if any, then HG blocks."""

    def __init__(self, size: StageSize, *, layers: int, downsample: bool, light: bool, affine: bool):
        super().__init__()
        channels = size.in_channels
        self.downsample = ConvBNAct(channels, channels, 3, 2, groups=channels, act=False) if downsample else None
        self.blocks = nn.Sequential(
            *(
                HGBlock(
                    size.out_channels if index else channels,
                    size.mid_channels,
                    size.out_channels,
                    layers=layers,
                    kernel=5 if light else 3,
                    light=light,
                    residual=index > 0,
                    affine=affine,
                )
                for index in range(size.blocks)
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        """Run the stage on a map [B, C, H, W]."""
        if self.downsample is not None:
            x = self.downsample(x)
        return self.blocks(x)


class HGNetv2(nn.Module):
    """Backbone: the stem and four stages, frozen as the configuration asks."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        size = SIZES[config.backbone]
        affine = config.learnable_affine
        self.return_stages = config.backbone_stages
        self.out_channels = [size.stages[i].out_channels for i in config.backbone_stages]
        self.stem = Stem(*size.stem, affine=affine)
        self.stages = nn.ModuleList(
            HGStage(stage, layers=size.layers, downsample=i > 0, light=i >= 2, affine=affine)
            for i, stage in enumerate(size.stages)
        )
        if config.freeze_norm:
            _freeze_norms(self)
        if config.freeze_at >= 0:
            self.stem.requires_grad_(False)
            if not config.freeze_stem_only:
                for frozen in list(self.stages)[: config.freeze_at + 1]:
                    frozen.requires_grad_(False)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Compute the maps of `backbone_stages`, fine to coarse, of images [B, 3, H, W] in [0, 1]."""
        x = self.stem(images)
        maps = []
        for index, stage in enumerate(self.stages):
            x = stage(x)
            if index in self.return_stages:
                maps.append(x)
        return maps

    def deploy(self) -> None:
        """Fuse every convolution with what follows it."""
        for module in list(self.modules()):
            if isinstance(module, ConvBNAct):
                module.fuse()


def _freeze_norms(module: nn.Module) -> None:
    for child in module.modules():
        if isinstance(child, ConvBNAct):
            child.bn = FrozenBatchNorm2d(cast(nn.BatchNorm2d, child.bn).num_features)
