"""COCO source: a folder of images and an instances JSON, read as a stream.

Labels are the categories by ascending id, counted from 0. Boxes are kept as annotated, even beyond the edge of the image;
crowd regions keep their flag. Images without annotations are kept. An entry that cannot be used is listed; a file whose arrays
or categories are not COCO's is refused.
"""

import posixpath
from collections.abc import Callable, Iterator
from math import isfinite
from typing import Any

from pydantic import JsonValue

from pipeline import storage
from pipeline.data.shards.manifest import Category
from pipeline.data.shards.records import Rejection
from pipeline.data.sources.file_names import locator
from pipeline.data.sources.index import AnnotationIndex, BoxEntry, DatasetSource, ImageEntry, SourceError
from pipeline.data.sources.json_arrays import array_items

LARGEST_SIDE = 2**31 - 1  # px, of the shards' columns
FLAGS = {None: False, 0: False, 1: True, "": False, "0": False, "1": True, "false": False, "true": True}

Reject = Callable[[Rejection], None]


def coco_source(images: str, annotations: str) -> DatasetSource:
    """Source of an image folder and its instances JSON, both by path or URI; `.json.gz` is read as well."""
    images, annotations = storage.absolute(images), storage.absolute(annotations)

    def fill(index: AnnotationIndex) -> tuple[Category, ...]:
        items = list(array_items(annotations, "categories"))
        categories = _categories(items, annotations)
        locate = locator(images, image_names(annotations), index)
        index.add_images(read_image_entries(annotations, locate, reject=index.reject))
        index.add_boxes(read_boxes(annotations, categories, index))
        return _without_placeholder(items, categories, index)

    description: dict[str, JsonValue] = {
        "kind": "coco",
        "images": posixpath.basename(images),
        "annotations": posixpath.basename(annotations),
        "annotations_sha256": file_sha256(annotations),
    }
    return DatasetSource(description, fill)


def read_categories(annotations: str) -> tuple[Category, ...]:
    """Read the categories by ascending id, with stripped names.

    Raises:
        SourceError: there are none, or one lacks its id or name, or an id occurs twice.
    """
    return _categories(list(array_items(annotations, "categories")), annotations)


def _categories(items: list[Any], annotations: str) -> tuple[Category, ...]:
    names: dict[int, str] = {}
    for item in items:
        number = as_integer(item.get("id")) if isinstance(item, dict) else None
        if number is None:
            raise SourceError(f"{annotations}: categories: {shown(item)}: expected an object with an integer `id`")
        if number in names:
            raise SourceError(f"{annotations}: category id {number} occurs twice")
        name = item.get("name", number)
        if not isinstance(name, str | int | float) or isinstance(name, bool) or not str(name).strip():
            raise SourceError(f"{annotations}: category {number} has the name {shown(name)}; give it a name")
        names[number] = str(name).strip()
    if not names:
        raise SourceError(f"{annotations}: no `categories`; is it a COCO instances file?")
    return tuple(Category(label=k, original_id=number, name=names[number]) for k, number in enumerate(sorted(names)))


def image_names(annotations: str) -> Iterator[str]:
    """File names of the images, in file order, as they are written."""
    for item in array_items(annotations, "images"):
        if isinstance(item, dict) and isinstance(item.get("file_name"), str):
            yield item["file_name"]


def read_image_entries(
    annotations: str, locate: Callable[[str], str | None], id_offset: int = 0, *, reject: Reject = lambda _: None
) -> Iterator[ImageEntry]:
    """Read the entries of `images`, in file order; unusable ones are rejected.

    Args:
        locate: maps a `file_name` to the path or URI of the image; None if it names no file of the folder.
        id_offset: added to every image id.

    Raises:
        SourceError: an entry has no integer id, so that its annotations cannot be found.
    """
    for item in array_items(annotations, "images"):
        image_id = as_integer(item.get("id")) if isinstance(item, dict) else None
        if image_id is None:
            number = f"id is {shown(item.get('id'))} in " if isinstance(item, dict) else ""
            raise SourceError(f"{annotations}: images: {number}{shown(item)}; expected an object with an integer `id`")
        name, width, height = item.get("file_name"), _side(item.get("width")), _side(item.get("height"))
        shown_name = name if isinstance(name, str) and name.isprintable() else shown(name)
        if not isinstance(name, str) or (uri := locate(name)) is None:
            detail = f"file_name {shown(name)} is not a path inside the folder"
            reject(Rejection(image_id + id_offset, shown_name, "image", "unusable file name", detail))
        elif width is None or height is None:
            detail = f"width is {shown(item.get('width'))}, height {shown(item.get('height'))}"
            reject(Rejection(image_id + id_offset, shown_name, "image", "unusable size", detail))
        else:
            yield ImageEntry(image_id + id_offset, uri, name, width, height)


