"""Labels from a teacher: detections of any detector become boxes of the images that nobody has labelled.

A detection with a score of at least `score` is a label whose weight is the score. One from `ignore` up to `score` is a region to
ignore: a crowd region of weight 0. What scores less is background. Images with boxes of their own stay as they are, to the last
box. An image without boxes counts as unlabelled, so an image that is known to be empty must not be among the predicted ones.

Of two labels of one class that are nearly the same box the better one stays. A detection to ignore that lies on a label is
dropped: it is that object once more, and the detector should learn to find it once.
"""

import posixpath
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pydantic import JsonValue

from pipeline import storage
from pipeline.data.prepare.teacher_boxes import (
    Boxes,
    Results,
    box_iou,
    described_categories,
    images_file,
    labels_by_id,
    read_results,
    result_files,
    within,
)
from pipeline.data.prepare.work_plan import PrepareError
from pipeline.data.shards.manifest import Category
from pipeline.data.sources.index import AnnotationIndex, BoxEntry, DatasetSource, ImageEntry

SAME_LABEL_IOU = 0.7  # two labels of one class with this IoU are one
SAME_OBJECT_IOU = 0.5  # a detection to ignore with this IoU to a label is that object


@dataclass(frozen=True)
class PseudoLabels:
    """Detections to label with, and what their scores mean.

    Attributes:
        results: COCO results, or the folder of a `dfine predict`.
        images: file that describes the images of plain results, where their ids are not those of the source.
        score: least score of a label.
        ignore: least score of a region to ignore.

    Raises:
        PrepareError: the scores are not in order.
    """

    results: str
    images: str | None
    score: float
    ignore: float

    def __post_init__(self) -> None:
        if not 0 < self.ignore <= self.score <= 1:
            raise PrepareError(
                f"--ignore {self.ignore:g} --score {self.score:g}: both lie between 0 and 1, and --ignore is not above --score"
            )


def with_pseudo_labels(source: DatasetSource, rule: PseudoLabels) -> DatasetSource:
    """The source with labels of a teacher in its images without boxes.

    Raises:
        PrepareError: there are no such results.
    """
    files = result_files(rule.results)
    if missing := [file for file in files if not storage.exists(file)] or ([] if files else [rule.results]):
        raise PrepareError(f"--pseudo {missing[0]}: there is no such file, and no folder of a dfine predict")
    images = images_file(rule.results, rule.images)

    def fill(index: AnnotationIndex) -> tuple[Category, ...]:
        categories = source.fill(index)
        results = read_results(rule.results, _labels(categories, images, rule.ignore), images, rule.ignore)
        index.add_boxes(_boxes(index, index.without_boxes(), results, rule))
        return categories

    digest: dict[str, JsonValue] = {posixpath.basename(file): storage.sha256(file) for file in files}
    described: dict[str, JsonValue] = {"sha256": digest, "score": rule.score, "ignore": rule.ignore}
    return DatasetSource({**source.description, "pseudo": described}, fill)


def _labels(categories: Sequence[Category], images: str | None, ignore: float) -> dict[int, int]:
    """Label of each category id of the results: by name where their categories have names, else by the source's ids.

    Raises:
        PrepareError: the teacher left out detections that would have to be ignored.
    """
    described = described_categories(images)
    for item in described:
        if isinstance(least := item.get("threshold"), int | float) and least > ignore:
            raise PrepareError(
                f"{images}: {item.get('name')} was predicted with a threshold of {least:g}, and --ignore is {ignore:g}: what lies"
                f" between would count as background; predict again with --threshold {ignore:g}"
            )
    return labels_by_id(categories, described, images)


def _boxes(
    index: AnnotationIndex, entries: Sequence[ImageEntry], results: Results, rule: PseudoLabels
) -> Iterator[BoxEntry]:
    """Boxes of the images without any; what was done is counted in the notices of the index."""
    for entry in entries:
        if not results.knows(entry.image_id, entry.file_name):
            index.notice("pseudo-unseen", entry.file_name)
            continue
        if entry.width is None or entry.height is None:
            if results.described is None:
                raise PrepareError(
                    f"{rule.results}: the source has no sizes of images, so boxes in pixels need them: name the images that the"
                    " teacher saw by --pseudo-images FILE"
                )
            size = 1, 1  # boxes are then fractions of the image
        else:
            size = entry.width, entry.height
        found = within(results.of(entry.image_id, entry.file_name, *size), *size)
        labels, ignored = divided(found, rule.score)
        for code, some in (("pseudo-label", labels), ("pseudo-ignored", ignored)):
            if len(some):
                index.notice(code, entry.file_name, len(some))
        for box, crowd in [*((box, False) for box in labels), *((box, True) for box in ignored)]:
            x1, y1, x2, y2, label, score = map(float, box)
            weight = 0.0 if crowd else score
            yield BoxEntry(entry.image_id, x1, y1, x2, y2, int(label), (x2 - x1) * (y2 - y1), crowd, weight=weight)


def divided(found: Boxes, score: float) -> tuple[Boxes, Boxes]:
    """Divide the detections of an image, [T, 6], into labels and regions to ignore, best first."""
    found = found[np.argsort(-found[:, 5], kind="stable")]
    labels: list[NDArray[np.float32]] = []
    ignored: list[NDArray[np.float32]] = []
    for box in found:
        kept = np.array(labels, np.float32).reshape(-1, 6)
        overlap = box_iou(box, kept)
        if box[5] >= np.float32(score):
            if not ((overlap >= SAME_LABEL_IOU) & (kept[:, 4] == box[4])).any():
                labels.append(box)
        elif not (overlap >= SAME_OBJECT_IOU).any():
            ignored.append(box)
    return np.array(labels, np.float32).reshape(-1, 6), np.array(ignored, np.float32).reshape(-1, 6)
