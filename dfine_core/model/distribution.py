"""Fine-grained Distribution Refinement (FDR): a box edge as a probability distribution over offsets.

Every query carries one *initial box* (x, y, w, h), predicted by the first decoder layer and then fixed. Its four edges are
moved by offsets in units of the box's own size. A layer does not predict an offset but N = reg_max + 1 logits per edge; the
offset is the expectation of W(n) under their softmax (`integral`). Later layers *add* to the logits, so they refine the
distribution: where an edge is uncertain its mass stays spread, and where it is clear it concentrates.

W(n) is not uniform: bins are narrow around 0 (fine corrections) and widen outwards, and the two outermost jump to twice the
last value (large corrections). With a = up * reg_scale the inner bins reach +-a, and an offset of reg_scale equals
the box's whole width; so reg_scale sets how fine the correction is and `up` how far it reaches.

Source: D-FINE, arXiv:2410.13842, equations 2-4.
"""

import torch
from torch import Tensor


def weighting_function(reg_max: int, up: float, reg_scale: float) -> Tensor:
    """Compute W(n): [N] ascending float32 values, antisymmetric about n = reg_max / 2."""
    reach = abs(up) * abs(reg_scale)
    growth = (reach + 1) ** (2 / (reg_max - 2))
    steps = torch.arange(1, reg_max // 2, dtype=torch.float64)
    inner = growth**steps - 1  # W at 1 .. reg_max / 2 - 1 bins right of the centre
    right = torch.cat([inner, torch.tensor([2 * reach], dtype=torch.float64)])
    return torch.cat([-right.flip(0), torch.zeros(1, dtype=torch.float64), right]).float()


def integral(edge_logits: Tensor, bins: Tensor) -> Tensor:
    """Expected offset of every edge, [..., 4, N] to [..., 4], in units of W(n)."""
    return expectation(edge_logits.softmax(-1), bins.to(edge_logits.dtype))


def expectation(probabilities: Tensor, bins: Tensor) -> Tensor:
    """Expected offset of every edge from its distribution, [..., 4, N] to [..., 4], in units of W(n)."""
    return probabilities @ bins


def decode_boxes(initial_boxes: Tensor, offsets: Tensor, reg_scale: float) -> Tensor:
    """Move the edges of the initial boxes: positive offsets move outwards.

    Args:
        initial_boxes: [..., 4] cxcywh.
        offsets: [..., 4] of the left, top, right, bottom edge; `reg_scale` is one box width (height).

    Returns:
        [..., 4] cxcywh. Widths can be negative: nothing keeps the left edge left of the right one.
    """
    centre, size = initial_boxes[..., :2], initial_boxes[..., 2:]
    reach = (reg_scale / 2 + offsets).unflatten(-1, (2, 2)) * size.unsqueeze(-2) / reg_scale
    low, high = centre - reach[..., 0, :], centre + reach[..., 1, :]
    return torch.cat([(low + high) / 2, high - low], dim=-1)


def true_offsets(initial_boxes: Tensor, target_xyxy: Tensor, reg_scale: float) -> Tensor:
    """Offsets that would decode to the target: inverse of `decode_boxes`.

    Args:
        initial_boxes: [..., 4] cxcywh.
        target_xyxy: [..., 4].

    Returns:
        [..., 4] in units of W(n), not clamped; finite even for an empty initial box.
    """
    centre, size = initial_boxes[..., :2], initial_boxes[..., 2:]
    unit = size / reg_scale + 1e-16
    low = (centre - target_xyxy[..., :2]) / unit
    high = (target_xyxy[..., 2:] - centre) / unit
    return torch.cat([low, high], dim=-1) - reg_scale / 2


def bracketing_bins(offsets: Tensor, bins: Tensor) -> tuple[Tensor, Tensor]:
    """Find the two bins around every offset, as the left one and the share that belongs to the right one.

    Args:
        offsets: [...] in units of W(n); clamped to the range of `bins`.
        bins: [N] ascending values of W(n).

    Returns:
        left: [...] int64 in 0 .. N - 2. toward_right: [...] in [0, 1].
    """
    clamped = offsets.clamp(bins[0], bins[-1])
    left = torch.searchsorted(bins, clamped.contiguous(), right=True).clamp(1, len(bins) - 1) - 1
    toward_right = (clamped - bins[left]) / (bins[left + 1] - bins[left])
    return left, toward_right
