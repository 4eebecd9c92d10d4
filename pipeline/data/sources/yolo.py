"""YOLO source: a data.yaml, or its folder, and one label file per image.

`train`, `val` and `test` of the YAML file name a folder of images, a file that lists images, or several of them, relative to
its `path`. Every file of such a folder is taken as an image unless its ending says otherwise, so that none is left out in
silence. A row is `class cx cy width height` in fractions of the image; a class and the corners of a polygon, which is converted
to its bounding box; or, if the YAML has `kpt_shape`, a box and its keypoints. An image without a label file has no objects.
"""

import hashlib
import unicodedata
from pathlib import Path
from typing import Any

from pydantic import JsonValue

from pipeline.data.shards.manifest import Category
from pipeline.data.shards.records import Rejection
from pipeline.data.sources.folders import SPLIT_NAMES, files_below, image_files, is_file, read_file, read_text
from pipeline.data.sources.index import AnnotationIndex, DatasetSource, ImageEntry, SourceError
from pipeline.data.sources.yolo_labels import KeypointShape, find_labels, label_folders, labels_without_image, read_rows
from pipeline.text_files import load_yaml

CLASS_FILES = ("classes.txt", "labels/classes.txt", "obj.names", "predefined_classes.txt")


def yolo_source(data: Path, split: str) -> DatasetSource:
    """Source of one split, such as "train".

    Args:
        data: the data.yaml, or the folder that holds it; without one, the folder has its class names in classes.txt.
    """
    source, content = read_data(data, split)
    categories = _yolo_categories(source, content.get("names"))
    keypoints = _keypoint_shape(source, content.get("kpt_shape"))
    root = _root(source, content.get("path"))
    images, passed_over = _image_files(source, root, content, split)
    labels = find_labels(images)
    if not labels:
        places = ", ".join(str(place) for place in label_folders(images[0].parent))
        raise SourceError(
            f"{source}: {split}: not one of {len(images)} images has a label file; for {images[0].name}, {images[0].stem}.txt"
            f" was looked for in {places}. If no image has objects, give each an empty label file"
        )
    digest = hashlib.sha256()
    for path in images:
        digest.update(f"{_display_name(path, root)}\n".encode(errors="replace"))
        digest.update(_content(labels[path]) if path in labels else b"")

    def fill(index: AnnotationIndex) -> tuple[Category, ...]:
        for number, path in enumerate(images, start=1):
            name = _display_name(path, root)
            try:
                text = read_text(labels[path]) if path in labels else ""
            except SourceError as error:
                index.reject(Rejection(number, name, "image", "unreadable labels", str(error)))
                continue
            index.add_images([ImageEntry(number, str(path), name, None, None)])
            if path in labels:
                index.add_boxes(read_rows(text, number, len(categories), keypoints, index, labels[path].name))
            else:
                index.notice("label-file-missing", name)
        for path in labels_without_image(labels):
            detail = f"no image of the name {path.stem} is in the folder of the images"
            index.reject(Rejection(None, _display_name(path, root), "file", "label without an image", detail))
        image_files(passed_over, index)
        return categories

    description: dict[str, JsonValue] = {
        "kind": "yolo",
        "split": split,
        "data": data.name,
        "labels_sha256": digest.hexdigest(),
    }
    return DatasetSource(description, fill)


def read_data(data: Path, split: str) -> tuple[Path, dict[str, Any]]:
    """Read the YAML file, or that of a folder; for a folder without one, state what its layout says.

    Raises:
        SourceError: there is none, or several.
    """
    if not data.is_dir():
        return data, _read_yaml(data)
    files = sorted(path for suffix in ("*.yaml", "*.yml") for path in data.glob(suffix))
    contents: dict[Path, dict[str, Any]] = {}
    broken: list[SourceError] = []
    for path in files:
        try:
            contents[path] = _read_yaml(path)
        except SourceError as error:
            broken.append(error)
    with_names = [path for path, content in contents.items() if "names" in content]
    chosen = next((path for path in with_names if path.stem in ("data", "dataset")), None) or next(
        iter(with_names), None
    )
    if chosen is not None and (len(with_names) == 1 or chosen.stem in ("data", "dataset")):
        return chosen, contents[chosen]
    if with_names:
        raise SourceError(
            f"{data}: {', '.join(path.name for path in with_names)} have `names`; name one of these files"
        )
    for name in CLASS_FILES:
        if (path := data / name).is_file():
            names = [line.strip() for line in read_text(path).splitlines() if line.strip()]
            places = [f"images/{split}", f"{split}/images", split, "images", "."]
            place = next(place for place in places if (data / place).is_dir())
            return data / "data.yaml", {"names": names, split: place}
    if broken:
        raise broken[0]
    raise SourceError(f"{data}: no YAML file with `names`, and no classes.txt")


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = load_yaml(read_text(path))
    except SourceError:
        raise
    except ValueError as error:
        raise SourceError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(content, dict):
        raise SourceError(f"{path}: expected keys such as `names` and `train`")
    return content


