"""Ground truth and detections without images: small ones to compute by hand, random ones to compare programs on."""

from collections.abc import Sequence

import numpy as np

from pipeline.data.shards.manifest import Category
from pipeline.evaluation.detections import DetectionTable
from pipeline.evaluation.ground_truth import GroundTruth

Box = tuple[float, float, float, float]  # xyxy
BOX: Box = (10, 10, 50, 50)
AWAY: Box = (200, 200, 240, 240)


def ground_truth_of(*images: Sequence[tuple[int, Box]], classes: int = 3, crowd: Sequence[int] = ()) -> GroundTruth:
    """Images 100, 101, ... with (label, box) each; `crowd` counts through all boxes."""
    rows = [(image, label, box) for image, boxes in enumerate(images) for label, box in boxes]
    box = np.array([row[2] for row in rows], np.float32).reshape(-1, 4)
    return GroundTruth(
        image_id=np.arange(100, 100 + len(images), dtype=np.int64),
        width=np.full(len(images), 300, np.int32),
        height=np.full(len(images), 300, np.int32),
        file_name=tuple(f"{number}.jpg" for number in range(len(images))),
        image=np.array([row[0] for row in rows], np.int64),
        box=box,
        label=np.array([row[1] for row in rows], np.int32),
        area=(box[:, 2:] - box[:, :2]).prod(1),
        crowd=np.isin(np.arange(len(rows)), crowd),
        categories=tuple(Category(label=k, original_id=10 * k + 7, name=f"class {k}") for k in range(classes)),
    )


def detections_of(*rows: tuple[int, int, float, Box]) -> DetectionTable:
    """Detections (image id, label, score, box)."""
    return DetectionTable(
        image_id=np.array([row[0] for row in rows], np.int64),
        label=np.array([row[1] for row in rows], np.int32),
        score=np.array([row[2] for row in rows], np.float32),
        box=np.array([row[3] for row in rows], np.float32).reshape(-1, 4),
    )


def random_scene(seed: int, *, images: int = 40, classes: int = 6) -> tuple[GroundTruth, DetectionTable]:
    """Boxes of all sizes, crowd regions, empty images, a class without boxes; detections good and bad, tied and inverted."""
    random = np.random.default_rng(seed)
    counts = random.integers(0, 6, images)
    total = int(counts.sum())
    low = random.uniform(0, 200, (total, 2))
    size = random.choice([12, 50, 120], (total, 1)) * random.uniform(0.5, 1.5, (total, 2))
    box = np.concatenate([low, low + size], axis=1).astype(np.float32)
    label = random.integers(0, classes - 1, total).astype(np.int32)  # the last class has no ground truth
    ground_truth = GroundTruth(
        image_id=7 * np.arange(images, dtype=np.int64),
        width=np.full(images, 400, np.int32),
        height=np.full(images, 400, np.int32),
        file_name=tuple(f"{number}.jpg" for number in range(images)),
        image=np.repeat(np.arange(images), counts),
        box=box,
        label=label,
        area=(size.prod(1) * random.uniform(0.4, 1, total)).astype(np.float32),
        crowd=random.random(total) < 0.1,
        categories=tuple(Category(label=k, original_id=10 * k + 7, name=f"class {k}") for k in range(classes)),
    )
    source = np.repeat(np.arange(total), random.integers(0, 8, total))
    noisy = box[source] + random.normal(0, 0.1, (len(source), 4)) * np.tile(size[source], 2)
    noisy[::50] = noisy[::50][:, [2, 1, 0, 3]]
    guess = np.where(random.random(len(source)) < 0.8, label[source], random.integers(0, classes, len(source)))
    return ground_truth, DetectionTable(
        image_id=ground_truth.image_id[ground_truth.image[source]],
        label=guess.astype(np.int32),
        score=random.random(len(source)).round(2).astype(np.float32),
        box=noisy.astype(np.float32),
    )
