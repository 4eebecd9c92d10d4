"""Boxes of a teacher as a second target set: every stage is matched to them too, and a score says how much a box counts.

The terms are those of the true boxes, on the same matching queries of every stage: scores, L1, GIoU and, in decoder layers,
edges. Each stage keeps its own matches: the GO union, DDF and denoising are for true boxes alone.

Source: Teach-DETR, arXiv:2211.11953.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dfine_core.boxes import cxcywh_to_xyxy, iou_and_giou
from dfine_core.config import ModelConfig
from dfine_core.loss import losses
from dfine_core.loss.matching import ClassGroups, matching_cost, solve
from dfine_core.model.distribution import true_offsets
from dfine_core.structures import DetectorOutput, QueryPredictions, Targets

UNMATCHED = 0.5  # weight of a query that no box of the teacher took; the boxes' own is their score


@dataclass(frozen=True)
class _Pairs:
    """Own matches of S stages, [S, M]; `stage` is [S, 1]."""

    stage: Tensor
    image: Tensor
    query: Tensor
    target: Tensor


def teacher_box_losses(
    output: DetectorOutput,
    targets: Targets,
    scores: Tensor,
    bins: Tensor,
    count: Tensor,
    config: ModelConfig,
    unmatched: float = UNMATCHED,
) -> dict[str, Tensor]:
    """Weighted terms, each a sum over all stages: vfl or mal, bbox, giou and fgl.

    Args:
        targets: boxes of the teacher, T in the batch.
        scores: [T] in 0..1.
        bins: [N] values of W(n).
        count: [] boxes of the teacher in a micro-batch, averaged over all of the step, at least 1.
        unmatched: weight of the queries without a box.
    """
    matching = output.matching
    if matching is None or output.encoder_logits is None or output.encoder_boxes is None:
        raise ValueError("the loss needs the output of a detector in training mode: call detector.train() first")
    groups = _class_groups(output, matching, targets, config)
    boxes = torch.cat([matching.boxes, matching.initial_boxes[None], output.encoder_boxes[None]])
    pairs = _own_matches(groups, boxes, targets, config)

    predicted = boxes[pairs.stage, pairs.image, pairs.query]  # [S, M, 4]
    ious, gious = iou_and_giou(cxcywh_to_xyxy(predicted), targets.boxes_xyxy[pairs.target])
    ious = ious.detach()
    p = scores[pairs.target]  # [S, M]
    weights = config.loss
    terms = {
        weights.classification: _score_loss(groups, pairs, ious, p, config, unmatched)
        * (weights.vfl if weights.classification == "vfl" else weights.mal),
        "bbox": (p * (predicted - targets.boxes[pairs.target]).abs().sum(-1)).sum() * weights.bbox,
        "giou": (p * (1 - gious)).sum() * weights.giou,
    }
    if matching.edge_logits is not None:
        terms["fgl"] = _edge_loss(matching, matching.edge_logits, pairs, targets, ious, p, bins, config) * weights.fgl
    return {name: value / count for name, value in terms.items()}


def _class_groups(
    output: DetectorOutput, matching: QueryPredictions, targets: Targets, config: ModelConfig
) -> ClassGroups:
    """Logits of all stages, with labels: one group, or two where the encoder has a class of its own."""
    assert output.encoder_logits is not None
    logits = torch.cat([matching.logits, matching.initial_logits[None]]).float()
    encoder = output.encoder_logits[None].float()
    if config.query_selection == "agnostic":
        return [(logits, targets.labels), (encoder, torch.zeros_like(targets.labels))]
    return [(torch.cat([logits, encoder]), targets.labels)]


@torch.no_grad()
def _own_matches(groups: ClassGroups, boxes: Tensor, targets: Targets, config: ModelConfig) -> _Pairs:
    cost = matching_cost(groups, boxes, targets, config.loss)
    query_of = torch.from_numpy(solve(cost.cpu().numpy(), targets.counts))  # [S, T]
    # Every stage matches as many boxes of an image as any other.
    target = (query_of >= 0).nonzero()[:, 1].reshape(len(boxes), -1)
    query = query_of.gather(1, target).to(boxes.device)
    target = target.to(boxes.device)
    stage = torch.arange(len(boxes), device=boxes.device).unsqueeze(1)
    return _Pairs(stage, targets.image[target], query, target)


def _score_loss(
    groups: ClassGroups, pairs: _Pairs, ious: Tensor, p: Tensor, config: ModelConfig, unmatched: float
) -> Tensor:
    """VFL or MAL of all stages, where the row of a query counts as much as the score of its box."""
    total = p.new_zeros(())
    first = 0
    for logits, labels in groups:
        rows = slice(first, first + len(logits))
        first += len(logits)
        place = (pairs.stage[: len(logits)], pairs.image[rows], pairs.query[rows])
        entries, hits = losses.classification_loss(
            logits, (*place, labels[pairs.target[rows]]), ious[rows], config.loss
        )
        weight = torch.full_like(entries, unmatched)
        weight[place] = p[rows]
        total = total + (entries * weight).sum() - (hits * p[rows]).sum()
    return total


def _edge_loss(
    matching: QueryPredictions,
    edge_logits: Tensor,
    pairs: _Pairs,
    targets: Targets,
    ious: Tensor,
    p: Tensor,
    bins: Tensor,
    config: ModelConfig,
) -> Tensor:
    layers = len(edge_logits)
    stage, image, query = pairs.stage[:layers], pairs.image[:layers], pairs.query[:layers]
    true_xyxy = targets.boxes_xyxy[pairs.target[:layers]]
    offsets = true_offsets(matching.initial_boxes.detach()[image, query], true_xyxy, config.reg_scale)
    per_pair = losses.fine_grained_localization_loss(
        edge_logits.float()[stage, image, query], offsets, bins, ious[:layers]
    )
    return (per_pair * p[:layers]).sum()
