"""Losses that pull a detector towards a frozen teacher: towards its feature map, and towards its edge distributions.

Boxes of a teacher as a second target set are in `teacher_boxes.py`. Letters: M matched pairs, N bins.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from dfine_core.boxes import cxcywh_to_xyxy, iou
from dfine_core.config import ModelConfig
from dfine_core.loss.matching import matching_cost, solve
from dfine_core.model.distribution import bracketing_bins, decode_boxes, true_offsets
from dfine_core.structures import DetectorOutput, Targets

LEAST_SHARE = 1e-8  # a smaller share of the gradient was not measured
MAX_CHANGE = 10.0  # factor by which one adaptation changes a weight at most


def feature_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Cosine distance of two maps, averaged over all positions: a scalar in 0..2.

    Args:
        student: [B, C, h, w].
        teacher: [B, C, h', w'], resized to the student's grid where the two differ.

    Source: RT-DETRv4, arXiv:2510.25257.
    """
    if teacher.shape[-2:] != student.shape[-2:]:
        teacher = F.interpolate(teacher, size=student.shape[-2:], mode="bilinear", align_corners=False)
    return 1 - F.cosine_similarity(student, teacher, dim=1).mean()


def adapted_weight(
    weight: float, share: float, *, wanted: float, tolerance: float, default: float, clean: bool = False
) -> float:
    """Weight that brings the share of the gradient, in 0..1, back to `wanted` give or take `tolerance`.

    A share of all gradients grows less than the weight: share / (1 - share) is what is proportional to it.

    Args:
        share: measured with `weight`, over an epoch.
        default: weight where nothing was measured, and from the clean epochs on.
        clean: the epoch had no strong augmentation.

    Source: RT-DETRv4, arXiv:2510.25257.
    """
    if share < LEAST_SHARE or clean:
        return default
    if abs(share - wanted) <= tolerance:
        return weight
    edge = wanted + tolerance if share < wanted else wanted - tolerance  # beyond the goal, in the direction of travel
    ratio = edge * (1 - share) / (share * (1 - edge)) if share < 1 else 0.0
    return weight * min(MAX_CHANGE, max(1 / MAX_CHANGE, ratio))


def edge_loss(
    student: DetectorOutput,
    teacher: DetectorOutput,
    targets: Targets,
    bins: Tensor,
    count: Tensor,
    config: ModelConfig,
    temperature: float = 1.0,
) -> Tensor:
    """Divergence of the student's edge distributions from a larger detector's, on edges of the same true boxes.

    Both match their last layer to the true boxes; a box that both have found is a pair. A pair counts as much as the IoU of
    the teacher's box with the true one, so that the teacher's mistakes are not learned.

    Args:
        teacher: with every layer; both have the same `bins`, [N].
        count: [] true boxes of a micro-batch, averaged over all of the step.
        config: of the student.
        temperature: softens both distributions.
    """
    of_student, of_teacher = student.matching, teacher.matching
    if of_student is None or of_teacher is None:
        raise ValueError("the loss needs the predictions of every layer: call the teacher with every_layer=True")
    if of_student.edge_logits is None or of_teacher.edge_logits is None:
        raise ValueError("edges can be learned from distributions alone: both detectors need regression 'fdr'")
    target, queries = _found_by_both([student, teacher], targets, config)
    image = targets.image[target]
    boxes = teacher.boxes[image, queries[1]]
    overlap = iou(cxcywh_to_xyxy(boxes), targets.boxes_xyxy[target])

    divergence = edge_imitation(
        of_student.edge_logits[-1][image, queries[0]].float(),
        of_student.initial_boxes[image, queries[0]].detach(),
        of_teacher.edge_logits[-1][image, queries[1]].float(),
        of_teacher.initial_boxes[image, queries[1]],
        bins,
        config.reg_scale,
        temperature,
    )
    return (divergence * overlap.detach()).sum() / count


def edge_imitation(
    student_logits: Tensor,
    student_initial: Tensor,
    teacher_logits: Tensor,
    teacher_initial: Tensor,
    bins: Tensor,
    reg_scale: float,
    temperature: float = 1.0,
) -> Tensor:
    """Kullback-Leibler divergence of the teacher's edge distributions from the student's, [M]; mean over the four edges.

    A bin is an offset from the initial box, and the two detectors have different ones. So the teacher's bins are first moved
    to where the student sees them.

    Args:
        student_logits, teacher_logits: [M, 4, N].
        student_initial, teacher_initial: [M, 4] cxcywh.
    """
    probabilities = (teacher_logits / temperature).softmax(-1)
    target = moved_distribution(probabilities, teacher_initial, student_initial, bins, reg_scale).detach()
    log_student = F.log_softmax(student_logits / temperature, dim=-1)
    divergence = torch.xlogy(target, target) - target * log_student
    return divergence.sum(-1).mean(-1) * temperature**2


def moved_distribution(
    probabilities: Tensor, from_boxes: Tensor, to_boxes: Tensor, bins: Tensor, reg_scale: float
) -> Tensor:
    """Express distributions over the offsets of one box's edges as distributions over those of another box.

    The mass of a bin is shared by the two bins between which its edge lies, so the expected edge stays where it is as long
    as it is in reach.

    Args:
        probabilities: [M, 4, N].
        from_boxes, to_boxes: [M, 4] cxcywh.
    """
    offsets = bins.unsqueeze(-1).expand(-1, 4)  # [N, 4]
    candidates = decode_boxes(from_boxes.unsqueeze(1), offsets, reg_scale)  # [M, N, 4] cxcywh
    # Edges are independent, so the left one may lie right of the right one: sizes are not clamped.
    centre, half = candidates[..., :2], candidates[..., 2:] / 2
    corners = torch.cat([centre - half, centre + half], dim=-1)
    seen = true_offsets(to_boxes.unsqueeze(1), corners, reg_scale).transpose(1, 2)  # [M, 4, N]
    bracket, share = bracketing_bins(seen, bins)  # [M, 4, N, 2]
    parts = probabilities.unsqueeze(-1) * share
    return torch.zeros_like(probabilities).scatter_add_(-1, bracket.flatten(-2), parts.flatten(-2))


@torch.no_grad()
def _found_by_both(
    outputs: list[DetectorOutput], targets: Targets, config: ModelConfig
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Index of every true box that the last layers of all detectors have a query for, and these queries, [M] each."""
    costs = [
        matching_cost([(output.logits[None].float(), targets.labels)], output.boxes[None], targets, config.loss)
        for output in outputs
    ]
    found = [torch.from_numpy(solve(cost.cpu().numpy(), targets.counts)[0]) for cost in costs]  # [T] each
    target = (torch.stack(found) >= 0).all(0).nonzero().squeeze(1)
    device = targets.labels.device
    return target.to(device), tuple(query[target].to(device) for query in found)
