"""Recorded outputs of a detector on COCO images (`fdr_real.npz`, see edge_uncertainty), read as if it had detected them now."""

import json
from pathlib import Path

import numpy as np
import torch

from dfine_core.uncertainty import DetectedBoxes, edge_interval, edge_std
from pipeline.calibration.measure import MASSES, MeasuredDetections
from pipeline.data.shards.manifest import Category
from pipeline.evaluation.ground_truth import GroundTruth

REG_SCALE = 4.0
LEAST_SCORE = 0.2  # below, detections were recorded only where they found an object


def read_recorded(file: Path, annotations: Path) -> tuple[MeasuredDetections, GroundTruth]:
    """Detections and official boxes of the images that both files have.

    Args:
        annotations: in COCO's format, with its 80 classes.
    """
    truth = coco_ground_truth(annotations)
    with np.load(file) as arrays:
        recorded = {name: arrays[name] for name in arrays.files}
    shared = np.intersect1d(recorded["image_id"], truth.image_id)
    if not len(shared):
        raise SystemExit(f"{file} and {annotations} have no image in common")
    truth = truth.of_images(shared)
    number_of = {int(image_id): number for number, image_id in enumerate(truth.image_id)}
    number = np.array([number_of.get(int(image_id), -1) for image_id in recorded["image_id"]])
    image = number[recorded["det_image"]]
    rows = np.flatnonzero((image >= 0) & (recorded["det_score"] >= LEAST_SCORE))
    initial = torch.from_numpy(recorded["det_reference_box"][rows])
    probabilities = torch.from_numpy(recorded["det_edge_probability"][rows]).float()
    widths = (
        probabilities / probabilities.sum(-1, keepdim=True),
        torch.from_numpy(recorded["bins"]),
        initial,
        REG_SCALE,
    )
    found = DetectedBoxes(
        image=torch.from_numpy(image[rows]),
        boxes=torch.from_numpy(recorded["det_box"][rows]),
        labels=torch.from_numpy(recorded["det_label"][rows].astype(np.int64)),
        scores=torch.from_numpy(recorded["det_score"][rows]),
    )
    intervals = torch.stack([edge_interval(*widths, mass) for mass in MASSES], 1)
    return MeasuredDetections(found, initial, edge_std(*widths), intervals), truth


def coco_ground_truth(annotations: Path) -> GroundTruth:
    """Ground truth of a COCO file; labels are positions among its sorted category ids."""
    content = json.loads(annotations.read_text())
    images = sorted(content["images"], key=lambda image: int(image["id"]))
    categories = sorted(content["categories"], key=lambda category: int(category["id"]))
    label_of = {category["id"]: label for label, category in enumerate(categories)}
    number_of = {image["id"]: number for number, image in enumerate(images)}
    rows = sorted(content["annotations"], key=lambda row: number_of[row["image_id"]])
    box = np.array([row["bbox"] for row in rows], np.float32).reshape(-1, 4)
    box[:, 2:] += box[:, :2]
    return GroundTruth(
        image_id=np.array([image["id"] for image in images], np.int64),
        width=np.array([image["width"] for image in images], np.int32),
        height=np.array([image["height"] for image in images], np.int32),
        file_name=tuple(image["file_name"] for image in images),
        image=np.array([number_of[row["image_id"]] for row in rows], np.int64),
        box=box,
        label=np.array([label_of[row["category_id"]] for row in rows], np.int32),
        area=np.array([row["area"] for row in rows], np.float32),
        crowd=np.array([bool(row["iscrowd"]) for row in rows]),
        categories=tuple(
            Category(label=label, original_id=category["id"], name=category["name"])
            for label, category in enumerate(categories)
        ),
    )
