"""Multi-scale deformable attention: every query samples a few points of every feature level, around its own box.

Values are the feature maps themselves, cut into heads: there is neither a value nor an output projection. The maps are
therefore prepared once (`split_levels`) and shared by all decoder layers. On a GPU with Triton, one kernel reads the tokens as
they are (`sampling`).

Source: Zhu et al., arXiv:2010.04159, as modified in D-FINE, arXiv:2410.13842.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfine_core.model.products import Linear
from dfine_core.model.sampling import deformable_sampling


@dataclass(frozen=True)
class Levels:
    """Feature levels to sample from."""

    tokens: Tensor  # [B, T, D] of all levels, row-major and end to end
    shapes: tuple[tuple[int, int], ...]  # (h, w)
    maps: list[Tensor] | None  # [B * heads, D / heads, h, w] per level; None where the fused kernel samples tokens


def split_levels(memory: Tensor, shapes: Sequence[tuple[int, int]], heads: int, *, fused: bool = False) -> Levels:
    """Cut tokens [B, T, D] of all levels, row-major and end to end, into one map per level, unless sampling is fused."""
    if fused:
        return Levels(memory, tuple(shapes), None)
    levels = memory.split([h * w for h, w in shapes], dim=1)
    maps = [
        tokens.transpose(1, 2).reshape(-1, memory.shape[-1] // heads, h, w)
        for tokens, (h, w) in zip(levels, shapes, strict=True)
    ]
    return Levels(memory, tuple(shapes), maps)


class DeformableAttention(nn.Module):
    """Attention over points whose offsets and weights come from the query.

    Samples are bilinear ("default") or those of the nearest cell ("discrete").
    """

    num_points_scale: Tensor

    def __init__(
        self, dim: int, heads: int, num_points: Sequence[int], sampling: Literal["default", "discrete"] = "default"
    ):
        super().__init__()
        self.heads = heads
        self.num_points = tuple(num_points)
        self.sampling = sampling
        self.gathers = False  # True while exporting for runtimes without grid sampling
        self.register_buffer("num_points_scale", torch.tensor([1 / n for n in num_points for _ in range(n)]))
        points = sum(num_points)
        self.sampling_offsets = Linear(dim, heads * points * 2)
        self.attention_weights = Linear(dim, heads * points)
        self._reset_parameters()
        if sampling == "discrete":
            self.sampling_offsets.requires_grad_(False)

    def _reset_parameters(self) -> None:
        """Initialise the points of each head on a ray of its own direction, one step further each."""
        nn.init.zeros_(self.sampling_offsets.weight)
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        angle = torch.arange(self.heads) * (2 * math.pi / self.heads)
        ray = torch.stack([angle.cos(), angle.sin()], dim=-1)
        ray = ray / ray.abs().amax(-1, keepdim=True)  # [heads, 2]
        steps = torch.cat([torch.arange(1, n + 1) for n in self.num_points])
        with torch.no_grad():
            self.sampling_offsets.bias.copy_((ray.unsqueeze(1) * steps.unsqueeze(-1)).flatten())

    def forward(self, query: Tensor, reference_boxes: Tensor, levels: Levels) -> Tensor:
        """Attend to the sampled points.

        Args:
            query: [B, Q, D].
            reference_boxes: [B, Q, 4] cxcywh in [0, 1]; points are offset in units of half the box over the point count.
            levels: from `split_levels`.

        Returns:
            [B, Q, D].
        """
        batch, queries, _ = query.shape
        offsets = self.sampling_offsets(query).reshape(batch, queries, self.heads, -1, 2)
        weights = self.attention_weights(query).reshape(batch, queries, self.heads, -1).softmax(-1)

        reach = self.num_points_scale.to(query.dtype).unsqueeze(-1) * reference_boxes[:, :, None, None, 2:] * 0.5
        locations = reference_boxes[:, :, None, None, :2] + offsets * reach  # [B, Q, heads, P, 2]
        if levels.maps is not None:
            attended = self._sample(levels.maps, locations, weights)
        else:
            sizes = [side for shape in levels.shapes for side in shape]
            attended = deformable_sampling(levels.tokens, locations.float(), weights, sizes, self.num_points)
        return attended.to(query.dtype)

    def _sample(self, maps: Sequence[Tensor], locations: Tensor, weights: Tensor) -> Tensor:
        """Sum of weighted samples [B, Q, D], level by level, at locations [B, Q, heads, P, 2] with weights [B, Q, heads, P]."""
        batch, queries = locations.shape[:2]
        locations = locations.transpose(1, 2).flatten(0, 1)  # [B * heads, Q, P, 2]
        sample = _nearest
        if self.sampling != "discrete" and self.gathers:
            sample = _bilinear_by_gathers
        elif self.sampling != "discrete":
            sample, locations = _bilinear, (2 * locations - 1).to(maps[0].dtype)
        samples = torch.cat(
            [
                sample(level, points)
                for level, points in zip(maps, locations.split(self.num_points, dim=2), strict=True)
            ],
            dim=-1,
        )  # [B * heads, D / heads, Q, P]
        weights = weights.transpose(1, 2).flatten(0, 1).unsqueeze(1)  # [B * heads, 1, Q, P]
        attended = (samples * weights).sum(-1)
        return attended.reshape(batch, -1, queries).transpose(1, 2)


def _bilinear(level: Tensor, locations: Tensor) -> Tensor:
    """Samples at locations [b, Q, P, 2] in [-1, 1], zero outside the map: [b, d, Q, P]."""
    return F.grid_sample(level, locations, mode="bilinear", padding_mode="zeros", align_corners=False)


def _bilinear_by_gathers(level: Tensor, locations: Tensor) -> Tensor:
    """Samples at locations in [0, 1], zero outside the map, by picking four cells each: [b, d, Q, P]."""
    maps, channels, height, width = level.shape
    cells = level.flatten(2).transpose(1, 2).reshape(-1, channels)  # [b * h * w, d]
    first = torch.arange(maps, device=level.device).reshape(-1, 1, 1) * (height * width)  # row of each map's first cell
    columns, rows = _two_cells(locations[..., 0], width), _two_cells(locations[..., 1], height)
    samples = []
    for row, row_share in rows:
        for column, column_share in columns:
            index = first + row * width + column
            picked = cells.index_select(0, index.flatten()).unflatten(0, (-1, *locations.shape[1:3]))  # [b, Q, P, d]
            samples.append(picked * (row_share * column_share).unsqueeze(-1))
    return torch.stack(samples).sum(0).permute(0, 3, 1, 2)


def _two_cells(location: Tensor, side: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Cells before and after locations in [0, 1] along one side of a map: their indices, and their shares of the sample.

    A cell outside the map has a share of 0.
    """
    position = location * side - 0.5
    before = position.floor()
    after, share = before + 1, position - before
    inside = [((cell >= 0) & (cell < side)).to(location.dtype) for cell in (before, after)]
    index = [cell.clamp(0, side - 1).long() for cell in (before, after)]
    return (index[0], (1 - share) * inside[0]), (index[1], share * inside[1])


def _nearest(level: Tensor, locations: Tensor) -> Tensor:
    """Samples at locations in [0, 1] by the released "discrete" rule, half a cell beside the bilinear one: [b, d, Q, P]."""
    height, width = level.shape[-2:]
    column = (locations[..., 0] * width + 0.5).long().clamp(0, width - 1)
    row = (locations[..., 1] * height + 0.5).long().clamp(0, height - 1)
    flat = (row * width + column).flatten(1).unsqueeze(1)
    picked = level.flatten(2).gather(2, flat.expand(-1, level.shape[1], -1))
    return picked.unflatten(-1, tuple(locations.shape[1:3]))
