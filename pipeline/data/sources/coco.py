"""COCO source: a folder of images and an instances JSON, read as a stream.

Labels are the categories by ascending id, counted from 0. Boxes are kept as annotated, even beyond the edge of the image;
crowd regions keep their flag. Images without annotations are kept.
"""

import posixpath
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import ijson
from pyarrow import NativeFile
from pydantic import JsonValue

from pipeline import storage
from pipeline.data.shards.manifest import Category
from pipeline.data.shards.records import Rejection
from pipeline.data.sources.index import AnnotationIndex, BoxEntry, DatasetSource, ImageEntry, SourceError
from pipeline.progress import Progress

READ_BYTES = 1 << 20


def coco_source(images: str, annotations: str) -> DatasetSource:
    """Source of an image folder and its instances JSON, both by path or URI; `.json.gz` is read as well."""
    images, annotations = storage.absolute(images), storage.absolute(annotations)

    def fill(index: AnnotationIndex) -> tuple[Category, ...]:
        categories = read_categories(annotations)
        index.add_images(read_image_entries(annotations, partial(storage.join, images)))
        index.add_boxes(read_boxes(annotations, categories, index))
        return categories

    description: dict[str, JsonValue] = {
        "kind": "coco",
        "images": posixpath.basename(images),
        "annotations": posixpath.basename(annotations),
        "annotations_sha256": file_sha256(annotations),
    }
    return DatasetSource(description, fill)


def read_categories(annotations: str) -> tuple[Category, ...]:
    """Read the categories by ascending id, with stripped names."""
    names = {}
    for item in _items(annotations, "categories"):
        number = _integer(item, "id", annotations)
        if number in names:
            raise SourceError(f"{annotations}: category id {number} occurs twice")
        names[number] = str(item.get("name", number)).strip()
    if not names:
        raise SourceError(f"{annotations}: no `categories`; is it a COCO instances file?")
    return tuple(Category(label=k, original_id=number, name=names[number]) for k, number in enumerate(sorted(names)))


def read_image_entries(annotations: str, locate: Callable[[str], str], id_offset: int = 0) -> Iterator[ImageEntry]:
    """Read the entries of `images`, in file order.

    Args:
        locate: maps a `file_name` to the path or URI of the image.
        id_offset: added to every image id.

    Raises:
        SourceError: an entry lacks its id, name or size, or its name leads outside the folder.
    """
    for item in _items(annotations, "images"):
        image_id = _integer(item, "id", annotations)
        file_name = item.get("file_name")
        if not isinstance(file_name, str) or not storage.stays_inside(file_name):
            raise SourceError(
                f"{annotations}: image {image_id}: file_name {file_name!r} is not a path inside the folder"
            )
        yield ImageEntry(
            image_id + id_offset,
            locate(file_name),
            file_name,
            _integer(item, "width", annotations),
            _integer(item, "height", annotations),
        )


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
    for item in _items(annotations, "annotations"):
        image_id = _integer(item, "image_id", annotations)
        if not selects(image_id):
            continue
        number, box, label = item.get("id"), item.get("bbox"), labels.get(item.get("category_id", -1))
        if label is None:
            detail = f"annotation {number}: category_id {item.get('category_id')}"
            index.reject(Rejection(image_id + id_offset, None, "box", "unknown category", detail))
        elif not isinstance(box, list) or len(box) != 4 or not all(isinstance(side, int | float) for side in box):
            detail = f"annotation {number}: bbox {box}"
            index.reject(Rejection(image_id + id_offset, None, "box", "malformed box", detail))
        else:
            x, y, width, height = box
            area = item.get("area")
            yield BoxEntry(
                image_id + id_offset,
                x,
                y,
                x + width,
                y + height,
                label,
                width * height if area is None else area,
                bool(item.get("iscrowd")),
                None if number is None else number + id_offset,
            )


def file_sha256(uri: str) -> str:
    """SHA-256 of a file, in hex."""
    try:
        return storage.sha256(uri)
    except FileNotFoundError:
        raise SourceError(f"{uri}: no such file") from None


def _items(annotations: str, key: str) -> Iterator[dict[str, Any]]:
    """Yield the objects of the array under `key`, wherever it is in the file. One pass reads about 40 MB/s."""
    filesystem, path = storage.resolve(annotations)
    size = filesystem.get_file_info(path).size
    try:
        with (
            filesystem.open_input_stream(path) as stream,
            Progress(f"{key} of {posixpath.basename(path)}", total=size, unit="B", delay=5) as progress,
        ):
            watched = _WatchedStream(stream, progress)
            yield from ijson.items(watched, f"{key}.item", use_float=True, buf_size=READ_BYTES)
    except ijson.JSONError as error:
        raise SourceError(f"{annotations}: not valid JSON: {error}") from None


class _WatchedStream:
    """A stream that advances a progress bar by the bytes read."""

    def __init__(self, stream: NativeFile, progress: Progress) -> None:
        self._stream, self._progress = stream, progress

    def read(self, num_bytes: int) -> bytes:
        data = bytes(self._stream.read(num_bytes))
        self._progress.advance(len(data))
        return data


def _integer(item: dict[str, Any], key: str, annotations: str) -> int:
    value = item.get(key)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int):
        raise SourceError(f"{annotations}: {key} is {value!r} in {str(item)[:200]}; expected an integer")
    return value
