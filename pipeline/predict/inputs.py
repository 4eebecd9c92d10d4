"""What to detect in: image files, folders, patterns, videos and shard sets, as one numbered row of pictures.

Number n of the row is found by arithmetic: sources stand in the order of their names, each with as many pictures as it
holds. So a part of the work is a range of numbers, and the row is the same whenever it is listed again.
"""

import hashlib
import json
import os
import re
import shutil
import tempfile
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any, Literal

import cv2
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyarrow import fs

from pipeline import storage
from pipeline.config import ConfigError
from pipeline.data.shards.manifest import MANIFEST_NAME, ShardSet, load_shards
from pipeline.data.shards.reader import RowGroups, locate_row_groups, read_row_groups, refuse_changed_files

IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm")
VIDEOS = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv")
SHARD_COLUMNS = ("image_id", "file_name", "image")


@dataclass(frozen=True)
class Source:
    kind: Literal["image", "video", "shards"]
    uri: str
    pictures: int
    state: str  # changes with the content: bytes of a file, digest of a manifest


@dataclass(frozen=True)
class Picture:
    """One picture of the row, perhaps not read yet."""

    image_id: int
    file_name: str
    content: str | bytes | NDArray[np.uint8]  # URI, encoded, or [H, W, 3] RGB
    frame: int | None = None  # of a video, from 0
    seconds: float | None = None  # into the video


@dataclass(frozen=True)
class Unreadable:
    """One picture of the row that cannot even be fetched: a frame that the video does not have."""

    image_id: int
    file_name: str
    detail: str
    frame: int | None = None


@dataclass(frozen=True)
class Inputs:
    sources: tuple[Source, ...]
    every: int  # frame of a video that is taken
    passed_over: int  # files of folders that are neither images nor videos

    @cached_property
    def begins(self) -> list[int]:
        """Number of each source's first picture, and at the end that of all pictures."""
        return [0, *accumulate(source.pictures for source in self.sources)]

    @property
    def pictures(self) -> int:
        return self.begins[-1]

    @property
    def digest(self) -> str:
        """SHA-256 over what the row is made of."""
        content = [self.every, [asdict(source) for source in self.sources]]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    @property
    def shard_set(self) -> ShardSet | None:
        """The shard set that is all there is, whose own image ids are kept; otherwise images are numbered from 1."""
        alone = len(self.sources) == 1 and self.sources[0].kind == "shards"
        return load_shards(self.sources[0].uri) if alone else None

    def __str__(self) -> str:
        kinds = {"image": "images", "video": "videos", "shards": "shard sets"}
        counts = {name: sum(source.kind == kind for source in self.sources) for kind, name in kinds.items()}
        listed = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
        others = f"; {self.passed_over} files of other kinds passed over" if self.passed_over else ""
        return f"{self.pictures} pictures ({listed}{others})"


def list_inputs(given: Sequence[str], *, every: int = 1) -> Inputs:
    """
    Args:
        given: paths and URIs of images, videos, folders (with all below them), shard sets (their folder or manifest), and
            patterns with *, ? and **.
        every: take each n-th frame of videos.

    Raises:
        UserError: naming what is not there, or that nothing was found.
    """
    found: dict[str, Source] = {}
    passed_over = 0
    for name in given:
        sources, others = _listed(storage.absolute(name), every)
        passed_over += others
        found |= {source.uri: source for source in sources if source.uri not in found}
    if not found:
        raise ConfigError(
            f"no images or videos in {', '.join(given)}; known are {', '.join(IMAGES + VIDEOS)}, and shard sets"
        )
    return Inputs(tuple(found.values()), every, passed_over)


def _listed(uri: str, every: int) -> tuple[list[Source], int]:
    """What one argument stands for, and how many files of it are of other kinds."""
    if re.search(r"[*?]", uri):
        base = re.split(r"[^/]*[*?]", uri, maxsplit=1)[0].rstrip("/") or "/"
        wanted = _pattern(storage.resolve(uri)[1])
        infos = [info for info in _files_below(base) if wanted.fullmatch(info.path)]
        if not infos:
            raise ConfigError(f"{uri}: no file fits this pattern")
        return _of_files(uri, infos, every)
    filesystem, path = storage.resolve(uri)
    info = filesystem.get_file_info(path)
    if info.type == fs.FileType.NotFound:
        raise ConfigError(f"{uri}: there is no such file or folder")
    if uri.endswith(f"/{MANIFEST_NAME}") or storage.exists(storage.join(uri, MANIFEST_NAME)):
        return [_shard_source(uri)], 0
    if info.type == fs.FileType.File:
        known = uri.lower().endswith(IMAGES + VIDEOS)
        return ([_file_source(uri, info.size, every)] if known else [Source("image", uri, 1, f"{info.size}")]), 0
    return _of_files(uri, _files_below(uri), every)


def _of_files(uri: str, infos: Sequence[fs.FileInfo], every: int) -> tuple[list[Source], int]:
    scheme = f"{uri.split('://', 1)[0]}://" if "://" in uri and not uri.startswith("file://") else ""
    taken = [info for info in infos if info.path.lower().endswith(IMAGES + VIDEOS)]
    return [_file_source(scheme + info.path, info.size, every) for info in taken], len(infos) - len(taken)


