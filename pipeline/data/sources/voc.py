"""Pascal VOC source: one XML per image, in the folders of the original or as annotation tools write them.

VOC counts pixels from 1 and includes both ends: (xmin, xmax) covers xmin - 1 to xmax on a continuous axis. Many tools
write the same XML with ordinary coordinates; `one_based=False` reads those. In both, xmax <= xmin is an
annotation error and not a box. Difficult objects become crowd regions: ignored in training and in evaluation.

The classes are the names in all annotations of the folder, sorted, so every split has the same labels.
"""

import hashlib
import re
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from math import isfinite
from pathlib import Path
from xml.etree import ElementTree

from pydantic import JsonValue

from dfine_core.images import SIDES_SWAPPED, ImageError, open_image, orientation
from pipeline.data.shards.manifest import Category
from pipeline.data.shards.records import Rejection
from pipeline.data.sources.folders import is_file, read_file
from pipeline.data.sources.index import AnnotationIndex, BoxEntry, DatasetSource, ImageEntry, SourceError
from pipeline.data.sources.voc_files import ImageFinder, find_files

LARGEST_SIDE = 2**31 - 1  # px, of the shards' columns
DECLARATION = re.compile(rb"^\s*<\?xml[^>]*?encoding\s*=\s*[\"']([\w.:-]+)[^>]*\?>")


def voc_source(root: Path, image_set: str, *, classes: Sequence[str] = (), one_based: bool = True) -> DatasetSource:
    """Source of one split.

    Args:
        root: folder with Annotations, ImageSets/Main and JPEGImages, or with XML files in another usual layout.
        image_set: name of the list in ImageSets/Main, such as "train", or of a folder.
        classes: class names in label order; by default all names that occur, sorted.
        one_based: True if pixels are counted from 1 with both ends included.
    """
    root = root.absolute()
    files = find_files(root, image_set)
    digest = hashlib.sha256("\n".join(entry.name for entry in files.entries).encode(errors="replace"))
    occurring: set[str] = set()
    broken: list[SourceError] = []
    for path in files.xmls:
        try:
            text = read_file(path)
            digest.update(text)
            occurring.update(_object_names(_parse_xml(path, text)))
        except SourceError as error:
            broken.append(error)
    if broken and len(broken) == len(files.xmls):
        raise broken[0]
    chosen = _chosen(classes, occurring - {""}, len(files.xmls), root)

    def fill(index: AnnotationIndex) -> tuple[Category, ...]:
        labels = {name: label for label, name in enumerate(chosen)}
        finder = ImageFinder(root)
        for number, entry in enumerate(files.entries, start=1):
            if entry.xml is None:
                detail = f"{entry.name}.xml does not exist"
                index.reject(Rejection(number, entry.name, "image", "missing annotation", detail))
                continue
            try:
                annotation = _parse_xml(entry.xml, read_file(entry.xml))
            except SourceError as error:
                index.reject(Rejection(number, entry.name, "image", "unreadable annotation", str(error)))
                continue
            path = finder.find(entry.xml, entry.name, annotation.findtext("filename") or "")
            if (size := _size(annotation, path)) is None:
                detail = f"{entry.xml.name} has no width and height, and the image cannot be read"
                index.reject(Rejection(number, path.name, "image", "unusable size", detail))
                continue
            index.add_images([ImageEntry(number, str(path), path.name, *size)])
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


def _chosen(classes: Sequence[str], occurring: set[str], files: int, root: Path) -> tuple[str, ...]:
    """Classes in label order.

    Raises:
        SourceError: one is given twice or misspelt, or there are none.
    """
    chosen = tuple(name.strip() for name in classes)
    if twice := [name for name in dict.fromkeys(chosen) if chosen.count(name) > 1]:
        raise SourceError(f"--classes: {', '.join(map(repr, twice))} given twice; name each class once")
    if "" in chosen:
        raise SourceError("--classes: a name is blank")
    others = sorted(occurring - set(chosen))
    for name in chosen:
        if name not in occurring and (near := _nearest(name, others)) is not None:
            raise SourceError(f"--classes: no object is called {name!r}; did you mean {near!r}?")
    if chosen and others and not occurring & set(chosen):
        named, known = ", ".join(map(repr, chosen)), ", ".join(map(repr, others[:10]))
        raise SourceError(f"--classes: no object is called {named}; the objects are {known}. Separate names by blanks")
    chosen = chosen or tuple(others)
    if not chosen:
        raise SourceError(
            f"{root}: no objects in {files} XML files, so the classes are unknown: name them with --classes"
        )
    return chosen


def _nearest(name: str, others: Sequence[str]) -> str | None:
    """Name that is nearly the same: in another case, with a letter more or less, or with two exchanged."""
    by_case = {other.casefold(): other for other in others}
    near = get_close_matches(name.casefold(), by_case, n=1, cutoff=0.75)
    near = near or [other for other in by_case if sorted(other) == sorted(name.casefold())]
    return by_case[near[0]] if near else None


def _parse_xml(path: Path, text: bytes) -> ElementTree.Element:
    """Parse an XML file. The parser knows UTF-8 and a few others; the declared encoding is decoded here where it does not."""
    try:
        return ElementTree.fromstring(text)
    except (ElementTree.ParseError, LookupError, ValueError) as error:
        problem = error
    declaration = DECLARATION.match(text)
    if declaration:
        try:
            return ElementTree.fromstring(text[declaration.end() :].decode(declaration[1].decode()))
        except (ElementTree.ParseError, LookupError, ValueError):
            pass
    raise SourceError(f"{path}: not valid XML: {problem}") from None


def _object_names(annotation: ElementTree.Element) -> Iterator[str]:
    return (item.findtext("name", "").strip() for item in annotation.iterfind("object"))


def _size(annotation: ElementTree.Element, path: Path) -> tuple[int, int] | None:
    """Annotated width and height; where the XML has none, those of the upright image."""
    sides = [_side(annotation.findtext(f"size/{key}", "")) for key in ("width", "height")]
    if sides[0] is not None and sides[1] is not None:
        return sides[0], sides[1]
    if not is_file(path):
        return None
    try:
        with open_image(path, max_pixels=None) as image:
            swapped = orientation(image) in SIDES_SWAPPED
            return (image.height, image.width) if swapped else image.size
    except (ImageError, OSError):
        return None


def _side(text: str) -> int | None:
    try:
        value = float(text.strip().removesuffix("px"))
    except ValueError:
        return None
    return int(value) if isfinite(value) and 1 <= value <= LARGEST_SIDE else None


def _voc_boxes(
    annotation: ElementTree.Element, number: int, labels: dict[str, int], one_based: bool, index: AnnotationIndex
) -> Iterator[BoxEntry]:
    for item in annotation.iterfind("object"):
        name = item.findtext("name", "").strip()
        corners = [item.findtext(f"bndbox/{key}", "nan") for key in ("xmin", "ymin", "xmax", "ymax")]
        detail = f"{name} {', '.join(corners)}"[:200]
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
            if one_based and min(x1, y1) < 1:
                index.notice("box-from-zero", detail)
            x1, y1 = (x1 - 1, y1 - 1) if one_based else (x1, y1)
            crowd = item.findtext("difficult", "0").strip().lower() in ("1", "true")
            yield BoxEntry(number, x1, y1, x2, y2, labels[name], (x2 - x1) * (y2 - y1), crowd)
