"""Losses as functions of tensors; the criterion decides which prediction is compared with which box.

Letters: S stages (or layers) side by side, M pairs, Q queries, N bins. A loss that is computed for S stages at once returns [S].
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from dfine_core.boxes import cxcywh_to_xyxy, giou
from dfine_core.model.distribution import bracketing_bins


def varifocal_loss(
    logits: Tensor, index: tuple[Tensor, Tensor, Tensor, Tensor], ious: Tensor, alpha: float, gamma: float
) -> Tensor:
    """VFL, summed: scores learn to predict the IoU of their box.

    A matched entry is pulled towards the IoU of its box and weighs as much; every other entry is pulled towards 0 and
    weighs alpha * score ** gamma, so that only confident mistakes count.

    Args:
        logits: [S, B, Q, C].
        index: stage, image, query and class of the matched entries, broadcasting to [S, M]; none twice.
        ious: [S, M] of predicted and true box; a target, so no gradient flows through it.

    Source: Zhang et al., arXiv:2008.13367.
    """
    target = ious.detach().to(logits.dtype)
    weight = alpha * logits.detach().sigmoid() ** gamma
    weight[index] = target
    # The cross-entropy of z towards y is softplus(z) - y z, and y is 0 almost everywhere.
    return (weight * F.softplus(logits)).sum((1, 2, 3)) - (target**2 * logits[index]).sum(1)


def box_losses(boxes: Tensor, target_boxes: Tensor) -> tuple[Tensor, Tensor]:
    """L1 and 1 - GIoU, summed over pairs: cxcywh [S, M, 4] and [M, 4] to two [S]."""
    l1 = (boxes - target_boxes).abs().sum((1, 2))
    return l1, (1 - giou(cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(target_boxes))).sum(1)


def fine_grained_localization_loss(edge_logits: Tensor, target_offsets: Tensor, bins: Tensor, ious: Tensor) -> Tensor:
    """FGL, summed over pairs and edges: cross-entropy towards the two bins around each true edge, weighted by IoU.

    The two bins share the target by their distance to the true offset, so the least loss is at a distribution whose
    expectation is that offset. Boxes that already fit weigh more: fine-grained steps are theirs to learn.

    Args:
        edge_logits: [S, M, 4, N] distributions over offsets of the left, top, right, bottom edge.
        target_offsets: [M, 4] true offsets, in units of W(n); clamped to the range of `bins`.
        bins: [N] ascending values of W(n).
        ious: [S, M] of predicted and true box; a weight, so no gradient flows through it.

    Source: D-FINE, arXiv:2410.13842, equation 6.
    """
    left, toward_right = bracketing_bins(target_offsets, bins)  # [M, 4]
    bracket = torch.stack([left, left + 1], dim=-1).expand(*edge_logits.shape[:-1], 2)
    share = torch.stack([1 - toward_right, toward_right], dim=-1)
    log_likelihood = (F.log_softmax(edge_logits, dim=-1).gather(-1, bracket) * share).sum(-1)  # [S, M, 4]
    return -(log_likelihood * ious.detach().unsqueeze(-1)).sum((1, 2))


def decoupled_distillation_focal_loss(
    edge_logits: Tensor,
    teacher_logits: Tensor,
    weights: Tensor,
    matched: Tensor,
    balance: tuple[float, float],
    temperature: float,
) -> Tensor:
    """DDF, the loss of GO-LSD: earlier layers learn the last layer's edge distributions.

    The divergence of every edge from the teacher's, softened by the temperature, is averaged apart over matched queries and
    over the others; the two averages are balanced by the roots of their counts, so that the
    many unmatched queries neither drown the matched ones nor go unused.

    Args:
        edge_logits: [S, B, Q, 4, N] of the students.
        teacher_logits: [B, Q, 4, N] of the last layer; no gradient flows into it.
        weights: [S, B, Q] how much a query matters: IoU where matched, else the teacher's confidence.
        matched: [B, Q] bool.
        balance: weights of the two averages, roots of their counts.

    Source: D-FINE, arXiv:2410.13842, equations 7-8.
    """
    student = F.log_softmax(edge_logits / temperature, dim=-1)
    teacher = F.log_softmax(teacher_logits.detach() / temperature, dim=-1)
    divergence = (teacher.exp() * (teacher - student)).sum(-1) * temperature**2  # [S, B, Q, 4]
    per_query = divergence.mean(-1) * weights
    inside = matched.to(per_query.dtype)
    outside = 1 - inside
    mean_inside = (per_query * inside).sum((1, 2)) / inside.sum().clamp(min=1)
    mean_outside = (per_query * outside).sum((1, 2)) / outside.sum().clamp(min=1)
    near, far = balance
    return (mean_inside * near + mean_outside * far) / (near + far)
