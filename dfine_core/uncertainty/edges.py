"""Width of the distributions of edges, in the unit of the boxes.

Edges are left, top, right, bottom, as everywhere in the detector. N = reg_max + 1 bins.
"""

import torch
from torch import Tensor

from dfine_core.model.distribution import expectation


def edge_std(edge_probabilities: Tensor, bins: Tensor, initial_boxes: Tensor, reg_scale: float) -> Tensor:
    """Standard deviation of every edge.

    Args:
        edge_probabilities: [..., 4, N], each distribution summing to 1 up to rounding.
        bins: [N] values of W(n), see `distribution.weighting_function`.
        initial_boxes: [..., 4] cxcywh, the boxes that the offsets refer to.
        reg_scale: offset that equals one width (height) of the initial box.

    Returns:
        [..., 4] in the unit of `initial_boxes`.
    """
    probabilities = _normalised(edge_probabilities)
    bins = bins.to(probabilities)
    away = bins - expectation(probabilities, bins).unsqueeze(-1)  # [..., 4, N]
    return (probabilities * away**2).sum(-1).sqrt() * _unit(initial_boxes.to(probabilities), reg_scale)


def edge_interval(
    edge_probabilities: Tensor, bins: Tensor, initial_boxes: Tensor, reg_scale: float, mass: float = 0.9
) -> Tensor:
    """Central interval of every edge's own distribution, as coordinates.

    The distribution function has half of a bin's probability at the bin and is linear between bins. Nothing lies outside the
    outermost bins. Arguments as in `edge_std`.

    Args:
        mass: probability that the interval holds, in (0, 1); the rest is split equally.

    Returns:
        [..., 4, 2] lower and upper coordinate of each edge, in the unit of `initial_boxes`.

    Raises:
        ValueError: `mass` lies outside (0, 1).
    """
    if not 0 < mass < 1:
        raise ValueError(f"mass ({mass}) must lie between 0 and 1: it is the probability inside the interval")
    probabilities = _normalised(edge_probabilities)
    bins = bins.to(probabilities)
    offsets = torch.stack(
        [_quantile(probabilities, bins, (1 - mass) / 2), _quantile(probabilities, bins, (1 + mass) / 2)], -1
    )

    boxes = initial_boxes.to(probabilities)
    centre, unit = boxes[..., :2].unsqueeze(-1), _unit(boxes, reg_scale).unsqueeze(-1)  # [..., 2, 1], [..., 4, 1]
    reach = (reg_scale / 2 + offsets) * unit  # distance from the centre, positive outwards
    low_edges = centre - reach[..., :2, :].flip(-1)  # a large offset is a small coordinate
    high_edges = centre + reach[..., 2:, :]
    return torch.cat([low_edges, high_edges], dim=-2)


def edge_errors(boxes_xyxy: Tensor, true_xyxy: Tensor) -> Tensor:
    """Distance of every edge from the true one, [..., 4], at least 0."""
    return (boxes_xyxy - true_xyxy).abs()


def _normalised(probabilities: Tensor) -> Tensor:
    """Distributions in float32 or better that sum to 1: files keep them in half precision."""
    wide = probabilities if probabilities.dtype == torch.float64 else probabilities.float()
    return wide / wide.sum(-1, keepdim=True)


def _unit(initial_boxes: Tensor, reg_scale: float) -> Tensor:
    """Length of one unit of W(n) for every edge, [..., 4]."""
    return torch.cat([initial_boxes[..., 2:]] * 2, dim=-1) / reg_scale


def _quantile(probabilities: Tensor, bins: Tensor, level: float) -> Tensor:
    """Offset below which a share of the probability lies, [..., N] to [...]."""
    cumulative = probabilities.cumsum(-1) - probabilities / 2  # at the bins
    right = torch.searchsorted(cumulative, torch.full_like(cumulative[..., :1], level)).clamp(1, len(bins) - 1)
    left = right - 1
    below, above = cumulative.gather(-1, left), cumulative.gather(-1, right)
    share = ((level - below) / (above - below).clamp(min=torch.finfo(below.dtype).tiny)).clamp(0, 1)
    return torch.lerp(bins[left], bins[right], share).squeeze(-1)
