"""Boxes of unequal worth in the loss: weights of labels, and regions that teach nothing.

A label of weight w counts as w boxes: in every term of its pairs, and in the counts that the sums are divided by. So the losses
are weighted means, and a batch of uncertain labels does not learn less from its background. A query that is matched to no box
and lies mostly in a region to ignore has no part in the classification loss, whether it is a matching or a denoising query.

DDF is as ever: it compares the detector with itself, and no label has a part in it but where boxes are matched.
"""

import torch
from torch import Tensor

from dfine_core.boxes import cxcywh_to_xyxy
from dfine_core.loss.matching import Matches
from dfine_core.structures import Targets

MOSTLY = 0.5  # share of a query's box inside a region to ignore, as COCO's evaluation treats detections in a crowd


def amounts(targets: Targets, matches: Matches) -> tuple[float | Tensor, float | Tensor]:
    """Boxes of a micro-batch and pairs of its GO union, each counted by its weight."""
    if targets.weights is None:
        return targets.total, len(matches.union)
    return targets.weights.sum(), targets.weights[matches.union.target].sum()


def weigh_scores(
    entries: Tensor,
    hits: Tensor,
    boxes: Tensor,
    index: tuple[Tensor, Tensor, Tensor],
    target: Tensor,
    targets: Targets,
) -> tuple[Tensor, Tensor]:
    """Weigh the two parts of a classification loss, see `losses.varifocal_loss`.

    Args:
        entries: [S, B, Q].
        hits: [S, M].
        boxes: [S, B, Q, 4] of all queries.
        index: stage, image and query of the matched entries, broadcasting to [S, M].
        target: [S, M] their boxes.
    """
    if targets.weights is None and targets.ignored is None:
        return entries, hits
    factor = torch.ones_like(entries)
    if targets.ignored is not None:
        factor = (~mostly_ignored(boxes.detach(), targets)).to(entries)
    weight = torch.ones_like(hits) if targets.weights is None else targets.weights[target].to(hits)
    factor[index] = weight
    return entries * factor, hits * weight


def mostly_ignored(boxes: Tensor, targets: Targets) -> Tensor:
    """Mask [S, B, Q] of the boxes [S, B, Q, 4] that lie mostly in some region to ignore."""
    assert targets.ignored is not None
    assert targets.ignored_image is not None
    corners, regions = cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(targets.ignored)
    corners = corners[:, targets.ignored_image]  # [S, I, Q, 4]
    regions = regions.unsqueeze(1)
    sides = torch.minimum(corners[..., 2:], regions[..., 2:]) - torch.maximum(corners[..., :2], regions[..., :2])
    inside = sides.clamp(min=0).prod(-1) >= MOSTLY * (corners[..., 2:] - corners[..., :2]).prod(-1)
    found = torch.zeros(boxes.shape[:3], dtype=torch.float32, device=boxes.device)
    return found.index_add_(1, targets.ignored_image, inside.float()) > 0
