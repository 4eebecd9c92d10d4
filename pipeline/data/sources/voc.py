"""Pascal VOC source: one XML per image, lists of images under `ImageSets/Main`.

VOC counts pixels from 1 and includes both ends: (xmin, xmax) covers xmin - 1 to xmax on a continuous axis. Many tools
write the same XML with ordinary coordinates; `one_based=False` reads those. In both, xmax <= xmin is an
annotation error and not a box. Difficult objects become crowd regions: ignored in training and in evaluation.

The classes are the names in all annotations of the folder, sorted, so every split has the same labels.
"""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from xml.etree import ElementTree

from pydantic import JsonValue

from pipeline.data.shards.manifest import Category
from pipeline.data.shards.records import Rejection
from pipeline.data.sources.folders import read_text
from pipeline.data.sources.index import AnnotationIndex, BoxEntry, DatasetSource, ImageEntry, SourceError


def voc_source(root: Path, image_set: str, *, classes: Sequence[str] = (), one_based: bool = True) -> DatasetSource:
    """Source of one list of images.

    Args:
        root: folder with Annotations, ImageSets/Main and JPEGImages.
        image_set: name of the list in ImageSets/Main, such as "train".
        classes: class names in label order; by default all names that occur, sorted.
        one_based: True if pixels are counted from 1 with both ends included.
    """
    root = root.absolute()
    listing = root / "ImageSets" / "Main" / f"{image_set}.txt"
    if not listing.is_file():
        known = ", ".join(sorted(path.stem for path in listing.parent.glob("*.txt"))) or "none"
        raise SourceError(f"{listing}: no such list; available: {known}")
    names = [line.split()[0] for line in read_text(listing).splitlines() if line.strip()]
    files = sorted((root / "Annotations").glob("*.xml"))
    digest = hashlib.sha256("\n".join(names).encode())
    occurring: set[str] = set()
    for path in files:
        text = path.read_bytes()
        digest.update(text)
        occurring.update(_object_names(_parse_xml(path, text)))
    chosen = tuple(classes) or tuple(sorted(occurring))
    if not chosen:
        raise SourceError(
            f"{root / 'Annotations'}: no objects in {len(files)} XML files, so the classes are unknown: name them with --classes"
        )

    def fill(index: AnnotationIndex) -> tuple[Category, ...]:
        labels = {name: label for label, name in enumerate(chosen)}
        for number, name in enumerate(names, start=1):
            path = root / "Annotations" / f"{name}.xml"
            if not path.is_file():
                index.reject(Rejection(number, name, "image", "missing annotation", f"{path.name} does not exist"))
                continue
            annotation = _parse_xml(path, path.read_bytes())
            index.add_images([_image_entry(annotation, number, name, root / "JPEGImages")])
            index.add_boxes(_voc_boxes(annotation, number, labels, one_based, index))
        return tuple(Category(label=label, original_id=label, name=name) for name, label in labels.items())

    description: dict[str, JsonValue] = {
        "kind": "voc",
        "root": root.name,
        "image_set": image_set,
        "one_based": one_based,
        "classes": list(chosen),
        "annotations_sha256": digest.hexdigest(),
    }
    return DatasetSource(description, fill)


def _parse_xml(path: Path, text: bytes) -> ElementTree.Element:
    try:
        return ElementTree.fromstring(text)
    except ElementTree.ParseError as error:
        raise SourceError(f"{path}: not valid XML: {error}") from None


def _object_names(annotation: ElementTree.Element) -> Iterator[str]:
    return (item.findtext("name", "").strip() for item in annotation.iterfind("object"))


def _image_entry(annotation: ElementTree.Element, number: int, name: str, folder: Path) -> ImageEntry:
    """The image of an annotation. Its file is named after the list entry; the XML only gives the suffix."""
    file_name = name + (Path(annotation.findtext("filename", "")).suffix or ".jpg")
    size = annotation.findtext("size/width"), annotation.findtext("size/height")
    if size[0] is None or size[1] is None:
        raise SourceError(f"{name}.xml: no size/width and size/height")
    return ImageEntry(number, str(folder / file_name), file_name, int(float(size[0])), int(float(size[1])))


def _voc_boxes(
    annotation: ElementTree.Element, number: int, labels: dict[str, int], one_based: bool, index: AnnotationIndex
) -> Iterator[BoxEntry]:
    for item in annotation.iterfind("object"):
        name = item.findtext("name", "").strip()
        corners = [item.findtext(f"bndbox/{key}", "nan") for key in ("xmin", "ymin", "xmax", "ymax")]
        detail = f"{name} {', '.join(corners)}"
        try:
            x1, y1, x2, y2 = (float(corner) for corner in corners)
        except ValueError:
            index.reject(Rejection(number, None, "box", "malformed box", detail))
            continue
        if name not in labels:
            index.reject(Rejection(number, None, "box", "unknown category", detail))
        elif not (x2 > x1 and y2 > y1):
            index.reject(Rejection(number, None, "box", "degenerate box", detail))
        else:
            x1, y1 = (x1 - 1, y1 - 1) if one_based else (x1, y1)
            crowd = item.findtext("difficult", "0").strip() == "1"
            yield BoxEntry(number, x1, y1, x2, y2, labels[name], (x2 - x1) * (y2 - y1), crowd)
