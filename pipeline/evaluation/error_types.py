"""TIDE's split of the lost AP50 by kind of error, in two parts.

A worker finds the errors in its own images: they depend on all classes there, but on no other image. The AP50 that a correction
gains depends on one class in all images. Between the two, a row of 9 bytes stands for a detection.

hotcoco computes the same numbers from all detections at once, with about 800 bytes for each. Tests compare with it.

Source: Bolya et al., arXiv:2008.08115.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import hotcoco
import numpy as np
from numpy.typing import NDArray

from pipeline.evaluation.detections import DetectionTable
from pipeline.evaluation.exchange import Rows
from pipeline.evaluation.ground_truth import LARGEST_AREA, GroundTruth

FOREGROUND_IOU, BACKGROUND_IOU = 0.5, 0.1
MOST_DETECTIONS = 100  # per image and class, as for AP
PAIRS = 1 << 17  # (detection, true box) pairs compared at once: their arrays stay in the processor's cache

# Kinds of a detection: the false positives first, then those that a correction makes right, and the others.
CLASSIFICATION, LOCALISATION, BOTH, DUPLICATE, BACKGROUND = range(5)
RELOCATED, RELABELLED, RIGHT, IGNORED = range(5, 9)
ERROR_TYPES = ("classification", "localisation", "both", "duplicate", "background", "missed")
ERROR_ROW = np.dtype([("image", "<i4"), ("score", "<f4"), ("kind", "i1")])


@dataclass(frozen=True)
class Errors:
    """TIDE at IoU 0.5 (0.1 for background): number of each error, and the AP50 gained if it alone were corrected.

    A false positive is one of five: *classification* — it covers a box of another class; *localisation* — it overlaps a box of
    its class, but below 0.5; *both*; *duplicate* — a better detection has the box; *background* — there is no object. *missed* is
    a true box that no false positive of the first two kinds accounts for.
    """

    gain: dict[str, float]  # AP50 gained, in [0, 1], averaged over classes with true boxes; by `ERROR_TYPES`
    count: dict[str, int]


@dataclass(frozen=True)
class ImageErrors:
    """Errors in some images: a row for each detection that counts, in its class, and one more where it would be right."""

    label: NDArray[np.int32]  # [n]
    rows: Rows  # [n] of `ERROR_ROW`; images by their index in `GroundTruth.ordered_ids`
    count: NDArray[np.int64]  # [5] false positives by kind
    accounted: NDArray[np.int64]  # [K] true boxes that are found, or that an error accounts for; the others are missed


@dataclass(frozen=True)
class SortedBoxes:
    """True boxes by image, crowd regions last, then by class."""

    start: NDArray[np.int64]  # [I + 1] first box of every image in `GroundTruth.ordered_ids`
    box: NDArray[np.float64]  # [4, T] xyxy, contiguous by coordinate
    label: NDArray[np.int32]  # [T]
    crowd: NDArray[np.bool_]  # [T]
    ignored: NDArray[np.bool_]  # [T] see `GroundTruth.ignored`


def sorted_boxes(ground_truth: GroundTruth) -> SortedBoxes:
    """Sort the true boxes."""
    image = ground_truth.indices_of(ground_truth.image_id)[ground_truth.image]
    order = np.lexsort((ground_truth.label, ground_truth.crowd, image))
    return SortedBoxes(
        start=np.searchsorted(image[order], np.arange(len(ground_truth.image_id) + 1)),
        box=np.ascontiguousarray(ground_truth.box[order].T, np.float64),
        label=ground_truth.label[order],
        crowd=ground_truth.crowd[order],
        ignored=ground_truth.ignored[order],
    )


def find_errors(boxes: SortedBoxes, image: NDArray[np.int64], table: DetectionTable, classes: int) -> ImageErrors:
    """Find the errors in some images.

    Args:
        image: [D] index of the image of each detection in `GroundTruth.ordered_ids`.
        table: all detections in these images.
    """
    # 1. The kind of every detection that counts, and the box at which an error was aimed.
    order = _best_of_each_image(image, table, classes)
    image, table = image[order], table[order]
    kind, found, target = _kinds(boxes, image, table)
    count = np.bincount(kind, minlength=IGNORED + 1)[: BACKGROUND + 1]

    # 2. Errors aimed at a box that nothing else finds: the best of each becomes right if corrected.
    aimed = np.flatnonzero(target >= 0)
    aimed = aimed[~found[target[aimed]] & ~boxes.ignored[target[aimed]]]
    aimed = aimed[np.lexsort((-table.score[aimed], target[aimed]))]
    best = aimed[_firsts(target[aimed])]
    kind[best[kind[best] == LOCALISATION]] = RELOCATED
    relabelled = best[kind[best] == CLASSIFICATION]
    found[target[aimed]] = True

    # 3. Rows in the detections' classes, and in the classes where they would be right.
    kept = np.flatnonzero(kind != IGNORED)
    rows = np.empty(len(kept) + len(relabelled), ERROR_ROW)
    chosen = np.concatenate([kept, relabelled])
    rows["image"], rows["score"] = image[chosen], table.score[chosen]
    rows["kind"] = np.concatenate([kind[kept], np.full(len(relabelled), RELABELLED, np.int8)])
    return ImageErrors(
        label=np.concatenate([table.label[kept], boxes.label[target[relabelled]]]),
        rows=rows,
        count=count,
        accounted=np.bincount(boxes.label[found & ~boxes.ignored], minlength=classes),
    )


def class_gains(
    label: NDArray[np.int32], rows: Rows, counted: NDArray[np.int64], missed: NDArray[np.int64], classes: range
) -> NDArray[np.float64]:
    """Compute the AP50 gained in each of k adjacent classes, [6, k]; 0 in classes without true boxes.

    Args:
        label: [n] classes of the rows, from all images.
        counted: [K] number of true boxes.
        missed: [K] number of missed boxes.
    """
    by_class = np.argsort(label, kind="stable")
    bounds = np.searchsorted(label[by_class], np.arange(classes.start, classes.stop + 1))
    gains = np.zeros((len(ERROR_TYPES), len(classes)))
    for index, one in enumerate(classes):
        if counted[one]:
            own = rows[by_class[bounds[index] : bounds[index + 1]]]
            gains[:, index] = _gains(own, int(counted[one]), int(missed[one]))
    return gains


def errors_of(count: NDArray[np.int64], gains: NDArray[np.float64], counted: NDArray[np.int64]) -> Errors:
    """Average the gains of all classes.

    Args:
        count: [6] number of each error.
        gains: [6, K] from `class_gains`.
        counted: [K] number of true boxes.
    """
    with_boxes = max(int((counted > 0).sum()), 1)
    return Errors(
        gain={name: float(row.sum() / with_boxes) for name, row in zip(ERROR_TYPES, gains, strict=True)},
        count={name: int(number) for name, number in zip(ERROR_TYPES, count, strict=True)},
    )


def _firsts(values: NDArray[Any]) -> NDArray[np.bool_]:
    """[n] values that differ from the one before."""
    firsts = np.ones(len(values), np.bool_)
    firsts[1:] = values[1:] != values[:-1]
    return firsts


def _best_of_each_image(image: NDArray[np.int64], table: DetectionTable, classes: int) -> NDArray[np.intp]:
    """Order of the detections by image, class and descending score, without those that COCO leaves out."""
    group = image * classes + table.label
    order = np.lexsort((-table.score, group))
    firsts = _firsts(group[order])
    rank = np.arange(len(order)) - np.flatnonzero(firsts)[firsts.cumsum() - 1]
    return order[rank < MOST_DETECTIONS]


def _kinds(
    boxes: SortedBoxes, image: NDArray[np.int64], table: DetectionTable
) -> tuple[NDArray[np.int8], NDArray[np.bool_], NDArray[np.int64]]:
    """Kind of every detection [D]; the boxes that are found [T]; the box at which an error was aimed [D], or -1."""
    area = (table.box[:, 2:].astype(np.float64) - table.box[:, :2]).prod(1)
    kind = np.where((area < 0) | (area > LARGEST_AREA), IGNORED, BACKGROUND).astype(np.int8)
    found, target = np.zeros(len(boxes.label), np.bool_), np.full(len(kind), -1)
    for rows in _blocks(boxes.start[image + 1] - boxes.start[image]):
        overlaps = _Overlaps.of(boxes, image[rows], table.label[rows], table.box[rows])
        overlaps.match(kind[rows], boxes, found)
        overlaps.classify(kind[rows], boxes, target[rows])
    return kind, found, target


def _blocks(pairs: NDArray[np.int64]) -> Iterator[slice]:
    """Cut the detections so that each block has about `PAIRS` pairs."""
    total = pairs.cumsum()
    targets = np.arange(PAIRS, int(pairs.sum()) + PAIRS, PAIRS)
    ends = np.minimum(np.searchsorted(total, targets) + 1, len(pairs)).tolist()
    for start, end in zip([0, *ends], [*ends, len(pairs)], strict=True):
        if start < end:
            yield slice(start, end)


@dataclass(frozen=True)
class _Overlaps:
    """Overlaps of d detections with all true boxes in their images, as p pairs; pairs of a detection are adjacent."""

    detection: NDArray[np.int64]  # [p] 0..d-1, ascending
    box: NDArray[np.int64]  # [p] 0..T-1
    iou: NDArray[np.float64]  # [p] for crowd regions the fraction of the detection inside
    same: NDArray[np.bool_]  # [p] the classes are equal

    @classmethod
    def of(
        cls, boxes: SortedBoxes, image: NDArray[np.int64], label: NDArray[np.int32], box: NDArray[np.float32]
    ) -> "_Overlaps":
        """Compute the overlaps, exactly as COCO's programs do."""
        counts = boxes.start[image + 1] - boxes.start[image]
        detection = np.repeat(np.arange(len(image)), counts)
        skipped = boxes.start[image] - (counts.cumsum() - counts)
        true = np.arange(len(detection)) + np.repeat(skipped, counts)
        corners = box.T.astype(np.float64)
        left, top, right, bottom = (boxes.box[side][true] for side in range(4))
        mine_left, mine_top, mine_right, mine_bottom = (corners[side][detection] for side in range(4))
        width = np.minimum(right, mine_right) - np.maximum(left, mine_left)
        height = np.minimum(bottom, mine_bottom) - np.maximum(top, mine_top)
        inside = np.where((width > 0) & (height > 0), width * height, 0.0)
        mine = (mine_right - mine_left) * (mine_bottom - mine_top)
        union = np.where(boxes.crowd[true], mine, mine + (right - left) * (bottom - top) - inside)
        iou = np.divide(inside, union, out=np.zeros_like(inside), where=inside > 0)
        return cls(detection, true, iou, boxes.label[true] == label[detection])

    def match(self, kind: NDArray[np.int8], boxes: SortedBoxes, found: NDArray[np.bool_]) -> None:
        """Match each detection with the best box of its class that is still free: into `kind` and `found`."""
        pairs = np.flatnonzero(self.same & (self.iou >= FOREGROUND_IOU))
        candidates = zip(
            self.detection[pairs].tolist(),
            self.box[pairs].tolist(),
            self.iou[pairs].tolist(),
            boxes.ignored[self.box[pairs]].tolist(),
            boxes.crowd[self.box[pairs]].tolist(),
            strict=True,
        )
        taken: set[int] = set(self.box[pairs][found[self.box[pairs]]].tolist())
        matches: dict[int, tuple[int, float, bool]] = {}
        previous = -1
        for detection, box, iou, ignored, crowd in candidates:
            if detection != previous and previous in matches:
                taken.add(matches[previous][0])
            previous = detection
            if box in taken and not crowd:
                continue
            best = matches.get(detection)
            # A box that counts comes before one that is ignored, and the later of two equal ones wins.
            if best is not None and ((ignored and not best[2]) or iou < best[1]):
                continue
            matches[detection] = box, iou, ignored
        for detection, (box, _, ignored) in matches.items():
            kind[detection] = IGNORED if ignored else RIGHT
            found[box] = True

    def classify(self, kind: NDArray[np.int8], boxes: SortedBoxes, target: NDArray[np.int64]) -> None:
        """Find the kind of each false positive, and the box at which a classification or localisation error was aimed."""
        if not len(self.detection):
            return
        starts = np.flatnonzero(_firsts(self.detection))
        rows = self.detection[starts]
        same_iou = np.where(self.same, self.iou, 0.0)
        other_iou = np.where(self.same | boxes.crowd[self.box], 0.0, self.iou)
        own, other = np.zeros((2, len(kind)))
        own[rows], other[rows] = np.maximum.reduceat(same_iou, starts), np.maximum.reduceat(other_iou, starts)

        wrong = kind == BACKGROUND
        near = wrong & (own >= BACKGROUND_IOU) & (own <= FOREGROUND_IOU)
        elsewhere = wrong & ~near & (other >= FOREGROUND_IOU)
        rest = wrong & ~near & ~elsewhere
        kind[near] = LOCALISATION
        kind[elsewhere] = CLASSIFICATION
        kind[rest & (own >= FOREGROUND_IOU)] = DUPLICATE
        kind[rest & (own < FOREGROUND_IOU) & (other > BACKGROUND_IOU)] = BOTH

        # The first of the boxes with the largest overlap.
        for chosen, iou, largest in ((near, same_iou, own), (elsewhere, other_iou, other)):
            hits = np.flatnonzero(chosen[self.detection] & (iou == largest[self.detection]))
            hits = hits[_firsts(self.detection[hits])]
            target[self.detection[hits]] = self.box[hits]


def _gains(rows: Rows, boxes: int, missed: int) -> list[float]:
    """AP50 gained by each correction in one class."""
    # Best first; a relabelled detection comes after those of the class with the same score.
    kind = rows["kind"]
    order = np.lexsort((rows["image"], kind == RELABELLED, -rows["score"]))
    score, kind = rows["score"][order].astype(np.float64), kind[order]
    right, relabelled, relocated = kind == RIGHT, kind == RELABELLED, kind == RELOCATED

    def ap(right: NDArray[np.bool_], without: NDArray[np.bool_], boxes: int) -> float:
        return hotcoco.metrics.average_precision(score, right, boxes, without)

    base = ap(right, relabelled, boxes)
    corrected = {
        CLASSIFICATION: (right | relabelled, kind == CLASSIFICATION),
        LOCALISATION: (right | relocated, relabelled | (kind == LOCALISATION)),
        **{wrong: (right, relabelled | (kind == wrong)) for wrong in (BOTH, DUPLICATE, BACKGROUND)},
    }
    gains = [ap(*corrected[wrong], boxes) - base for wrong in range(BACKGROUND + 1)]
    return [*gains, ap(right, relabelled, boxes - missed) - base if missed else 0.0]
