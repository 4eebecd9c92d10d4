"""Box formats and overlaps. cxcywh = centre, width, height; xyxy = left, top, right, bottom."""

import torch
from torch import Tensor

SMALLEST_AREA = 1e-12  # keeps 0 / 0 of two empty boxes at 0; below the area of any box a pixel wide


def cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    """Convert boxes [..., 4] to corners; a negative width or height counts as 0."""
    centre, half_size = boxes[..., :2], boxes[..., 2:].clamp(min=0) / 2
    return torch.cat([centre - half_size, centre + half_size], dim=-1)


def xyxy_to_cxcywh(boxes: Tensor) -> Tensor:
    """Convert boxes [..., 4] to centre and size."""
    low, high = boxes[..., :2], boxes[..., 2:]
    return torch.cat([(low + high) / 2, high - low], dim=-1)


def area(boxes_xyxy: Tensor) -> Tensor:
    """Area of boxes xyxy, [..., 4] to [...]."""
    size = boxes_xyxy[..., 2:] - boxes_xyxy[..., :2]
    return size[..., 0] * size[..., 1]


def iou_and_union(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Intersection over union, and the union, of boxes xyxy, elementwise under broadcasting: [..., 4] to [...]."""
    size = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0)
    intersection = size[..., 0] * size[..., 1]
    union = area(a) + area(b) - intersection
    return intersection / union.clamp(min=SMALLEST_AREA), union


def iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of boxes xyxy, elementwise under broadcasting: [..., 4] to [...]."""
    return iou_and_union(a, b)[0]


def giou(a: Tensor, b: Tensor) -> Tensor:
    """Generalised IoU of boxes xyxy, elementwise under broadcasting: [..., 4] to [...], in [-1, 1]."""
    return iou_and_giou(a, b)[1]


def iou_and_giou(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """IoU and generalised IoU of boxes xyxy, elementwise under broadcasting: [..., 4] to [...].

    Source: Rezatofighi et al., arXiv:1902.09630.
    """
    overlap, union = iou_and_union(a, b)
    size = torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])
    hull = size[..., 0] * size[..., 1]
    return overlap, overlap - (hull - union) / hull.clamp(min=SMALLEST_AREA)


def inverse_sigmoid(probability: Tensor, eps: float = 1e-5) -> Tensor:
    """Logit of a probability, clipped to [0, 1] first; finite, at most ln(1 / eps) in size."""
    p = probability.clamp(0, 1)
    return torch.log(p.clamp(min=eps) / (1 - p).clamp(min=eps))