def _files_below(uri: str) -> list[fs.FileInfo]:
    """All files, in the order of their paths; hidden ones are left out."""
    filesystem, path = storage.resolve(uri)
    infos = filesystem.get_file_info(fs.FileSelector(path, recursive=True, allow_not_found=True))
    files = [info for info in infos if info.type == fs.FileType.File and not info.base_name.startswith(".")]
    return sorted(files, key=lambda info: info.path)


def _pattern(path: str) -> re.Pattern[str]:
    """Of a path in which * and ? stay within a folder, and **/ is any number of folders."""
    signs = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    parts = re.split(r"(\*\*/|\*\*|\*|\?)", path)
    return re.compile("".join(signs.get(part, re.escape(part)) for part in parts))


def _shard_source(uri: str) -> Source:
    shards = load_shards(uri)
    refuse_changed_files(shards)
    return Source("shards", shards.uri, shards.manifest.images, shards.manifest.digest)


def _file_source(uri: str, size: int, every: int) -> Source:
    if not uri.lower().endswith(VIDEOS):
        return Source("image", uri, 1, f"{size}")
    with _opened_video(uri) as video:
        frames = int(video.get(cv2.CAP_PROP_FRAME_COUNT))
        if frames <= 0:  # a stream without an index: its frames are counted
            frames = 0
            while video.grab():
                frames += 1
    return Source("video", uri, max(1, -(-frames // every)), f"{size}")  # 1: a broken one is not lost, but rejected


# Reading


def read_pictures(inputs: Inputs, first: int, stop: int) -> Iterator[Picture | Unreadable]:
    """Pictures first..stop of the row, in order. Image files are named only: who decodes them reads them, side by side."""
    own_ids = len(inputs.sources) == 1
    number = first
    while number < stop:
        place = bisect_right(inputs.begins, number) - 1
        source, begin = inputs.sources[place], inputs.begins[place]
        upto = min(stop, inputs.begins[place + 1])
        if source.kind == "image":
            yield Picture(number + 1, source.uri, source.uri)
        elif source.kind == "video":
            yield from _frames(source.uri, number - begin, upto - begin, inputs.every, first_id=number + 1)
        else:
            yield from _rows(source.uri, number - begin, upto - begin, None if own_ids else number + 1)
        number = upto


def _rows(uri: str, first: int, stop: int, first_id: int | None) -> Iterator[Picture]:
    """Rows first..stop of a shard set, a row group at a time."""
    located = _located(uri)
    begins = np.cumsum(located.rows) - located.rows
    for group in np.flatnonzero((begins < stop) & (begins + located.rows > first)).tolist():
        begin = int(begins[group])
        table: pa.Table = read_row_groups(located, [group], SHARD_COLUMNS)[group]
        low, high = max(first, begin), min(stop, begin + table.num_rows)
        for number, row in enumerate(table.slice(low - begin, high - low).to_pylist(), start=low):
            image_id = row["image_id"] if first_id is None else first_id + number - first
            yield Picture(image_id, row["file_name"], row["image"])


def _located(uri: str) -> RowGroups:
    return locate_row_groups(load_shards(uri))


def _frames(uri: str, first: int, stop: int, every: int, *, first_id: int) -> Iterator[Picture | Unreadable]:
    """Every `every`-th frame of a video, from the first-th of these on."""
    with _opened_video(uri) as video:
        why = "the video ends or breaks before this frame" if video.isOpened() else "the video cannot be opened"
        at = _wind(video, first * every)
        rate = video.get(cv2.CAP_PROP_FPS) or 0.0
        for number in range(first, stop):
            image_id, frame = first_id + number - first, number * every
            while at < frame and video.grab():
                at += 1
            there, pixels = video.read() if at == frame else (False, None)
            if not there:
                yield Unreadable(image_id, f"{uri}#frame={frame}", why, frame)
                continue
            at += 1
            rgb = np.ascontiguousarray(np.asarray(pixels, np.uint8)[:, :, ::-1])
            yield Picture(image_id, f"{uri}#frame={frame}", rgb, frame, frame / rate if rate > 0 else None)


def _wind(video: Any, frame: int) -> int:
    """Go to a frame; the one that the video is at then, which may be an earlier one."""
    if frame and not (video.set(cv2.CAP_PROP_POS_FRAMES, frame) and video.get(cv2.CAP_PROP_POS_FRAMES) == frame):
        video.set(cv2.CAP_PROP_POS_FRAMES, 0)
    return int(video.get(cv2.CAP_PROP_POS_FRAMES))


@contextmanager
def _opened_video(uri: str) -> Iterator[Any]:
    """OpenCV reads files of this disk only: others are copied for the time being."""
    filesystem, path = storage.resolve(uri)
    with tempfile.NamedTemporaryFile(suffix=os.path.splitext(path)[1]) as copy:
        if not isinstance(filesystem, fs.LocalFileSystem):
            with filesystem.open_input_stream(path, compression=None) as stream:
                shutil.copyfileobj(stream, copy, length=8 << 20)
            copy.flush()
            path = copy.name
        video = cv2.VideoCapture(path)
        try:
            yield video
        finally:
            video.release()
