"""Likely label errors: where a detector that has not learned these images disagrees with their boxes, the surest first.

missing   a confident detection with no box near it
extra     a box that no detection supports, of a class and size that the detector mostly finds
class     a box on which the detector is sure of another class
edges     a box with an edge outside the interval that holds 99 % of the true edges
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.ops import box_iou, nms

from dfine_core.uncertainty import UNMATCHED, match_for_calibration
from dfine_core.uncertainty.detector_calibration import DetectorCalibration
from pipeline.calibration.measure import MASSES, MeasuredDetections, true_boxes
from pipeline.evaluation.ground_truth import GroundTruth

Kind = Literal["missing", "extra", "class", "edges"]
KINDS: tuple[Kind, ...] = get_args(Kind)
LEAST_CONFIDENCE = 0.5  # of a suspect in the list
MATCH = 0.4  # IoU from which a detection of the same class is one of the box, maybe with other edges
NEAR = 0.3  # IoU from which a detection of any class speaks for a box, or a box for a detection
SAME = 0.5  # IoU of two detections of one object, and of a box of another class
FOUND = 0.3  # confidence of a detection from which its box counts as found
LEAST_EDGE_PX, LEAST_EDGE_SHARE = (
    1.5,
    0.03,
)  # edges closer than this, or this share of the side, are drawn alike by people
OWN, CALIBRATED = MASSES.index(0.99), MASSES.index(0.95)
AREAS = (32.0**2, 96.0**2)  # px^2, limits of small, medium and large boxes, as in COCO
EDGES = ("left", "top", "right", "bottom")

Corners = tuple[float, float, float, float]


@dataclass(frozen=True)
class Suspect:
    """A likely label error."""

    kind: Kind
    confidence: float  # that it is one, in [0, 1]; for the order, not a measured probability
    number: int  # of the image, in the order of the shards
    image_id: int
    file_name: str
    box: int | None  # index of the box in its row; None if it is missing
    labelled: str | None  # class of that box
    annotated: Corners | None  # that box, xyxy in pixels
    detected: str | None  # class of the best detection there
    suggested: Corners | None  # that detection
    detail: str

    def to_plain(self) -> dict[str, Any]:
        """Plain values, for JSON and CSV."""
        return asdict(self)


def find_suspects(
    measured: MeasuredDetections,
    truth: GroundTruth,
    calibration: DetectorCalibration | None = None,
    *,
    least: float = LEAST_CONFIDENCE,
) -> list[Suspect]:
    """Compare detections with the annotated boxes; the surest suspects come first.

    Args:
        measured: detections in all images of `truth`, with the detector's own scores.
        calibration: makes probabilities of the scores, and widens or narrows the intervals of edges.
        least: confidence of the suspects that are returned.
    """
    confidence = measured.found.scores if calibration is None else calibration.scores(measured.found.scores)
    boxes = true_boxes(truth)
    match = match_for_calibration(measured.found, boxes, MATCH)
    scene = _Scene(measured, truth, confidence, match)
    found = [*_missing(scene, least), *_unsupported(scene, least), *_edges(scene, calibration, least)]
    return sorted(found, key=lambda suspect: -suspect.confidence)


class _Scene:
    """Detections and boxes of all images, and the overlaps within each image."""

    def __init__(self, measured: MeasuredDetections, truth: GroundTruth, confidence: Tensor, match: Tensor) -> None:
        self.measured, self.truth, self.confidence, self.match = measured, truth, confidence, match
        self.boxes = torch.tensor(truth.box).reshape(-1, 4)
        self.labels = torch.tensor(truth.label, dtype=torch.int64)
        self.counted = ~torch.tensor(truth.ignored)
        self.first_box = np.searchsorted(truth.image, np.arange(len(truth.image_id) + 1))
        order = measured.found.image.argsort(stable=True)
        bounds = torch.searchsorted(measured.found.image[order], torch.arange(len(truth.image_id) + 1))
        self._rows, self._bounds = order, bounds.tolist()

    def images(self) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
        """Number of each image, its detections [D], its counted boxes [G] as indices, and their IoU [D, G]."""
        for number, (start, stop) in enumerate(zip(self._bounds, self._bounds[1:], strict=False)):
            detections = self._rows[start:stop]
            inside = torch.arange(int(self.first_box[number]), int(self.first_box[number + 1]))
            inside = inside[self.counted[inside]]
            yield number, detections, inside, box_iou(self.measured.found.boxes[detections], self.boxes[inside])

    def suspect(
        self, kind: Kind, confidence: float, number: int, detail: str, *, box: int | None, detection: int | None
    ) -> Suspect:
        """Describe a suspect by the indices of its box and its detection."""
        names = self.truth.names
        return Suspect(
            kind=kind,
            confidence=round(float(confidence), 4),
            number=number,
            image_id=int(self.truth.image_id[number]),
            file_name=self.truth.file_name[number],
            box=None if box is None else box - int(self.first_box[number]),
            labelled=None if box is None else names[int(self.labels[box])],
            annotated=None if box is None else _corners(self.boxes[box]),
            detected=None if detection is None else names[int(self.measured.found.labels[detection])],
            suggested=None if detection is None else _corners(self.measured.found.boxes[detection]),
            detail=detail,
        )


class _Support(NamedTuple):
    """What the detector says of one box: the highest confidence of each kind near it, and the detection that has it."""

    number: int  # image
    box: int
    best: float  # of any class
    nearest: int  # its detection; -1: none
    own: float  # of the labelled class
    rival: float  # of another class, on the same object
    other: int  # its detection; -1: none


def _missing(scene: _Scene, least: float) -> Iterator[Suspect]:
    """Confident detections with no box near them, each object once."""
    found = scene.measured.found
    for number, detections, _, overlap in scene.images():
        near = overlap.amax(1) if overlap.shape[1] else torch.zeros(len(detections))
        sure = (scene.confidence[detections] >= least) & (scene.match[detections] == UNMATCHED) & (near < NEAR)
        alone = detections[sure]
        for row in alone[nms(found.boxes[alone], scene.confidence[alone], SAME)].tolist():
            score = float(scene.confidence[row])
            detail = f"{scene.truth.names[int(found.labels[row])]} found with {score:.2f}, and no box is near"
            yield scene.suspect("missing", score, number, detail, box=None, detection=row)


def _unsupported(scene: _Scene, least: float) -> Iterator[Suspect]:
    """Boxes without a detection, and boxes on which another class is found."""
    found, names = scene.measured.found, scene.truth.names
    cases: list[_Support] = []
    for number, detections, inside, overlap in scene.images():
        score = scene.confidence[detections].unsqueeze(1)  # [D, 1]
        own_class = found.labels[detections].unsqueeze(1) == scene.labels[inside]  # [D, G]
        nothing = torch.zeros(1, len(inside))  # stands for no detection
        any_class = torch.cat([torch.where(overlap >= NEAR, score, 0.0), nothing])
        own = torch.cat([torch.where((overlap >= MATCH) & own_class, score, 0.0), nothing]).amax(0)
        rival, which = torch.cat([torch.where((overlap >= SAME) & ~own_class, score, 0.0), nothing]).max(0)
        best, nearest = any_class.max(0)
        rows = [*detections.tolist(), -1]
        for column, box in enumerate(inside.tolist()):
            cases.append(
                _Support(
                    number,
                    box,
                    best=float(best[column]),
                    nearest=rows[int(nearest[column])],
                    own=float(own[column]),
                    rival=float(rival[column]),
                    other=rows[int(which[column])],
                )
            )
    recall = _recall([case.box for case in cases], [case.best for case in cases], scene)
    for case, share in zip(cases, recall, strict=True):
        name = names[int(scene.labels[case.box])]
        swapped, extra = case.rival * (1 - case.own), (1 - case.best) * share
        if swapped >= max(least, extra):
            rival_name = names[int(found.labels[case.other])]
            detail = f"labelled {name}, found as {rival_name} with {case.rival:.2f} and as {name} with {case.own:.2f}"
            yield scene.suspect("class", swapped, case.number, detail, box=case.box, detection=case.other)
        elif extra >= least:
            detail = f"no detection of this {name} above {case.best:.2f}; {share:.0%} of the {name} boxes of its size are found"
            nearest_row = case.nearest if case.best > 0 else None
            yield scene.suspect("extra", extra, case.number, detail, box=case.box, detection=nearest_row)


def _recall(boxes: Sequence[int], best: Sequence[float], scene: _Scene) -> NDArray[np.float64]:
    """Share of found boxes among those of the same class and size, for every box; one found and one missed are added."""
    corners = scene.boxes[list(boxes)].double().numpy()
    area = (corners[:, 2] - corners[:, 0]) * (corners[:, 3] - corners[:, 1])
    group = scene.labels[list(boxes)].numpy() * (len(AREAS) + 1) + np.digitize(area, AREAS)
    groups = int(group.max(initial=0)) + 1
    number = np.bincount(group, minlength=groups)
    is_found = np.bincount(group, np.asarray(best) >= FOUND, minlength=groups)
    return np.asarray(((is_found + 1) / (number + 2))[group], np.float64)


def _edges(scene: _Scene, calibration: DetectorCalibration | None, least: float) -> Iterator[Suspect]:
    """Boxes with an edge outside the interval, by how far outside it is."""
    measured = scene.measured
    rows = ((scene.match >= 0) & (scene.confidence >= least)).nonzero().squeeze(1)
    detected, true = measured.found.boxes[rows], scene.boxes[scene.match[rows]]
    sides = (true[:, 2:] - true[:, :2]).repeat(1, 2)
    reach = _reach(measured, calibration, rows, true)
    reach = reach.clamp(min=LEAST_EDGE_PX).maximum(LEAST_EDGE_SHARE * sides)
    error = (true - detected).abs()
    # 0 at the end of the interval, towards 1 far from it: by Chebyshev, the tail falls at least as the distance squared.
    ratio, edge = (reach / error.clamp(min=1e-6)).min(1)
    outside = (1 - ratio.square()).clamp(min=0)
    confidence = scene.confidence[rows] * outside
    for n in (confidence >= least).nonzero().squeeze(1).tolist():
        row, box = int(rows[n]), int(scene.match[rows[n]])
        which = int(edge[n])
        detail = (
            f"{EDGES[which]} edge {float(error[n, which]):.1f} px from the detected one, where 99 % lie within"
            f" {float(reach[n, which]):.1f} px"
        )
        number = int(measured.found.image[row])
        yield scene.suspect("edges", float(confidence[n]), number, detail, box=box, detection=row)


def _reach(measured: MeasuredDetections, calibration: DetectorCalibration | None, rows: Tensor, true: Tensor) -> Tensor:
    """Length of the 99 % interval from each detected edge towards the annotated one, [M, 4] px.

    Without a calibration it is the distribution's own. The largest coverage that is calibrated is 95 %; its half-width is
    stretched as the own interval grows from 95 % to 99 %.
    """
    own = measured.intervals[rows, OWN]  # [M, 4, 2]
    if calibration is None:
        detected = measured.found.boxes[rows]
        return torch.where(true < detected, detected - own[..., 0], own[..., 1] - detected).clamp(min=0)
    narrow = measured.intervals[rows, CALIBRATED].diff(dim=-1).squeeze(-1)
    stretch = own.diff(dim=-1).squeeze(-1) / narrow.clamp(min=1e-6)
    return calibration.at(0.95).half_width(measured.std[rows], measured.found.labels[rows]) * stretch


def _corners(box: Tensor) -> Corners:
    left, top, right, bottom = (round(value, 2) for value in box.tolist())
    return left, top, right, bottom
