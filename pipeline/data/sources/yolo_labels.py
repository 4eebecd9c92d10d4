"""Label files of YOLO images: where they lie, and what their rows mean.

The label file of an image lies in a folder `labels` in the place of `images` (also `JPEGImages` and the like, in any case of
letters), in a folder `labels` beside or below that of the image, or beside the image itself.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from pipeline.data.shards.records import Rejection
from pipeline.data.sources.folders import IMAGE_FOLDERS, LABEL_FOLDERS, files_by_stem, normal, sub_folders
from pipeline.data.sources.index import AnnotationIndex, BoxEntry

NO_LABELS = frozenset({"classes", "train", "val", "valid", "test", "readme", "notes", "obj", "names", "labels"})


class KeypointShape(NamedTuple):
    """Keypoints of every row: their number, and 2 or 3 values for each."""

    points: int
    values: int


def label_folders(folder: Path) -> list[Path]:
    """Folders in which labels of the images of a folder may lie, the likeliest first."""
    found: list[Path] = []
    parts = folder.parts
    for depth in range(len(parts) - 1, 0, -1):
        # The last part of such a name: a parent folder may have the same one.
        if parts[depth].lower() in IMAGE_FOLDERS:
            found += (path.joinpath(*parts[depth + 1 :]) for path in sub_folders(Path(*parts[:depth]), LABEL_FOLDERS))
            break
    found += sub_folders(folder.parent, LABEL_FOLDERS)
    found += sub_folders(folder, LABEL_FOLDERS)
    return [*dict.fromkeys(found), folder]


def find_labels(images: list[Path]) -> dict[Path, Path]:
    """Label file of every image that has one."""
    places = {folder: label_folders(folder) for folder in {image.parent for image in images}}
    listings = {folder: files_by_stem(folder, ".txt") for folders in places.values() for folder in folders}
    labels = {}
    for image in images:
        found = (listings[folder].get(normal(image.stem)) for folder in places[image.parent])
        if (label := next(filter(None, found), None)) is not None:
            labels[image] = label
    return labels


def labels_without_image(labels: dict[Path, Path]) -> list[Path]:
    """Label files, in the folders that hold labels of these images, beside which no image of any split is."""
    owners: dict[Path, set[Path]] = {}
    for image, label in labels.items():
        owners.setdefault(label.parent, set()).add(image.parent)
    orphans = []
    for folder, image_folders in sorted(owners.items()):
        known = {
            normal(path.stem) for place in image_folders for path in _files_of(place) if path.suffix.lower() != ".txt"
        }
        every = files_by_stem(folder, ".txt")
        orphans += [path for stem, path in every.items() if stem not in known and stem.lower() not in NO_LABELS]
    return orphans


def _files_of(folder: Path) -> Iterator[Path]:
    return (path for path in folder.iterdir() if not path.is_dir())


def read_rows(
    text: str, number: int, classes: int, keypoints: KeypointShape | None, index: AnnotationIndex, file: str
) -> Iterator[BoxEntry]:
    """Yield boxes and areas in fractions of the image; rows that cannot be used go to `index.reject`.

    Args:
        number: id of the image.
        classes: number of classes.
        keypoints: of every row, if the data set has some.
        file: name of the label file, for what is noticed.
    """
    for line in text.splitlines():
        if not line.strip():
            continue
        try:
            label, *values = (float(value) for value in line.split())
        except ValueError:
            label, values = -1.0, []
        if label not in range(classes) and values:
            index.reject(Rejection(number, None, "box", "unknown category", line[:200]))
        elif len(values) == 4 or (keypoints is not None and len(values) == 4 + keypoints.points * keypoints.values):
            cx, cy, width, height = values[:4]
            x1, y1, x2, y2 = cx - width / 2, cy - height / 2, cx + width / 2, cy + height / 2
            yield BoxEntry(number, x1, y1, x2, y2, int(label), width * height, False)
        elif keypoints is None and len(values) >= 6 and len(values) % 2 == 0:
            if _may_be_a_pose(values):
                index.notice("row-ambiguous", f"{file}: {line[:80]}")
            xs, ys = values[::2], values[1::2]
            x1, y1, x2, y2 = min(xs), min(ys), max(xs), max(ys)
            yield BoxEntry(number, x1, y1, x2, y2, int(label), (x2 - x1) * (y2 - y1), False)
        else:
            index.reject(Rejection(number, None, "box", "malformed box", f"{len(values)} numbers: {line[:180]}"))


def _may_be_a_pose(values: list[float]) -> bool:
    """True if the row also reads as a box with keypoints in it, of 2 or 3 values each."""
    cx, cy, width, height = values[:4]
    left, top, right, bottom = cx - width / 2, cy - height / 2, cx + width / 2, cy + height / 2
    if width <= 0 or height <= 0 or left < -0.01 or top < -0.01 or right > 1.01 or bottom > 1.01:
        return False
    for size in (2, 3):
        rest = values[4:]
        points = [rest[k : k + size] for k in range(0, len(rest), size)]
        if len(rest) % size or any(size == 3 and point[2] not in (0, 1, 2) for point in points):
            continue
        seen = [(x, y) for x, y, *_ in points if (x, y) != (0, 0)]  # points that are not seen are at 0, 0
        if seen and all(left <= x <= right and top <= y <= bottom for x, y in seen):
            return True
    return False
