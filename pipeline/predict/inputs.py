"""Prediction inputs: image files, folders, patterns, videos and shard sets, flattened into one indexed sequence of images.

Image n of the sequence is located by arithmetic: sources come in the order in which they were given, each with a known
number of images. A part of the work is therefore an index range, and listing the inputs again gives the same sequence.
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
import PIL.Image
import pyarrow as pa
from numpy.typing import NDArray
from pyarrow import fs

from dfine_core.images import SUFFIXES, read_image
from pipeline import storage
from pipeline.config import ConfigError
from pipeline.data.prepare.image_files import read_image_file
from pipeline.data.shards.manifest import MANIFEST_NAME, ShardSet, load_shards
from pipeline.data.shards.reader import locate_row_groups, read_row_groups, refuse_changed_files

VIDEO_SUFFIXES = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv")
SHARD_COLUMNS = ("image_id", "file_name", "image")


@dataclass(frozen=True)
class InputSource:
    """Image file, video or shard set."""

    kind: Literal["image", "video", "shards"]
    uri: str
    num_images: int
    fingerprint: str  # changes with the content: size of a file, digest of a manifest


@dataclass(frozen=True)
class InputImage:
    """Image of the sequence, possibly not read yet."""

    image_id: int
    file_name: str
    content: str | bytes | NDArray[np.uint8]  # URI, encoded, or [H, W, 3] RGB
    frame: int | None = None  # index of the video frame, from 0
    seconds: float | None = None  # time from the start of the video


@dataclass(frozen=True)
class MissingFrame:
    """Image of the sequence that cannot be fetched: a frame that the video does not have."""

    image_id: int
    file_name: str
    detail: str
    frame: int | None = None


@dataclass(frozen=True)
class Inputs:
    """Sequence of images, over all sources."""

    sources: tuple[InputSource, ...]
    frame_stride: int  # every n-th frame of a video is taken
    skipped_files: int  # files in folders that are neither images nor videos

    @cached_property
    def offsets(self) -> list[int]:
        """Index of the first image of each source; the last element is the total."""
        return [0, *accumulate(source.num_images for source in self.sources)]

    @property
    def num_images(self) -> int:
        """Images of all sources together."""
        return self.offsets[-1]

    @property
    def digest(self) -> str:
        """SHA-256 over all that defines the sequence."""
        content = [self.frame_stride, [asdict(source) for source in self.sources]]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    @property
    def shard_set(self) -> ShardSet | None:
        """Shard set if it is the only source: it keeps its own image ids. Otherwise images are numbered from 1."""
        alone = len(self.sources) == 1 and self.sources[0].kind == "shards"
        return load_shards(self.sources[0].uri) if alone else None

    def __str__(self) -> str:
        names = {"image": "image file", "video": "video", "shards": "shard set"}
        counts = {name: sum(source.kind == kind for source in self.sources) for kind, name in names.items()}
        kinds = ", ".join(_counted(count, name) for name, count in counts.items() if count)
        skipped = f"; {_counted(self.skipped_files, 'other file')} skipped" if self.skipped_files else ""
        return f"{_counted(self.num_images, 'image')} ({kinds}{skipped})"


def list_inputs(given: Sequence[str], *, frame_stride: int = 1, leave_out: str | None = None) -> Inputs:
    """Expand paths and patterns into a sequence of images.

    Args:
        given: paths and URIs of images, videos, folders (including subfolders), shard sets (their folder or manifest), and
            patterns with *, ? and **.
        frame_stride: take every n-th frame of videos.
        leave_out: folder to leave out of folders and patterns: that of earlier results, which must not become inputs.

    Raises:
        UserError: an input does not exist, or none of them holds an image.
    """
    unique: dict[str, InputSource] = {}
    skipped_files = 0
    for name in given:
        sources, skipped = _expand(storage.absolute(name), frame_stride, leave_out)
        skipped_files += skipped
        unique |= {source.uri: source for source in sources if source.uri not in unique}
    if not unique:
        raise ConfigError(
            f"no images or videos in {', '.join(given)}; supported are"
            f" {', '.join(SUFFIXES + VIDEO_SUFFIXES)}, and shard sets"
        )
    return Inputs(tuple(unique.values()), frame_stride, skipped_files)


def _counted(count: int, name: str) -> str:
    return f"{count} {name}{'' if count == 1 else 's'}"


def _expand(uri: str, frame_stride: int, leave_out: str | None) -> tuple[list[InputSource], int]:
    """Expand one argument into sources, and count its files of other kinds."""
    # 1. A pattern: list everything below its longest fixed prefix.
    if re.search(r"[*?]", uri):
        base = re.split(r"[^/]*[*?]", uri, maxsplit=1)[0].rstrip("/") or "/"
        regex = _glob_regex(storage.resolve(uri)[1])
        infos = [info for info in _files_below(base, leave_out) if regex.fullmatch(info.path)]
        if not infos:
            raise ConfigError(f"{uri}: no file matches this pattern")
        return _file_sources(uri, infos, frame_stride)

    # 2. A shard set, by its folder or its manifest.
    filesystem, path = storage.resolve(uri)
    info = filesystem.get_file_info(path)
    if info.type == fs.FileType.NotFound:
        raise ConfigError(f"{uri}: there is no such file or folder")
    if uri.endswith(f"/{MANIFEST_NAME}") or storage.exists(storage.join(uri, MANIFEST_NAME)):
        return [_shard_source(uri)], 0

    # 3. A file, which is tried as an image whatever its suffix, or a folder.
    if info.type == fs.FileType.File:
        known = uri.lower().endswith(SUFFIXES + VIDEO_SUFFIXES)
        source = _file_source(uri, info.size, frame_stride) if known else InputSource("image", uri, 1, f"{info.size}")
        return [source], 0
    return _file_sources(uri, _files_below(uri, leave_out), frame_stride)


def _file_sources(uri: str, infos: Sequence[fs.FileInfo], frame_stride: int) -> tuple[list[InputSource], int]:
    scheme = f"{uri.split('://', 1)[0]}://" if "://" in uri and not uri.startswith("file://") else ""
    taken = [info for info in infos if info.path.lower().endswith(SUFFIXES + VIDEO_SUFFIXES)]
    sources = [_file_source(scheme + info.path, info.size, frame_stride) for info in taken]
    return sources, len(infos) - len(taken)


def _files_below(uri: str, leave_out: str | None) -> list[fs.FileInfo]:
    """List all files except hidden ones and those in the folder to leave out, sorted by path."""
    filesystem, path = storage.resolve(uri)
    infos = filesystem.get_file_info(fs.FileSelector(path, recursive=True, allow_not_found=True))
    files = [info for info in infos if info.type == fs.FileType.File and not info.base_name.startswith(".")]
    if leave_out is not None and type(storage.resolve(leave_out)[0]) is type(filesystem):
        left_out = f"{storage.resolve(leave_out)[1]}/"
        files = [info for info in files if not info.path.startswith(left_out)]
    return sorted(files, key=lambda info: info.path)


def _glob_regex(pattern: str) -> re.Pattern[str]:
    """Translate a pattern: * and ? stay within a folder, **/ matches any number of folders."""
    wildcards = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    tokens = re.split(r"(\*\*/|\*\*|\*|\?)", pattern)
    return re.compile("".join(wildcards.get(token, re.escape(token)) for token in tokens))


def _shard_source(uri: str) -> InputSource:
    shards = load_shards(uri)
    refuse_changed_files(shards)
    return InputSource("shards", shards.uri, shards.manifest.images, shards.manifest.digest)


def _file_source(uri: str, size: int, frame_stride: int) -> InputSource:
    if not uri.lower().endswith(VIDEO_SUFFIXES):
        return InputSource("image", uri, 1, f"{size}")
    with _opened_video(uri) as video:
        frames = int(video.get(cv2.CAP_PROP_FRAME_COUNT))
        if frames <= 0:  # a stream without an index: count its frames
            frames = 0
            while video.grab():
                frames += 1
    # At least one image, so that a broken video is reported as rejected instead of ignored.
    return InputSource("video", uri, max(1, -(-frames // frame_stride)), f"{size}")


# Reading


def decode_input(source: InputImage) -> PIL.Image.Image:
    """Read and decode an image to RGB. Files are turned upright; rows of a shard set were, by `dfine prepare`.

    Raises:
        BadImageError, ImageError: there is no such file, or it is not an image that can be used.
    """
    if isinstance(source.content, str):
        return read_image(read_image_file(source.content))
    return read_image(source.content, upright=False)


def read_images(inputs: Inputs, first: int, stop: int) -> Iterator[InputImage | MissingFrame]:
    """Yield images first..stop of the sequence, in order.

    Image files are yielded by name only, so that the threads that decode them also read them in parallel.
    """
    own_ids = len(inputs.sources) == 1
    index = first
    while index < stop:
        position = bisect_right(inputs.offsets, index) - 1
        source, offset = inputs.sources[position], inputs.offsets[position]
        end = min(stop, inputs.offsets[position + 1])
        if source.kind == "image":
            yield InputImage(index + 1, source.uri, source.uri)
        elif source.kind == "video":
            yield from _frames(source.uri, index - offset, end - offset, inputs.frame_stride, first_id=index + 1)
        else:
            yield from _rows(source.uri, index - offset, end - offset, None if own_ids else index + 1)
        index = end


def _rows(uri: str, first: int, stop: int, first_id: int | None) -> Iterator[InputImage]:
    """Yield rows first..stop of a shard set, one row group in memory at a time."""
    located = locate_row_groups(load_shards(uri))
    offsets = np.cumsum(located.rows) - located.rows
    for group in np.flatnonzero((offsets < stop) & (offsets + located.rows > first)).tolist():
        offset = int(offsets[group])
        table: pa.Table = read_row_groups(located, [group], SHARD_COLUMNS)[group]
        low, high = max(first, offset), min(stop, offset + table.num_rows)
        for index, row in enumerate(table.slice(low - offset, high - low).to_pylist(), start=low):
            image_id = row["image_id"] if first_id is None else first_id + index - first
            yield InputImage(image_id, row["file_name"], row["image"])


def _frames(
    uri: str, first: int, stop: int, frame_stride: int, *, first_id: int
) -> Iterator[InputImage | MissingFrame]:
    """Yield images first..stop of a video; image n is frame n * frame_stride."""
    with _opened_video(uri) as video:
        reason = "the video ends or breaks before this frame" if video.isOpened() else "the video cannot be opened"
        position = _seek(video, first * frame_stride)
        rate = video.get(cv2.CAP_PROP_FPS) or 0.0
        for index in range(first, stop):
            image_id, frame = first_id + index - first, index * frame_stride
            while position < frame and video.grab():
                position += 1
            decoded, pixels = video.read() if position == frame else (False, None)
            if not decoded:
                yield MissingFrame(image_id, f"{uri}#frame={frame}", reason, frame)
                continue
            position += 1
            rgb = np.ascontiguousarray(np.asarray(pixels, np.uint8)[:, :, ::-1])
            yield InputImage(image_id, f"{uri}#frame={frame}", rgb, frame, frame / rate if rate > 0 else None)


def _seek(video: Any, frame: int) -> int:
    """Seek to a frame and return the frame reached, which may be an earlier one."""
    if frame and not (video.set(cv2.CAP_PROP_POS_FRAMES, frame) and video.get(cv2.CAP_PROP_POS_FRAMES) == frame):
        video.set(cv2.CAP_PROP_POS_FRAMES, 0)
    return int(video.get(cv2.CAP_PROP_POS_FRAMES))


@contextmanager
def _opened_video(uri: str) -> Iterator[Any]:
    """Open a video with OpenCV, which reads local files only: a remote one is copied to a temporary file."""
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
