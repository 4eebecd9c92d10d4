"""Drawn images with their boxes, written to disk in the layouts that labelling tools export."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from pipeline.data.shards.records import ImageRecord
from pipeline.data.sources.synthetic import CLASSES
from tests.support.synthetic_shards import synthetic_records

Splits = Mapping[str, Sequence[ImageRecord]]


def drawn_splits(**counts: int) -> dict[str, list[ImageRecord]]:
    """Drawn images for each split, with boxes in all of them and without crowd regions."""
    splits: dict[str, list[ImageRecord]] = {}
    for seed, (name, count) in enumerate(counts.items()):
        drawn = synthetic_records(3 * count + 8, longest_side=64, seed=seed)
        splits[name] = [record for record in drawn if len(record.labels) and not record.crowd.any()][:count]
        assert len(splits[name]) == count
    return splits


def coco_json(path: Path, records: Sequence[ImageRecord], folder: str = "") -> None:
    images, annotations = [], []
    for number, record in enumerate(records, start=1):
        name = f"{folder}{number}.jpg"
        images.append({"id": number, "file_name": name, "width": record.width, "height": record.height})
        for (left, top, right, bottom), label in zip(record.boxes.tolist(), record.labels.tolist(), strict=True):
            box = [left, top, right - left, bottom - top]
            row = {"id": len(annotations) + 1, "image_id": number, "category_id": label + 1, "bbox": box, "iscrowd": 0}
            annotations.append({**row, "area": box[2] * box[3]})
    categories = [{"id": label + 1, "name": name} for label, name in enumerate(CLASSES)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"info": {}, "images": images, "annotations": annotations, "categories": categories}))


def images(folder: Path, records: Sequence[ImageRecord]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number, record in enumerate(records, start=1):
        (folder / f"{number}.jpg").write_bytes(record.image)


def yolo_labels(folder: Path, records: Sequence[ImageRecord]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number, record in enumerate(records, start=1):
        lines = []
        for (left, top, right, bottom), label in zip(record.boxes.tolist(), record.labels.tolist(), strict=True):
            centre = (left + right) / 2 / record.width, (top + bottom) / 2 / record.height
            size = (right - left) / record.width, (bottom - top) / record.height
            lines.append(" ".join([f"{label}", *(f"{value:.9f}" for value in (*centre, *size))]))
        (folder / f"{number}.txt").write_text("\n".join(lines))


def coco(root: Path, splits: Splits) -> None:
    for split, records in splits.items():
        images(root / f"{split}2017", records)
        coco_json(root / f"annotations/instances_{split}2017.json", records)


def roboflow_coco(root: Path, splits: Splits) -> None:
    for split, records in splits.items():
        folder = root / ("valid" if split == "val" else split)
        images(folder, records)
        coco_json(folder / "_annotations.coco.json", records)


def label_studio_coco(root: Path, splits: Splits) -> None:
    (records,) = splits.values()
    images(root / "images", records)
    coco_json(root / "result.json", records, "images/")


def yolo(root: Path, splits: Splits) -> None:
    for split, records in splits.items():
        images(root / "images" / split, records)
        yolo_labels(root / "labels" / split, records)
    lines = [f"{split}: images/{split}" for split in splits]
    (root / "data.yaml").write_text("\n".join([*lines, f"names: [{', '.join(CLASSES)}]"]))


def roboflow_yolo(root: Path, splits: Splits) -> None:
    lines = []
    for split, records in splits.items():
        name = "valid" if split == "val" else split
        images(root / name / "images", records)
        yolo_labels(root / name / "labels", records)
        lines.append(f"{split}: ../{name}/images")
    (root / "data.yaml").write_text("\n".join([*lines, f"names: [{', '.join(CLASSES)}]", f"nc: {len(CLASSES)}"]))


def label_studio_yolo(root: Path, splits: Splits) -> None:
    (records,) = splits.values()
    images(root / "images", records)
    yolo_labels(root / "labels", records)
    (root / "classes.txt").write_text("\n".join(CLASSES))


def voc(root: Path, splits: Splits) -> None:
    """Pascal VOC; its pixels are counted from 1."""
    number = 0
    for split, records in splits.items():
        names = []
        for record in records:
            number += 1
            names.append(f"{number}")
            for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
                (root / folder).mkdir(parents=True, exist_ok=True)
            (root / f"JPEGImages/{number}.jpg").write_bytes(record.image)
            (root / f"Annotations/{number}.xml").write_text(_voc_xml(f"{number}.jpg", record))
        (root / f"ImageSets/Main/{split}.txt").write_text("\n".join(names))


def _voc_xml(name: str, record: ImageRecord) -> str:
    objects = []
    for box, label in zip(record.boxes.tolist(), record.labels.tolist(), strict=True):
        corners = zip(("xmin", "ymin", "xmax", "ymax"), (box[0] + 1, box[1] + 1, box[2], box[3]), strict=True)
        inner = "".join(f"<{key}>{value}</{key}>" for key, value in corners)
        objects.append(f"<object><name>{CLASSES[label]}</name><bndbox>{inner}</bndbox></object>")
    size = f"<size><width>{record.width}</width><height>{record.height}</height></size>"
    return f"<annotation><filename>{name}</filename>{size}{''.join(objects)}</annotation>"


LAYOUTS: dict[str, Callable[[Path, Splits], None]] = {
    "COCO": coco,
    "VOC": voc,
    "YOLO": yolo,
    "Roboflow COCO": roboflow_coco,
    "Roboflow YOLO": roboflow_yolo,
    "Label Studio COCO": label_studio_coco,
    "Label Studio YOLO": label_studio_yolo,
}
WITHOUT_SPLITS = {"Label Studio COCO", "Label Studio YOLO"}
