"""Uncertainty of the edges of detections, in pixels: deviations, and intervals by a calibration or by the distributions alone."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dfine_core.config import IntervalKind
from dfine_core.image_detections import RawDetections
from dfine_core.uncertainty.detector_calibration import DetectorCalibration
from dfine_core.uncertainty.edges import edge_interval, edge_std


@dataclass(frozen=True, eq=False)
class DetectedEdges:
    """Reader of the edges of one detector's detections."""

    bins: Tensor  # [N]
    reg_scale: float
    calibration: DetectorCalibration | None

    def kind(self, coverage: float, joint: bool = False) -> IntervalKind:
        """Source of intervals of a coverage: conformal ones if it was fitted, else the distributions' own.

        Args:
            coverage: share of true edges inside; `joint`: of boxes with all four edges inside.

        Raises:
            ValueError: the coverage lies outside (0, 1), or is a joint one that was not fitted: the distributions of a box's
                edges do not tell how their errors go together.
        """
        if not 0 < coverage < 1:
            raise ValueError(f"coverage ({coverage:g}) must lie between 0 and 1: it is the share of true edges inside")
        if self.calibration is not None and self.calibration.find(coverage, joint=joint) is not None:
            return "conformal"
        if joint:
            raise ValueError(
                f"joint intervals of {100 * coverage:g} % need a calibration, and {self._known(joint=True)}: run"
                " dfine calibrate, or ask for intervals of single edges"
            )
        return "own"

    def text(self, coverage: float, joint: bool = False) -> str:
        """Intervals of a coverage as text, with their origin; raises as `kind` does."""
        share = f"{100 * coverage:g} % of the " + ("true boxes with all four edges" if joint else "true edges")
        if self.kind(coverage, joint) == "conformal":
            assert self.calibration is not None
            return f"{share}, conformal, fitted on {self.calibration.images} images"
        return f"{share}, by the distributions alone: {self._known()}"

    def _known(self, *, joint: bool = False) -> str:
        fitted = () if self.calibration is None else self.calibration.fitted(joint=joint)
        known = ", ".join(f"{each.coverage:g}" for each in fitted)
        return f"the calibration has {known}" if known else "the detector has no calibration"

    def widths(self, raw: RawDetections, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Standard deviation of every edge, and side of the initial box across it: [K, 4] each.

        Args:
            chosen: [K] int64, some of the detections.
        """
        probabilities, initial = _distributions(raw, chosen)
        std = edge_std(probabilities, self.bins, initial, self.reg_scale)
        return std.cpu(), torch.cat([initial[:, 2:]] * 2, -1).cpu()

    def measure(
        self, raw: RawDetections, chosen: Tensor, coverage: float | None, joint: bool = False
    ) -> tuple[Tensor, Tensor | None, IntervalKind | None]:
        """Deviations [K, 4], intervals [K, 4, 2] as coordinates, and their source; without a coverage the first alone.

        Raises:
            ValueError: as of `kind`.
        """
        kind = None if coverage is None else self.kind(coverage, joint)
        probabilities, initial = _distributions(raw, chosen)
        widths = (probabilities, self.bins, initial, self.reg_scale)
        std = edge_std(*widths).cpu()
        if coverage is None or kind is None:
            return std, None, None
        if self.calibration is None or (fitted := self.calibration.find(coverage, joint=joint)) is None:
            return std, edge_interval(*widths, coverage).cpu(), kind
        boxes, half = raw.boxes[chosen].float(), fitted.half_width(std, raw.labels[chosen])
        return std, torch.stack([boxes - half, boxes + half], -1), kind


def _distributions(raw: RawDetections, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities [K, 4, N] and initial boxes [K, 4] cxcywh in pixels."""
    assert raw.queries is not None
    assert raw.edge_logits is not None
    assert raw.initial_boxes is not None
    rows = raw.queries[chosen.to(raw.queries.device)]
    scale = raw.size.to(raw.initial_boxes).repeat(2)
    return raw.edge_logits[rows].float().softmax(-1), raw.initial_boxes[rows].float() * scale
