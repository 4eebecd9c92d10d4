"""YOLO source: a data.yaml and one label file per image.

`train`, `val` and `test` of the YAML file name a folder of images, a file that lists images, or several of them, relative to
its `path`. The label file of an image is found by replacing `images` in its path by `labels`; an image without a label file has
no objects. A line is `class cx cy width height` in fractions of the image, or a class and the corners of a polygon, which is
converted to its bounding box.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from pydantic import JsonValue

from pipeline.data.shards.manifest import Category
from pipeline.data.shards.records import Rejection
from pipeline.data.sources.index import AnnotationIndex, BoxEntry, DatasetSource, ImageEntry, SourceError, read_text

IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})


def yolo_source(data_yaml: Path, split: str) -> DatasetSource:
    """Source of one split of a data.yaml, such as "train"."""
    try:
        content = yaml.safe_load(read_text(data_yaml))
    except FileNotFoundError:
        raise SourceError(f"{data_yaml}: no such file") from None
    except yaml.YAMLError as error:
        raise SourceError(f"{data_yaml}: not valid YAML: {error}") from None
    if not isinstance(content, dict):
        raise SourceError(f"{data_yaml}: expected keys such as `names` and `{split}`")
    categories = _yolo_categories(data_yaml, content.get("names"))
    root = (data_yaml.absolute().parent / str(content.get("path") or ".")).resolve()
    images = _image_files(data_yaml, root, content, split)
    digest = hashlib.sha256()
    for path in images:
        digest.update(f"{_display_name(path, root)}\n".encode())
        digest.update(_label_text(path).encode())

    def fill(index: AnnotationIndex) -> tuple[Category, ...]:
        for number, path in enumerate(images, start=1):
            index.add_images([ImageEntry(number, str(path), _display_name(path, root), None, None)])
            index.add_boxes(_yolo_boxes(_label_text(path), number, len(categories), index))
        return categories

    description: dict[str, JsonValue] = {
        "kind": "yolo",
        "split": split,
        "data": data_yaml.name,
        "labels_sha256": digest.hexdigest(),
    }
    return DatasetSource(description, fill)


def _yolo_categories(data_yaml: Path, names: Any) -> tuple[Category, ...]:
    if isinstance(names, list):
        names = dict(enumerate(names))
    if not isinstance(names, dict) or not names or not all(isinstance(key, int) for key in names):
        raise SourceError(f"{data_yaml}: names is {names!r}; expected a list, or a mapping from class number to name")
    if sorted(names) != list(range(len(names))):
        raise SourceError(f"{data_yaml}: names has class numbers {sorted(names)}; expected 0..{len(names) - 1}")
    return tuple(Category(label=k, original_id=k, name=str(names[k]).strip()) for k in range(len(names)))


def _image_files(data_yaml: Path, root: Path, content: dict[str, Any], split: str) -> list[Path]:
    """All images of the split, sorted, each once."""
    entries = content.get(split)
    if not entries:
        known = ", ".join(key for key in ("train", "val", "test") if content.get(key)) or "none"
        raise SourceError(f"{data_yaml}: no split {split!r}; available: {known}")
    images: set[Path] = set()
    for entry in [entries] if isinstance(entries, str) else entries:
        path = root / entry
        # Exported sets often have ../train/images and mean train/images.
        path = path if path.exists() else root / str(entry).removeprefix("../")
        if path.is_dir():
            images.update(file for file in path.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
        elif path.is_file():
            listed = [line.strip() for line in read_text(path).splitlines() if line.strip()]
            images.update(path.parent / line if line.startswith("./") else root / line for line in listed)
        else:
            raise SourceError(f"{data_yaml}: {split}: {root / entry} does not exist")
    if not images:
        raise SourceError(f"{data_yaml}: {split}: no images in {entries}")
    return sorted(images)


def _display_name(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name


def _label_text(image: Path) -> str:
    """Content of the label file of an image; empty if there is none."""
    parts = list(image.parts[:-1])
    if "images" in parts:
        parts[len(parts) - 1 - parts[::-1].index("images")] = (
            "labels"  # the last one: a parent folder may have the same name
        )
    path = Path(*parts, f"{image.stem}.txt")
    return read_text(path) if path.is_file() else ""


def _yolo_boxes(text: str, number: int, classes: int, index: AnnotationIndex) -> Iterator[BoxEntry]:
    """Yield boxes and areas in fractions of the image; lines that cannot be used go to `index.reject`."""
    for line in text.splitlines():
        if not line.strip():
            continue
        try:
            label, *values = (float(value) for value in line.split())
        except ValueError:
            label, values = -1.0, []
        if label not in range(classes) and values:
            index.reject(Rejection(number, None, "box", "unknown category", line[:200]))
        elif len(values) == 4:
            cx, cy, width, height = values
            x1, y1, x2, y2 = cx - width / 2, cy - height / 2, cx + width / 2, cy + height / 2
            yield BoxEntry(number, x1, y1, x2, y2, int(label), width * height, False)
        elif len(values) >= 6 and len(values) % 2 == 0:
            xs, ys = values[::2], values[1::2]
            x1, y1, x2, y2 = min(xs), min(ys), max(xs), max(ys)
            yield BoxEntry(number, x1, y1, x2, y2, int(label), (x2 - x1) * (y2 - y1), False)
        else:
            index.reject(Rejection(number, None, "box", "malformed box", line[:200]))
