"""Pre-labels of chosen images as files that labelling tools open: COCO, YOLO, or tasks of Label Studio."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote
from xml.sax.saxutils import quoteattr

import numpy as np
from numpy.typing import NDArray

from pipeline.data.shards.manifest import Category
from pipeline.drawing import css_colour
from pipeline.labelling.plan import Format

IMAGES_FOLDER, LABELS_FOLDER = "images", "labels"
COCO_FILE, YOLO_FILE, TASKS_FILE, CONFIG_FILE = "annotations.json", "data.yaml", "tasks.json", "label_config.xml"
DECIMALS = 2  # of pixels


@dataclass(frozen=True, eq=False)
class PreLabelled:
    """A chosen image with the boxes that a person will correct, inside the image and not empty."""

    image_id: int
    file: str  # name in the folder of images
    width: int  # px, upright
    height: int
    boxes: NDArray[np.float32]  # [K, 4] xyxy in pixels
    labels: NDArray[np.int32]  # [K]
    scores: NDArray[np.float32]  # [K]


def clipped(
    boxes: NDArray[np.float32], labels: NDArray[np.int32], scores: NDArray[np.float32], width: int, height: int
) -> tuple[NDArray[np.float32], NDArray[np.int32], NDArray[np.float32]]:
    """Boxes limited to the image, without those that are empty then: annotation tools know no others."""
    inside = np.round(boxes.clip(0, [width, height, width, height]), DECIMALS).astype(np.float32)
    kept = (inside[:, 2:] > inside[:, :2]).all(1)
    return inside[kept], labels[kept], scores[kept]


def prelabel_files(images: Sequence[PreLabelled], categories: Sequence[Category], form: Format) -> dict[str, bytes]:
    """Content of every file by its path in the folder of the selection; the images themselves lie in `IMAGES_FOLDER`."""
    if form == "yolo":
        return _yolo(images, categories)
    if form == "label-studio":
        return _label_studio(images, categories)
    return {COCO_FILE: _coco(images, categories)}


def _coco(images: Sequence[PreLabelled], categories: Sequence[Category]) -> bytes:
    annotations: list[dict[str, Any]] = []
    for image in images:
        for box, label, score in zip(image.boxes.tolist(), image.labels.tolist(), image.scores.tolist(), strict=True):
            width, height = (round(box[2 + n] - box[n], DECIMALS) for n in (0, 1))
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image.image_id,
                    "category_id": categories[label].original_id,
                    "bbox": [round(box[0], DECIMALS), round(box[1], DECIMALS), width, height],
                    "area": round(width * height, DECIMALS),
                    "iscrowd": 0,
                    "segmentation": [],
                    "score": round(score, 4),
                }
            )
    content = {
        "info": {"description": "pre-labels, to be corrected"},
        "images": [
            {"id": image.image_id, "file_name": image.file, "width": image.width, "height": image.height}
            for image in images
        ],
        "annotations": annotations,
        "categories": [{"id": category.original_id, "name": category.name} for category in categories],
    }
    return json.dumps(content, indent=1).encode()


def _yolo(images: Sequence[PreLabelled], categories: Sequence[Category]) -> dict[str, bytes]:
    # JSON strings are YAML strings too, so that no name needs quoting rules of its own.
    names = "".join(f"  {category.label}: {json.dumps(category.name)}\n" for category in categories)
    files = {YOLO_FILE: f"path: .\ntrain: {IMAGES_FOLDER}\nnames:\n{names}".encode()}
    for image in images:
        size = np.array([image.width, image.height], np.float64)
        boxes = image.boxes.astype(np.float64)
        centre, sides = (boxes[:, :2] + boxes[:, 2:]) / 2 / size, (boxes[:, 2:] - boxes[:, :2]) / size
        rows = zip(image.labels.tolist(), np.hstack([centre, sides]).tolist(), strict=True)
        lines = [" ".join([f"{label}", *(f"{value:.7f}" for value in row)]) for label, row in rows]
        stem = image.file.rpartition(".")[0]
        files[f"{LABELS_FOLDER}/{stem}.txt"] = "".join(f"{line}\n" for line in lines).encode()
    return files


def _label_studio(images: Sequence[PreLabelled], categories: Sequence[Category]) -> dict[str, bytes]:
    """Tasks with predictions, and the labelling interface that they refer to. Images are served as local files."""
    labels = "\n".join(
        f"    <Label value={quoteattr(category.name)} background={quoteattr(css_colour(category.label))}/>"
        for category in categories
    )
    config = (
        '<View>\n  <Image name="image" value="$image"/>\n  <RectangleLabels name="label" toName="image">\n'
        f"{labels}\n  </RectangleLabels>\n</View>\n"
    )
    tasks = [
        {
            "id": image.image_id,
            "data": {"image": f"/data/local-files/?d={quote(f'{IMAGES_FOLDER}/{image.file}')}"},
            "predictions": [{"model_version": "pre-labels", "result": _regions(image, categories)}],
        }
        for image in images
    ]
    return {TASKS_FILE: json.dumps(tasks, indent=1).encode(), CONFIG_FILE: config.encode()}


def _regions(image: PreLabelled, categories: Sequence[Category]) -> list[dict[str, Any]]:
    """Boxes of one image in percent of its sides."""
    percent = 100 / np.array([image.width, image.height] * 2, np.float64)
    rows = zip((image.boxes * percent).tolist(), image.labels.tolist(), image.scores.tolist(), strict=True)
    return [
        {
            "id": f"{image.image_id}-{number}",
            "type": "rectanglelabels",
            "from_name": "label",
            "to_name": "image",
            "original_width": image.width,
            "original_height": image.height,
            "image_rotation": 0,
            "score": round(score, 4),
            "value": {
                "x": left,
                "y": top,
                "width": right - left,
                "height": bottom - top,
                "rotation": 0,
                "rectanglelabels": [categories[label].name],
            },
        }
        for number, ((left, top, right, bottom), label, score) in enumerate(rows)
    ]
