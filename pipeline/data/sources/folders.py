"""Files of a local data set, as people and tools lay them out: linked folders, upper-case endings, texts of Windows."""

import os
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path

from pipeline import storage
from pipeline.data.sources.index import AnnotationIndex, SourceError
from pipeline.text_files import text_of

# Files that lie beside images and are none. Everything else is tried as an image, whatever its ending.
_COMPANIONS = (
    ".txt .xml .json .jsonl .yaml .yml .csv .tsv .md .cache .npy .npz .pkl .zip .gz .tar .db .ini .html .pdf .py .names .data"
    " .log .lock .mp4 .avi .mov .mkv"
)
COMPANIONS = frozenset(_COMPANIONS.split())

# Names of folders, in lower case, and other names of a split.
IMAGE_FOLDERS = frozenset({"images", "image", "imgs", "img", "jpegimages", "pictures", "photos"})
LABEL_FOLDERS = frozenset({"labels", "label"})
ANNOTATION_FOLDERS = frozenset({"annotations", "annotation", "xmls", "xml", "labels"})
SPLIT_NAMES = {
    "val": ("valid", "validation"),
    "valid": ("val", "validation"),
    "train": ("training",),
    "test": ("testing",),
}


def read_text(path: Path) -> str:
    """Read a text file: UTF-8 with or without a byte order mark, or UTF-16 with one.

    Raises:
        SourceError: there is no such file, or its content has another encoding.
    """
    try:
        return text_of(read_file(path))
    except SourceError:
        raise
    except ValueError as error:
        raise SourceError(f"{path}: {error}") from None


def read_file(path: Path) -> bytes:
    """Read a file of the data set.

    Raises:
        SourceError: there is none, or it cannot be read.
    """
    try:
        return storage.read_regular_file(path)
    except FileNotFoundError:
        raise SourceError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in its name
        raise SourceError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None


def is_file(path: Path) -> bool:
    """True for a regular file; False for every name that cannot be one."""
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that is too long
        return False


def files_below(folder: Path) -> list[Path]:
    """All files in a folder and its sub-folders, sorted; links to folders are followed, each folder once."""
    seen: set[str] = set()
    found: list[Path] = []
    for place, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:
            folders.clear()  # a link back
            continue
        seen.add(real)
        found += (Path(place, name) for name in names)
    return sorted(found)


def image_files(files: Iterable[Path], index: AnnotationIndex | None = None) -> list[Path]:
    """Files that may be images; the others are counted in the index, apart from labels."""
    images = []
    for path in files:
        if path.name.startswith(".") or path.suffix.lower() in COMPANIONS or path.name == "Thumbs.db":
            if index is not None and path.suffix.lower() not in (".txt", ".xml"):
                index.notice("file-passed-over", str(path))
        else:
            images.append(path)
    return images


def files_by_stem(folder: Path, suffix: str) -> dict[str, Path]:
    """Files of one folder with an ending, in any case of letters, by their names without it."""
    try:
        names = sorted(os.listdir(folder))
    except (OSError, ValueError):
        return {}
    return {normal(Path(name).stem): folder / name for name in names if Path(name).suffix.lower() == suffix}


def sub_folders(folder: Path, names: frozenset[str]) -> Iterator[Path]:
    """Folders of these lower-case names in a folder, whatever their case of letters."""
    try:
        entries = sorted(os.listdir(folder))
    except (OSError, ValueError):
        return
    yield from (folder / name for name in entries if name.lower() in names and os.path.isdir(folder / name))


def normal(name: str) -> str:
    """A name in Unicode's composed form: macOS decomposes, others do not."""
    return unicodedata.normalize("NFC", name)
