"""Where shards live: local paths, `file://`, `s3://` and `gs://`, all through pyarrow.

S3 reads the usual environment variables; another server than Amazon's is named by AWS_ENDPOINT_URL.
"""

import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import IO, Any
from urllib.parse import unquote, urlsplit

from pyarrow import fs

from pipeline.errors import UserError

TEMPORARY_SUFFIX = ".tmp"
S3_VARIABLES = ("AWS_ENDPOINT_URL", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_ACCESS_KEY_ID")


class StorageError(UserError, ValueError):
    """A path or URI that names no place."""


def resolve(uri: str | os.PathLike[str]) -> tuple[fs.FileSystem, str]:
    """The file system of `uri` and the path on it.

    Raises:
        StorageError: the scheme is unknown, or an object store's URI names no bucket.
    """
    text = os.fspath(uri)
    if "://" not in text:
        return fs.LocalFileSystem(), os.path.abspath(text)
    parts = urlsplit(text)
    if parts.scheme == "file":
        return fs.LocalFileSystem(), os.path.abspath(unquote(parts.path))
    if parts.scheme not in ("s3", "gs"):
        raise StorageError(f"{text}: unknown scheme {parts.scheme!r}; use a local path, file://, s3:// or gs://")
    path = text.split("://", 1)[1].rstrip("/")
    if not parts.netloc:
        raise StorageError(f"{text}: names no bucket; write {parts.scheme}://BUCKET/FOLDER")
    if parts.scheme == "gs":
        return fs.GcsFileSystem(), path
    return _s3(*(os.environ.get(name) for name in S3_VARIABLES)), path


@lru_cache
def _s3(endpoint: str | None, region: str | None, other_region: str | None, key_id: str | None) -> fs.S3FileSystem:
    """Made once per setting: it keeps connections, and making it takes longer than a small request."""
    return fs.S3FileSystem(endpoint_override=endpoint, region=region or other_region)


def join(folder: str | os.PathLike[str], name: str) -> str:
    return f"{os.fspath(folder).rstrip('/')}/{name}"


def absolute(uri: str | os.PathLike[str]) -> str:
    """The same place for a process with another working directory."""
    text = os.fspath(uri)
    return text.rstrip("/") if "://" in text else os.path.abspath(text)


def stays_inside(name: str) -> bool:
    """Whether a relative path that somebody else wrote leads to a place inside its folder."""
    return bool(name) and not name.startswith("/") and ".." not in name.split("/") and "\0" not in name


def exists(uri: str | os.PathLike[str]) -> bool:
    filesystem, path = resolve(uri)
    return bool(filesystem.get_file_info(path).type != fs.FileType.NotFound)


def read_bytes(uri: str | os.PathLike[str]) -> bytes:
    """The whole file; FileNotFoundError if there is none."""
    filesystem, path = resolve(uri)
    with filesystem.open_input_stream(path, compression=None) as stream:
        return bytes(stream.read())


def read_json(uri: str | os.PathLike[str], *keys: str) -> Any:
    """The content of a JSON file; FileNotFoundError if there is none.

    Args:
        keys: that it must have.

    Raises:
        StorageError: it is damaged.
    """
    try:
        content = json.loads(read_bytes(uri))
    except ValueError as error:  # neither UTF-8 nor JSON
        raise StorageError(f"{os.fspath(uri)}: damaged, not JSON: {error}") from None
    missing = [key for key in keys if not isinstance(content, dict) or key not in content]
    if missing:
        raise StorageError(f"{os.fspath(uri)}: damaged, it has no {', '.join(missing)}")
    return content


def write_atomic(uri: str | os.PathLike[str], data: bytes) -> None:
    """Write a whole file that nobody can see half-written."""
    with open_atomic(uri) as stream:
        stream.write(data)


@contextmanager
def open_atomic(uri: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """A stream into a file that appears under its name only when the block has ended without an error.

    On a disk it is a temporary name in the same folder, then a move. An object store gets the finished file in one
    upload: closing its stream after an error would publish the half that was written.
    """
    filesystem, path = resolve(uri)
    if not isinstance(filesystem, fs.LocalFileSystem):
        with tempfile.TemporaryFile() as spool:
            yield spool
            spool.seek(0)
            with filesystem.open_output_stream(path, compression=None) as stream:
                shutil.copyfileobj(spool, stream, length=8 << 20)
        return
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}{TEMPORARY_SUFFIX}")
    try:
        with temporary.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def sizes(folder: str | os.PathLike[str]) -> dict[str, int]:
    """Bytes of every file in a folder, by name; empty if there is no such folder."""
    filesystem, path = resolve(folder)
    found = filesystem.get_file_info(fs.FileSelector(path, allow_not_found=True))
    return {info.base_name: info.size for info in found if info.type == fs.FileType.File}


def remove_folder(folder: str | os.PathLike[str]) -> None:
    filesystem, path = resolve(folder)
    filesystem.delete_dir(path)


def remove_temporaries(folder: str | os.PathLike[str]) -> None:
    """Delete what `open_atomic` left behind in a process that was killed."""
    filesystem, path = resolve(folder)
    for name in sizes(folder):
        if name.startswith(".") and name.endswith(TEMPORARY_SUFFIX):
            filesystem.delete_file(join(path, name))
