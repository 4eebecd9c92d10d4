"""Layouts of VOC folders: which XML files belong to a split, and which image belongs to an XML file.

With lists in `ImageSets` a split is a list. Without them it is the folder of its name, as LabelImg and Roboflow leave it, or the
whole folder. Images lie in `JPEGImages`, `images` or the like, or beside their XML.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline.data.sources.folders import (
    ANNOTATION_FOLDERS,
    COMPANIONS,
    IMAGE_FOLDERS,
    SPLIT_NAMES,
    files_below,
    normal,
    read_text,
    sub_folders,
)
from pipeline.data.sources.index import SourceError

LIST_FOLDERS = ("ImageSets/Main", "ImageSets", "imagesets/main")


@dataclass(frozen=True)
class VocEntry:
    """An entry of a split: its name, and its XML file if there is one."""

    name: str
    xml: Path | None


@dataclass(frozen=True)
class VocFiles:
    """Files of a VOC folder."""

    xmls: tuple[Path, ...]  # annotation files of all splits
    entries: tuple[VocEntry, ...]  # of one split, in order


def find_files(root: Path, split: str) -> VocFiles:
    """Find the XML files of a folder and the entries of a split.

    Raises:
        SourceError: there is no such folder or list, or no XML file.
    """
    if not root.is_dir():
        raise SourceError(f"{root}: no such folder")
    folders = list(sub_folders(root, ANNOTATION_FOLDERS))
    lists = [path for name in LIST_FOLDERS for path in sorted((root / name).glob("*.txt"))]
    places = folders if lists and folders else [root]
    xmls = tuple(path for place in places for path in files_below(place) if path.suffix.lower() == ".xml")
    if not lists:
        return VocFiles(xmls, tuple(_without_lists(root, split, xmls)))
    listing = next((path for path in lists if path.stem == split), None)
    if listing is None:
        known = ", ".join(dict.fromkeys(path.stem for path in lists))
        raise SourceError(f"{lists[0].parent / f'{split}.txt'}: no such list; available: {known}")
    by_name = {normal(path.stem): path for path in reversed(xmls)}
    lines = [line.strip() for line in read_text(listing).splitlines() if line.strip()]
    return VocFiles(xmls, tuple(dict.fromkeys(_entry(line, by_name) for line in lines)))


def _without_lists(root: Path, split: str, xmls: tuple[Path, ...]) -> Iterator[VocEntry]:
    """Entries of the folder of the split; of the whole folder if it has no folders of splits."""
    folder = next((root / name for name in (split, *SPLIT_NAMES.get(split, ())) if (root / name).is_dir()), root)
    others = {*SPLIT_NAMES, *(name for names in SPLIT_NAMES.values() for name in names)}
    known = sorted(path.name for path in root.iterdir() if path.is_dir() and path.name.lower() in others)
    if folder == root and known:
        raise SourceError(f"{root / split}: no such folder, and no list of that name; available: {', '.join(known)}")
    inside = [path for path in xmls if path.is_relative_to(folder)]
    if not inside:
        raise SourceError(f"{folder}: no XML files; expected them beside the images, or in Annotations")
    yield from (VocEntry(path.stem, path) for path in inside)


def _entry(line: str, by_name: dict[str, Path]) -> VocEntry:
    """The whole line, without the ending of a file, the folders before it or a last word, or its first word."""
    last = line.replace("\\", "/").rpartition("/")[2]
    words = line.split()
    for name in (line, line.rpartition(".")[0], last, last.rpartition(".")[0], " ".join(words[:-1]), words[0]):
        if name and (xml := by_name.get(normal(name))) is not None:
            return VocEntry(name, xml)
    return VocEntry(words[0], None)


class ImageFinder:
    """Image of an XML file, by listings of the folders that are read once each."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._listings: dict[Path, dict[str, list[Path]]] = {}

    def find(self, xml: Path, name: str, written: str) -> Path:
        """Path of the image; where none exists, the one that was expected.

        Args:
            name: of the entry; its image usually has it.
            written: `filename` of the XML.
        """
        written_name = written.replace("\\", "/").rpartition("/")[2].strip()
        ending = Path(written_name).suffix
        places = [*self._folders_beside(xml), xml.parent]
        for stem in (name, Path(written_name).stem):
            for place in places:
                found = self._listing(place).get(normal(stem), []) if stem else []
                exact = [path for path in found if path.suffix.lower() == ending.lower()]
                if found:
                    return (exact or found)[0]
        return places[0] / f"{name}{ending or '.jpg'}"

    def _folders_beside(self, xml: Path) -> Iterator[Path]:
        """Folders of images beside a folder above the XML, in the data set, with the folders in between."""
        for parent in xml.parents:
            for folder in sub_folders(parent, IMAGE_FOLDERS):
                inner = xml.parent.relative_to(parent).parts[1:]
                yield from (folder.joinpath(*inner), folder)
            if parent == self._root:
                return

    def _listing(self, folder: Path) -> dict[str, list[Path]]:
        if folder not in self._listings:
            listing: dict[str, list[Path]] = {}
            for path in sorted(folder.iterdir()) if folder.is_dir() else []:
                if path.suffix.lower() not in COMPANIONS and not path.name.startswith("."):
                    listing.setdefault(normal(path.stem), []).append(path)
            self._listings[folder] = listing
        return self._listings[folder]
