"""File names as annotation tools write them, resolved to files of a folder.

Exports carry the paths of the machine they come from: back-slashes, the folder's own name, the path of an upload. One reading of
the names is chosen for the whole file, by the first names, so that two images can never meet in one file by a guess per name.
"""

import posixpath
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import islice
from urllib.parse import unquote, urlsplit

from pipeline import storage
from pipeline.data.sources.index import AnnotationIndex

PROBES = 32  # names that are looked up to choose a reading


def locator(folder: str, names: Iterable[str], index: AnnotationIndex) -> Callable[[str], str | None]:
    """Choose the reading under which most of the first names are files of the folder; as written if none are.

    Returns:
        A function from name to path or URI; None for a name that is no path inside the folder.
    """
    first = list(islice(names, PROBES))
    best, _ = _best_reading(folder, first)
    if best != "as written":
        index.notice("file-names-read", f"{first[0]}, {best}")
    return partial(_locate, folder, best)


def most_hits(folder: str, names: Sequence[str]) -> int:
    """Number of names that are files of the folder, under the best reading of them."""
    return _best_reading(folder, names)[1]


def _best_reading(folder: str, names: Sequence[str]) -> tuple[str, int]:
    """Reading under which most names are files, the first of equals, and their number."""
    best, most = "as written", -1
    for reading in READINGS:
        uris = {_locate(folder, reading, name) for name in names} - {None}  # two names that become one file count once
        hits = sum(_is_there(uri) for uri in uris if uri is not None)
        if hits > most:
            best, most = reading, hits
        if most == len(set(names)):
            break
    return best, most


def _own_folder(name: str, folder: str) -> str:
    """Without the folder's own name at the beginning, or all before it."""
    own = f"{posixpath.basename(folder)}/"
    _, separator, rest = f"/{name}".rpartition(f"/{own}")
    return rest if separator else name


READINGS: dict[str, Callable[[str, str], str]] = {
    "as written": lambda name, _: name,
    "with slashes for back-slashes": lambda name, _: _slashes(name),
    "without the folder's own name": lambda name, folder: _own_folder(_slashes(name), folder),
    "without its first folder": lambda name, _: _slashes(name).lstrip("/").partition("/")[2],
    "by the last part of its path": lambda name, _: _last_part(name),
    "in Unicode form NFC": lambda name, _: unicodedata.normalize("NFC", name),
    "in Unicode form NFD": lambda name, _: unicodedata.normalize("NFD", name),
}


def _slashes(name: str) -> str:
    return name.replace("\\", "/")


def _last_part(name: str) -> str:
    path = unquote(urlsplit(name).path) if "://" in name else name
    return posixpath.basename(_slashes(path))


def _locate(folder: str, reading: str, name: str) -> str | None:
    try:
        path = READINGS[reading](name, folder)
        path.encode()
    except ValueError:  # a URL that is none, or half of a surrogate pair
        return None
    # A URL cannot be a path below a local folder, and joined to one it would be taken for a URI.
    return storage.join(folder, path) if storage.stays_inside(path) and "://" not in path else None


def _is_there(uri: str) -> bool:
    try:
        return storage.exists(uri)
    except OSError:  # a name that is too long, a link to itself
        return False
