"""Format and splits of a folder, by what is in it: `dfine prepare auto`.

COCO files are recognised by their content, wherever tools put them (COCO, Roboflow, CVAT, Label Studio); YOLO by a YAML file
with `names`, or by classes.txt; VOC by its XML files.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from xml.etree import ElementTree

from pipeline.data.sources.coco import coco_source, image_names
from pipeline.data.sources.file_names import PROBES, most_hits
from pipeline.data.sources.folders import IMAGE_FOLDERS, SPLIT_NAMES, files_below, sub_folders
from pipeline.data.sources.index import DatasetSource, SourceError
from pipeline.data.sources.json_arrays import has_array
from pipeline.data.sources.voc import voc_source
from pipeline.data.sources.voc_files import LIST_FOLDERS
from pipeline.data.sources.yolo import CLASS_FILES, read_data, yolo_source

CANONICAL = {"training": "train", "valid": "val", "validation": "val", "testing": "test"}
SPLIT_WORD = re.compile(r"(?:^|[^a-z])((?:training|train|validation|valid|val|testing|test)\d*)(?=$|[^a-z0-9])")
COCO_KEYS = ("images", "annotations")


@dataclass(frozen=True)
class FoundSource:
    """A data set that was recognised."""

    kind: str
    text: str  # what it is and where, in words
    splits: dict[str, Callable[[], DatasetSource]]


def find_source(folder: Path) -> FoundSource:
    """Recognise the data set in a folder.

    Raises:
        SourceError: there is none, or several kinds, or two files for one split.
    """
    folder = folder.absolute()
    if not folder.is_dir():
        raise SourceError(f"{folder}: no such folder")
    problems: list[SourceError] = []
    found = [source for find in (_find_yolo, find_coco, _find_voc) if (source := find(folder, problems)) is not None]
    if not found:
        raise SourceError(
            f"{folder}: no data set was recognised: no COCO JSON, no YAML file with `names`, no classes.txt, no VOC XML;"
            " name the format instead of auto" + "".join(f"; {problem}" for problem in problems)
        )
    if len(found) > 1:
        kinds = "; ".join(source.text for source in found)
        raise SourceError(f"{folder}: it may be several things ({kinds}); name the format instead of auto")
    return found[0]


def find_coco(folder: Path, problems: list[SourceError]) -> FoundSource | None:
    """COCO files in a folder: in it, in `annotations`, or in the folders of its splits.

    Args:
        problems: files that cannot be read are added.
    """
    patterns = ("*.json", "*.json.gz", "*/*.json", "*/*.json.gz", "*/annotations/*.json")
    files = sorted({path for pattern in patterns for path in folder.glob(pattern) if not path.name.startswith(".")})
    files = [path for path in files if path.name.startswith("instances")] or files  # beside captions and keypoints
    by_split: dict[str, Path] = {}
    for path in files:
        try:
            if not has_array(str(path), COCO_KEYS, before=("categories",)):
                continue
        except SourceError as error:
            problems.append(error)
            continue
        split = _split_of(path.relative_to(folder))
        if split in by_split:
            names = f"{by_split[split].relative_to(folder)} and {path.relative_to(folder)}"
            raise SourceError(f"{folder}: {names} both seem to be the split {split}; name one with --annotations")
        by_split[split] = path
    if not by_split:
        return None
    sources = {split: partial(_coco_source, folder, path) for split, path in by_split.items()}
    listed = ", ".join(str(path.relative_to(folder)) for path in by_split.values())
    return FoundSource("coco", f"COCO: {listed}", {**sources})


def coco_in_folder(root: str, split: str) -> DatasetSource:
    """Source of a split in a COCO folder; where the file is not at COCO's own place, it is looked for."""
    annotations = f"{root}/annotations/instances_{split}.json"
    if "://" not in root and not Path(annotations).exists() and Path(root).is_dir():
        problems: list[SourceError] = []
        found = find_coco(Path(root).absolute(), problems)
        if found is None and problems:
            raise problems[0]
        splits = found.splits if found is not None else {}
        for name in (split, *SPLIT_NAMES.get(split, ())):
            if name in splits:
                return splits[name]()
    return coco_source(f"{root}/{split}", annotations)


def _coco_source(folder: Path, annotations: Path) -> DatasetSource:
    """Source of a COCO file, with the folder in which most of its first images are."""
    names = list(islice(image_names(str(annotations)), PROBES))
    beside = annotations.parent
    places = [beside, *sub_folders(beside, IMAGE_FOLDERS), folder, *sub_folders(folder, IMAGE_FOLDERS)]
    places += [inner for place in places[-1:] for inner in sorted(place.iterdir()) if inner.is_dir()]
    places += sorted(path for path in folder.iterdir() if path.is_dir())
    # Of folders with the same file names, as 1.jpg in each, the one that is called like the split of the annotations.
    split = _split_of(annotations.relative_to(folder)).rstrip("0123456789")

    def fit(place: Path) -> tuple[int, bool]:
        return most_hits(str(place), names), _split_of(place.relative_to(folder)).rstrip("0123456789") == split

    best = max(dict.fromkeys(places), key=fit)
    return coco_source(str(best), str(annotations))


def _split_of(path: Path) -> str:
    """Split that a file's name or folder speaks of; "train" for one that speaks of none."""
    for text in (path.name.partition(".")[0].lower(), *(part.lower() for part in reversed(path.parts[:-1]))):
        if match := SPLIT_WORD.search(text):
            return CANONICAL.get(match[1], match[1])
    return "train"


def _find_yolo(folder: Path, problems: list[SourceError]) -> FoundSource | None:
    try:
        source, content = read_data(folder, "train")
    except SourceError as error:
        if "name one of these" in str(error):
            raise
        if any(folder.glob("*.y*ml")):
            problems.append(error)
        return None
    known = [name for name in (*SPLIT_NAMES, *CANONICAL) if content.get(name)]
    if source.exists():
        splits = dict.fromkeys(CANONICAL.get(name, name) for name in known)
        text = f"YOLO: {source.name}"
    else:
        folders = [path.name for place in (folder, folder / "images") for path in place.glob("*") if path.is_dir()]
        splits = dict.fromkeys(
            CANONICAL.get(name, name) for name in sorted(folders) if name in (*SPLIT_NAMES, *CANONICAL)
        )
        splits = splits or {"train": None}
        text = f"YOLO: {next(name for name in CLASS_FILES if (folder / name).is_file())}"
    return (
        FoundSource("yolo", text, {split: partial(yolo_source, folder, split) for split in splits}) if splits else None
    )


def _find_voc(folder: Path, _problems: list[SourceError]) -> FoundSource | None:
    first = next((path for path in files_below(folder) if path.suffix.lower() == ".xml"), None)
    if first is None or not _is_voc(first):
        return None
    lists = [path.stem for name in LIST_FOLDERS for path in sorted((folder / name).glob("*.txt"))]
    names = list(_split_names(lists)) or list(_split_names(path.name for path in folder.iterdir() if path.is_dir()))
    sources = {CANONICAL.get(name, name): partial(voc_source, folder, name) for name in names or lists[:1] or ["train"]}
    return FoundSource("voc", f"VOC: {first.relative_to(folder)} and others", {**sources})


def _split_names(names: Iterable[str]) -> Iterator[str]:
    return (name for name in names if name.lower() in (*SPLIT_NAMES, *CANONICAL))


def _is_voc(path: Path) -> bool:
    try:
        for _, element in ElementTree.iterparse(path, events=("start",)):
            return element.tag == "annotation"
    except (ElementTree.ParseError, OSError, LookupError, ValueError):
        return True  # its encoding is for the source to read
    return False
