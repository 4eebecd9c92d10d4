"""Detections matched to true boxes as COCO matches them: greedily, best score first, within image and class."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dfine_core.boxes import area, iou_and_union

UNMATCHED, CROWD = -1, -2  # in place of the index of a true box
PAIRS = 1 << 22  # (detection, true box) pairs compared at once


@dataclass(frozen=True)
class DetectedBoxes:
    """Detections of several images, in any order."""

    image: Tensor  # [D] int64
    boxes: Tensor  # [D, 4] xyxy
    labels: Tensor  # [D] int64
    scores: Tensor  # [D]


@dataclass(frozen=True)
class TrueBoxes:
    """Ground truth of several images, in any order."""

    image: Tensor  # [G] int64
    boxes: Tensor  # [G, 4] xyxy, in the unit of the detections
    labels: Tensor  # [G] int64
    crowd: Tensor | None = None  # [G] bool, regions that hide detections instead of being found


def match_for_calibration(detections: DetectedBoxes, ground_truth: TrueBoxes, iou: float = 0.5) -> Tensor:
    """Find the true box of every detection: [D] int64 indices into `ground_truth`.

    `UNMATCHED` is a false positive. `CROWD` is a detection inside a crowd region, which counts as neither true nor false.

    Args:
        iou: least overlap of a match. With a crowd region: least share of the detection that lies inside.
    """
    detection, truth, overlap = _candidates(detections, ground_truth, iou)
    order = _best_first(detections.scores, detection, overlap, truth)
    match = torch.full((len(detections.scores),), UNMATCHED, dtype=torch.int64)
    crowd = _is_crowd(ground_truth)

    found: list[int] = match.tolist()
    taken = [False] * len(ground_truth.labels)
    pairs = list(zip(detection[order].tolist(), truth[order].tolist(), crowd[truth[order]].tolist(), strict=True))
    for row, target, is_crowd in pairs:
        if not is_crowd and found[row] == UNMATCHED and not taken[target]:
            found[row], taken[target] = target, True
    for row, _, is_crowd in pairs:
        if is_crowd and found[row] == UNMATCHED:
            found[row] = CROWD
    return torch.tensor(found, dtype=torch.int64)


def _is_crowd(ground_truth: TrueBoxes) -> Tensor:
    return torch.zeros(len(ground_truth.labels), dtype=torch.bool) if ground_truth.crowd is None else ground_truth.crowd


def _best_first(scores: Tensor, detection: Tensor, overlap: Tensor, truth: Tensor) -> Tensor:
    """Order of pairs by falling score, then falling overlap; of equal overlaps the last true box, as in pycocotools."""
    order = truth.argsort(descending=True, stable=True)
    order = order[overlap[order].argsort(descending=True, stable=True)]
    rank = torch.empty_like(scores, dtype=torch.int64)
    rank[scores.argsort(descending=True, stable=True)] = torch.arange(len(scores))
    return order[rank[detection[order]].argsort(stable=True)]


def _candidates(detections: DetectedBoxes, ground_truth: TrueBoxes, least: float) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs of one image and class that overlap enough: detection, true box and overlap, [P] each."""
    if not len(ground_truth.labels) or not len(detections.labels):
        nothing = torch.zeros(0, dtype=torch.int64)
        return nothing, nothing, torch.zeros(0, dtype=torch.float64)
    classes = 1 + max(int(detections.labels.max()), int(ground_truth.labels.max()))
    key = ground_truth.image * classes + ground_truth.labels
    by_key = key.argsort(stable=True)
    wanted = detections.image * classes + detections.labels
    start = torch.searchsorted(key[by_key], wanted)
    count = torch.searchsorted(key[by_key], wanted, right=True) - start

    crowd = _is_crowd(ground_truth)
    parts = []
    ends = count.cumsum(0)
    for chunk in range(int(ends[-1]) // PAIRS + 1):
        rows = ((ends - count) // PAIRS == chunk).nonzero().squeeze(1)
        detection = rows.repeat_interleave(count[rows])
        first = (ends - count)[detection] - ((ends - count)[rows[0]] if len(rows) else 0)
        truth = by_key[start[detection] + torch.arange(len(detection)) - first]
        overlap = _overlap(detections.boxes[detection], ground_truth.boxes[truth], crowd[truth])
        enough = overlap >= least
        parts.append((detection[enough], truth[enough], overlap[enough]))
    detection, truth, overlap = (torch.cat(column) for column in zip(*parts, strict=True))
    return detection, truth, overlap


def _overlap(detected: Tensor, true: Tensor, crowd: Tensor) -> Tensor:
    """IoU [P]; with crowd regions the share of the detection inside."""
    detected, true = detected.double(), true.double()
    iou, union = iou_and_union(detected, true)
    return torch.where(crowd, iou * union / area(detected).clamp(min=1e-12), iou)
