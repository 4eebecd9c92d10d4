"""Pascal VOC: one XML per image, lists of images under `ImageSets/Main`.

VOC counts pixels from 1 and includes both ends: (xmin, xmax) covers xmin - 1 to xmax on a continuous axis. Many tools
write the same XML with ordinary coordinates; `one_based=False` reads those. In both, xmax <= xmin is a slip of the
annotator and not a box. Difficult objects become crowd regions: not trained on, and not counted in evaluation.

The classes are the names in all annotations of the folder, sorted, so every split has the same labels.
"""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from xml.etree import ElementTree

from pydantic import JsonValue

from pipeline.data.shards.manifest import Category
from pipeline.data.shards.records import Rejection
from pipeline.data.sources.index import AnnotationIndex, BoxEntry, ImageEntry, Source, SourceError, read_text


def voc_source(root: Path, image_set: str, *, classes: Sequence[str] = (), one_based: bool = True) -> Source:
    """One list of images.

    Args:
        root: folder with Annotations, ImageSets/Main and JPEGImages.
        image_set: name of the list in ImageSets/Main, such as "train".
        classes: names in the order of their labels; by default all names that occur, sorted.
        one_based: pixels are counted from 1, both ends included.
    """
    root = root.absolute()
    listing = root / "ImageSets" / "Main" / f"{image_set}.txt"
    if not listing.is_file():
        known = ", ".join(sorted(path.stem for path in listing.parent.glob("*.txt"))) or "none"
        raise SourceError(f"{listing}: there is no such list; there are: {known}")
    names = [line.split()[0] for line in read_text(listing).splitlines() if line.strip()]
    files = sorted((root / "Annotations").glob("*.xml"))
    digest = hashlib.sha256("\n".join(names).encode())
    found: set[str] = set()
    for path in files:
        text = path.read_bytes()
        digest.update(text)
        found.update(_names(_parse(path, text)))
    chosen = tuple(classes) or tuple(sorted(found))
    if not chosen:
        raise SourceError(f"{root / 'Annotations'}: no objects in {len(files)} XML files, so no classes; name them")

    def fill(index: AnnotationIndex) -> tuple[Category, ...]:
        labels = {name: label for label, name in enumerate(chosen)}
        for number, name in enumerate(names, start=1):
            path = root / "Annotations" / f"{name}.xml"
            if not path.is_file():
                index.reject(Rejection(number, name, "image", "missing annotation", f"{path.name} does not exist"))
                continue
            annotation = _parse(path, path.read_bytes())
            index.add_images([_image(annotation, number, name, root / "JPEGImages")])
            index.add_boxes(_boxes(annotation, number, labels, one_based, index))
        return tuple(Category(label=label, original_id=label, name=name) for name, label in labels.items())

    description: dict[str, JsonValue] = {
        "kind": "voc",
        "root": root.name,
        "image_set": image_set,
        "one_based": one_based,
        "classes": list(chosen),
        "annotations_sha256": digest.hexdigest(),
    }
    return Source(description, fill)


def _parse(path: Path, text: bytes) -> ElementTree.Element:
    try:
        return ElementTree.fromstring(text)
    except ElementTree.ParseError as error:
        raise SourceError(f"{path}: not valid XML: {error}") from None


def _names(annotation: ElementTree.Element) -> Iterator[str]:
    return (item.findtext("name", "").strip() for item in annotation.iterfind("object"))


def _image(annotation: ElementTree.Element, number: int, name: str, folder: Path) -> ImageEntry:
    """The file is called as in the list; the XML only knows its ending."""
    file_name = name + (Path(annotation.findtext("filename", "")).suffix or ".jpg")
    size = annotation.findtext("size/width"), annotation.findtext("size/height")
    if size[0] is None or size[1] is None:
        raise SourceError(f"{name}.xml: no size/width and size/height")
    return ImageEntry(number, str(folder / file_name), file_name, int(float(size[0])), int(float(size[1])))


def _boxes(
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
