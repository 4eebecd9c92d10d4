"""Postprocessing of logits and boxes to scored detections in pixels. No threshold, no non-maximum suppression."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dfine_core.boxes import cxcywh_to_xyxy

MAX_DETECTIONS = 300  # per image, over all classes, as published


@dataclass(frozen=True)
class Detections:
    """Best (query, class) pairs of every image, best first; R pairs per image."""

    labels: Tensor  # [B, R] int64
    boxes: Tensor  # [B, R, 4] xyxy, pixels of the original image; may reach over its border
    scores: Tensor  # [B, R] in [0, 1]
    queries: Tensor | None = None  # [B, R] int64, rows of the network's output; None where another program detected


def postprocess(logits: Tensor, boxes: Tensor, original_sizes: Tensor, keep: int = MAX_DETECTIONS) -> Detections:
    """Turn the best (query, class) pairs of every image into boxes in its pixels.

    Args:
        logits: [B, Q, C].
        boxes: [B, Q, 4] cxcywh, normalised.
        original_sizes: [B, 2] (width, height) in pixels.
        keep: pairs per image. A query may appear several times, with different classes.

    Raises:
        ValueError: if there are fewer than `keep` pairs.
    """
    scores, query, labels = best_pairs(logits, keep)
    scale = original_sizes.to(boxes.dtype).repeat(1, 2).unsqueeze(1)
    corners = cxcywh_to_xyxy(boxes) * scale
    return Detections(
        labels=labels,
        boxes=corners.gather(1, query.unsqueeze(-1).expand(-1, -1, 4)),
        scores=scores,
        queries=query,
    )


def best_pairs(logits: Tensor, keep: int) -> tuple[Tensor, Tensor, Tensor]:
    """Select the best pairs of every image: scores, queries and labels, [B, keep] each; arguments as of `postprocess`."""
    _, queries, classes = logits.shape
    if queries * classes < keep:
        raise ValueError(f"keep ({keep}) exceeds the {queries} queries x {classes} classes there are: lower it")
    scores, index = logits.float().sigmoid().flatten(1).topk(keep, dim=1)
    query = torch.div(index, classes, rounding_mode="floor")
    return scores, query, index - query * classes