def read_boxes(
    annotations: str,
    categories: tuple[Category, ...],
    index: AnnotationIndex,
    *,
    selects: Callable[[int], bool] = lambda _: True,
    id_offset: int = 0,
) -> Iterator[BoxEntry]:
    """Read the entries of `annotations`, in file order; unusable ones go to `index.reject`.

    Args:
        selects: True for images whose annotations are read, by image id in the file.
        id_offset: added to every image id and annotation id.
    """
    labels = {category.original_id: category.label for category in categories}
    for position, item in enumerate(array_items(annotations, "annotations"), start=1):
        if not isinstance(item, dict):
            index.reject(
                Rejection(None, None, "box", "malformed entry", f"annotation number {position}: {shown(item)}")
            )
            continue
        image_id, number = as_integer(item.get("image_id")), item.get("id")
        if image_id is None:
            detail = f"annotation {shown(number)}: image_id {shown(item.get('image_id'))}"
            index.reject(Rejection(None, None, "box", "unknown image", detail))
        elif selects(image_id):
            box = _box(item, labels)
            if isinstance(box, BoxEntry):
                yield box._replace(image_id=image_id + id_offset, annotation_id=_annotation_id(number, id_offset))
                if _is_rotated(item):
                    index.notice("box-rotated", f"annotation {shown(number)} of image {image_id}")
            else:
                reason, detail = box
                detail = f"annotation {shown(number)}: {detail}"
                index.reject(Rejection(image_id + id_offset, None, "box", reason, detail))


def _box(item: dict[str, Any], labels: dict[int, int]) -> BoxEntry | tuple[str, str]:
    """The box of an annotation, or why it cannot be used: reason and detail."""
    category_id, corners, crowd = as_integer(item.get("category_id")), _numbers(item.get("bbox")), item.get("iscrowd")
    if category_id is None or category_id not in labels:
        return "unknown category", f"category_id {shown(item.get('category_id'))}"
    if corners is None or len(corners) != 4:
        return "malformed box", f"bbox {shown(item.get('bbox'))}"
    if not isinstance(crowd, str | int | float | None) or (flag := FLAGS.get(_lower(crowd))) is None:
        return "malformed iscrowd", f"iscrowd {shown(crowd)}"
    x, y, width, height = corners
    area = _numbers([item.get("area")])
    area_px2 = width * height if area is None else area[0]  # area of the box where no number is given
    return BoxEntry(0, x, y, x + width, y + height, labels[category_id], area_px2, flag)


def _side(value: Any) -> int | None:
    side = as_integer(value)
    return side if side is not None and 0 < side <= LARGEST_SIDE else None


def _lower(value: Any) -> Any:
    return value.strip().lower() if isinstance(value, str) else value


def _numbers(values: Any) -> list[float] | None:
    """Finite numbers of a list; None if it holds anything else."""
    if not isinstance(values, list) or not all(type(value) in (int, float) for value in values):
        return None
    try:
        numbers = [float(value) for value in values]
    except OverflowError:
        return None
    return numbers if all(map(isfinite, numbers)) else None


def _annotation_id(number: Any, id_offset: int) -> int | str | None:
    """Id that only needs to differ from others: as a number where it is one, else as text."""
    if number is None:
        return None
    if type(number) is int and abs(number) < 2**62:
        return number + id_offset
    return f"{id_offset}: {shown(number)}"


def _is_rotated(item: dict[str, Any]) -> bool:
    """True if CVAT has stored the unturned box of a turned object."""
    attributes = item.get("attributes")
    angle = attributes.get("rotation") if isinstance(attributes, dict) else None
    try:
        return isinstance(angle, str | int | float) and float(angle) % 360 != 0
    except (ValueError, OverflowError):  # not a number
        return False


def _without_placeholder(
    items: list[Any], categories: tuple[Category, ...], index: AnnotationIndex
) -> tuple[Category, ...]:
    """Leave out Roboflow's category 0: the project's name, parent of all others, and without boxes."""
    first, *others = categories
    parents = {as_integer(item["id"]): item.get("supercategory") for item in items}
    placeholder = (
        first.original_id == 0
        and bool(others)
        and parents[0] in (None, "", "none")
        and all(parents[category.original_id] == first.name for category in others)
    )
    if not placeholder or not index.drop_label(0):
        return categories
    index.notice("class-placeholder", f"{first.name} (category 0)")
    return tuple(category.model_copy(update={"label": label}) for label, category in enumerate(others))


def file_sha256(uri: str) -> str:
    """SHA-256 of a file, in hex."""
    try:
        return storage.sha256(uri)
    except FileNotFoundError:
        raise SourceError(f"{uri}: no such file") from None
    except OSError as error:
        raise SourceError(f"{uri}: cannot be read: {error}") from None


def as_integer(value: Any) -> int | None:
    """Integer of 63 bits that a JSON value stands for, also as text or as a float without fraction; None for others."""
    if isinstance(value, str) and value.strip().lstrip("+-").isdecimal() and len(value) < 20:
        try:
            value = int(value)
        except ValueError:  # two signs
            return None
    elif isinstance(value, float) and value.is_integer():
        value = int(value)
    return value if type(value) is int and abs(value) < 2**62 else None


def shown(value: Any) -> str:
    """A JSON value in a message: short, and whatever it holds."""
    try:
        return repr(value)[:200]
    except RecursionError:
        return f"a deeply nested {type(value).__name__}"
