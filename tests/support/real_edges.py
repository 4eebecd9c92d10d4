"""Outputs of a trained FDR detector on COCO images, from `golden/fdr_real.npz`."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dfine_core.uncertainty import DetectedBoxes, TrueBoxes, edge_std

FILE = Path(__file__).parent.parent / "golden/fdr_real.npz"
REG_SCALE = 4.0


@dataclass(frozen=True)
class RealEdges:
    """M matched detections that scored 0.3 and more; boxes in pixels."""

    bins: Tensor  # [33]
    probabilities: Tensor  # [M, 4, 33] half precision
    reference_boxes: Tensor  # [M, 4] cxcywh
    boxes: Tensor  # [M, 4] xyxy
    true_boxes: Tensor  # [M, 4] xyxy
    scores: Tensor  # [M]

    @property
    def std(self) -> Tensor:
        """Predicted deviations, [M, 4] in pixels."""
        return edge_std(self.probabilities, self.bins, self.reference_boxes, REG_SCALE)


def real_edges() -> RealEdges:
    """Read the matched detections."""
    with np.load(FILE) as arrays:
        rows = arrays["edge_rows"]
        return RealEdges(
            bins=torch.from_numpy(arrays["bins"]),
            probabilities=torch.from_numpy(arrays["edge_probability"]),
            reference_boxes=torch.from_numpy(arrays["edge_reference_box"]),
            boxes=torch.from_numpy(arrays["det_box"][rows]),
            true_boxes=torch.from_numpy(arrays["gt_box"][arrays["det_gt"][rows]]),
            scores=torch.from_numpy(arrays["det_score"][rows]),
        )


def real_detections() -> tuple[DetectedBoxes, TrueBoxes, Tensor]:
    """Read all detections, the ground truth, and the recorded matches: true box, -1 for none, -2 in a crowd."""
    with np.load(FILE) as arrays:
        image, label = arrays["det_image"].astype(np.int64), arrays["det_label"].astype(np.int64)
        detected = DetectedBoxes(
            image=torch.from_numpy(image),
            boxes=torch.from_numpy(arrays["det_box"]),
            labels=torch.from_numpy(label),
            scores=torch.from_numpy(arrays["det_score"]),
        )
        true = TrueBoxes(
            image=torch.from_numpy(arrays["gt_image"].astype(np.int64)),
            boxes=torch.from_numpy(arrays["gt_box"]),
            labels=torch.from_numpy(arrays["gt_label"].astype(np.int64)),
            crowd=torch.from_numpy(arrays["gt_crowd"].astype(bool)),
        )
        return detected, true, torch.from_numpy(arrays["det_gt"].astype(np.int64))
