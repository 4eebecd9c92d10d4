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
    low, high = offsets.unflatten(-1, (2, 2)).unbind(-2)
    # An edge moves its side by its offset, and the centre by half of it.
    moved = torch.addcmul(centre, high - low, size, value=0.5 / reg_scale)
    return torch.cat([moved, torch.addcmul(size, high + low, size, value=1 / reg_scale)], dim=-1)


def true_offsets(initial_boxes: Tensor, target_xyxy: Tensor, reg_scale: float) -> Tensor:
    """Offsets that would decode to the target: inverse of `decode_boxes`.

    Args:
        initial_boxes: [..., 4] cxcywh.
        target_xyxy: [..., 4].

    Returns:
        [..., 4] in units of W(n), not clamped; finite even for an empty initial box.
    """
    centre, size = initial_boxes[..., :2], initial_boxes[..., 2:]
    unit = (size / reg_scale + 1e-16).unsqueeze(-2)
    outwards = torch.stack([centre - target_xyxy[..., :2], target_xyxy[..., 2:] - centre], dim=-2)
    return (outwards / unit).flatten(-2) - reg_scale / 2


def bracketing_bins(offsets: Tensor, bins: Tensor) -> tuple[Tensor, Tensor]:
    """Find the two bins around every offset, and the share of each, which average to the offset.

    Args:
        offsets: [...] in units of W(n); clamped to the range of `bins`.
        bins: [N] ascending values of W(n).

    Returns:
        bracket: [..., 2] int64, neighbours in 0 .. N - 1. share: [..., 2] in [0, 1], adding up to 1.
    """
    # As many inner bins as lie at or below an offset: so the outermost intervals take everything beyond them.
    left = torch.searchsorted(bins[1:-1], offsets.contiguous(), right=True)
    bracket = torch.stack([left, left + 1], dim=-1)
    low, high = bins[bracket].unbind(-1)
    toward_right = ((offsets - low) / (high - low)).clamp(0, 1)
    return bracket, torch.stack([1 - toward_right, toward_right], dim=-1)