def _yolo_categories(data_yaml: Path, names: Any) -> tuple[Category, ...]:
    if isinstance(names, list):
        names = dict(enumerate(names))
    if isinstance(names, dict):
        if len({str(key) for key in names}) < len(names):
            raise SourceError(f"{data_yaml}: names has a class number twice, as a number and as text")
        names = {int(key) if isinstance(key, str) and key.isdecimal() else key: name for key, name in names.items()}
    if not isinstance(names, dict) or not names or not all(type(key) is int for key in names):
        raise SourceError(
            f"{data_yaml}: names is {str(names)[:200]}; expected a list, or a mapping from class number to name"
        )
    if sorted(names) != list(range(len(names))):
        raise SourceError(f"{data_yaml}: names has class numbers {sorted(names)}; expected 0..{len(names) - 1}")
    for key, name in names.items():
        if isinstance(name, bool):
            raise SourceError(f"{data_yaml}: names: YAML reads class {key} as {name}; put the name in quotation marks")
        if not isinstance(name, str | int | float) or not str(name).strip():
            raise SourceError(f"{data_yaml}: names: class {key} has the name {str(name)[:200]!r}; give it a name")
    return tuple(Category(label=k, original_id=k, name=str(names[k]).strip()) for k in range(len(names)))


def _root(data_yaml: Path, path: Any) -> Path:
    """Folder that the splits are relative to."""
    if not isinstance(path, str | int | float | None):
        raise SourceError(f"{data_yaml}: path is {str(path)[:200]}; expected a folder")
    try:
        return (data_yaml.absolute().parent / str(path or ".")).resolve()
    except (OSError, ValueError) as error:  # a NUL, a link to itself
        raise SourceError(f"{data_yaml}: path is {path!r:.200}: {error}") from None


def _content(label: Path) -> bytes:
    """Content of a label file for the digest; `read_rows` lists one that cannot be read."""
    try:
        return read_file(label)
    except SourceError:
        return b""


def _keypoint_shape(data_yaml: Path, shape: Any) -> KeypointShape | None:
    if shape is None:
        return None
    valid = isinstance(shape, list) and len(shape) == 2 and all(type(n) is int and 0 < n < 10_000 for n in shape)
    if not valid or shape[1] not in (2, 3):
        raise SourceError(f"{data_yaml}: kpt_shape is {str(shape)[:200]}; expected [keypoints, 2 or 3]")
    return KeypointShape(*shape)


def _image_files(data_yaml: Path, root: Path, content: dict[str, Any], split: str) -> tuple[list[Path], list[Path]]:
    """All images of the split, sorted, each once; and the other files of its folders."""
    names = (split, *SPLIT_NAMES.get(split, ()))
    entries = next((content[name] for name in names if content.get(name)), None)
    if not entries:
        known = ", ".join(key for key in ("train", "val", "valid", "test") if content.get(key)) or "none"
        raise SourceError(f"{data_yaml}: no split {split!r}; available: {known}")
    images: set[Path] = set()
    others: list[Path] = []
    for entry in [entries] if isinstance(entries, str) else entries if isinstance(entries, list) else [None]:
        if not isinstance(entry, str):
            raise SourceError(f"{data_yaml}: {split} is {str(entries)[:200]}; expected a path, or a list of paths")
        path = _place(entry, root, data_yaml)
        if path is None:
            raise SourceError(f"{data_yaml}: {split}: {root / entry} does not exist")
        if path.is_dir():
            files = files_below(path)
            images.update(image_files(files))
            others += files
        else:
            images.update(_listed(line.strip(), path, root) for line in read_text(path).splitlines() if line.strip())
    if not images:
        raise SourceError(f"{data_yaml}: {split}: no images in {entries}")
    return sorted(images), [path for path in others if path not in images]


def _place(entry: str, root: Path, data_yaml: Path) -> Path | None:
    """The folder or file that a split names. Exported sets often have ../train/images and mean train/images."""
    here = data_yaml.absolute().parent
    written = entry.replace("\\", "/")
    for base in (root, here):
        for name in (entry, written, written.removeprefix("../"), written.lstrip("./")):
            try:
                if (base / name).exists():
                    return base / name
            except (OSError, ValueError):  # a name that is too long
                continue
    return None


def _listed(line: str, listing: Path, root: Path) -> Path:
    """An image that a list names, relative to the list or to the root."""
    slashes = line.replace("\\", "/")
    names = dict.fromkeys([line, slashes, *(unicodedata.normalize(form, slashes) for form in ("NFC", "NFD"))])
    bases = [listing.parent, root] if slashes.startswith("./") else [root, listing.parent]
    places = [base / name for name in names for base in bases]
    return next((place for place in places if is_file(place)), places[0])


def _display_name(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name
