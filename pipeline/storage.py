"""Files by path or URI: local paths, `file://`, `s3://` and `gs://`, all through pyarrow.

S3 reads the usual environment variables; AWS_ENDPOINT_URL selects a server other than Amazon's.
"""

import errno
import hashlib
import io
import json
import os
import shutil
import stat
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import IO, Any
from urllib.parse import unquote, urlsplit

from pyarrow import fs

from pipeline.errors import DISK_FAULTS, UserError

TEMPORARY_SUFFIX = ".tmp"
HASH_BLOCK = 4 << 20  # bytes
S3_VARIABLES = ("AWS_ENDPOINT_URL", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_ACCESS_KEY_ID")


class StorageError(UserError, ValueError):
    """A path or URI that cannot be resolved, or a file whose content is damaged."""


def resolve(uri: str | os.PathLike[str]) -> tuple[fs.FileSystem, str]:
    """Return the file system of `uri` and the path on it.

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
def _s3(endpoint: str | None, region: str | None, other_region: str | None, _key_id: str | None) -> fs.S3FileSystem:
    """One client per setting: it keeps connections, and creating it takes longer than a small request.

    pyarrow reads the key from the environment; its id is an argument only to be part of the cache key.
    """
    return fs.S3FileSystem(endpoint_override=endpoint, region=region or other_region)


def join(folder: str | os.PathLike[str], *names: str) -> str:
    """Path or URI of something inside `folder`: `join("s3://bucket/run", "checkpoints", "step-00000010")`."""
    return "/".join([os.fspath(folder).rstrip("/"), *names])


def absolute(uri: str | os.PathLike[str]) -> str:
    """Make a path independent of the working directory; URIs stay as they are."""
    text = os.fspath(uri)
    return text.rstrip("/") if "://" in text else os.path.abspath(text)


def stays_inside(name: str) -> bool:
    """Check that a relative path from untrusted data stays inside its folder."""
    return bool(name) and not name.startswith("/") and ".." not in name.split("/") and "\0" not in name


def exists(uri: str | os.PathLike[str]) -> bool:
    """Check for a file or a folder."""
    filesystem, path = resolve(uri)
    return bool(filesystem.get_file_info(path).type != fs.FileType.NotFound)


def read_bytes(uri: str | os.PathLike[str]) -> bytes:
    """Read a whole file; FileNotFoundError if it does not exist."""
    filesystem, path = resolve(uri)
    with filesystem.open_input_stream(path, compression=None) as stream:
        return bytes(stream.read())


def read_regular_file(path: str | os.PathLike[str]) -> bytes:
    """Read a whole file of this machine. A pipe or a device, which may never end, is an OSError."""
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", os.fspath(path))
        return file.read()


def sha256(uri: str | os.PathLike[str]) -> str:
    """SHA-256 of a file as it is stored, in hex; FileNotFoundError if it does not exist."""
    filesystem, path = resolve(uri)
    digest = hashlib.sha256()
    with filesystem.open_input_stream(path, compression=None) as stream:
        while block := stream.read(HASH_BLOCK):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def open_random(uri: str | os.PathLike[str]) -> Iterator[Any]:
    """Open a file to read parts of it, by `seek` and `read`; FileNotFoundError if it does not exist."""
    filesystem, path = resolve(uri)
    with filesystem.open_input_file(path) as stream:
        yield stream


def read_json(uri: str | os.PathLike[str], *keys: str) -> Any:
    """Read a JSON file; FileNotFoundError if it does not exist.

    Args:
        keys: required keys.

    Raises:
        StorageError: the content is not JSON or lacks a key.
    """
    try:
        content = json.loads(read_bytes(uri))
    except (ValueError, RecursionError) as error:  # neither UTF-8 nor JSON, or nested too deeply
        raise StorageError(f"{os.fspath(uri)}: damaged, not JSON: {error}") from None
    missing = [key for key in keys if not isinstance(content, dict) or key not in content]
    if missing:
        raise StorageError(f"{os.fspath(uri)}: damaged, it has no {', '.join(missing)}")
    return content


def write_atomic(uri: str | os.PathLike[str], data: bytes, *, durable: bool = True) -> None:
    """Write a whole file; a reader never sees a part of it. For `durable` see `open_atomic`."""
    with open_atomic(uri, durable=durable) as stream:
        stream.write(data)


@contextmanager
def open_atomic(uri: str | os.PathLike[str], *, durable: bool = True) -> Iterator[IO[bytes]]:
    """Open a stream into a file that appears under its name only if the block ends without an error.

    On a disk the data goes to a temporary name in the same folder, then is renamed. An object store receives the finished
    file in one upload: closing its own stream after an error would publish the part that was written.

    Args:
        durable: the file survives a crash of the machine; the disk is waited for.
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
    with named_in_errors(path):
        target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}{TEMPORARY_SUFFIX}")
    try:
        with io.BufferedWriter(_NamedFile(temporary, path)) as stream:
            yield stream
            with named_in_errors(path):
                stream.flush()
                if durable:
                    os.fsync(stream.fileno())
        with named_in_errors(path):
            temporary.replace(target)
    finally:
        if temporary.exists():
            temporary.unlink()


class _NamedFile(io.FileIO):
    """A new file for writing, whose errors name the path that it will have."""

    def __init__(self, file: Path, path: str) -> None:
        self._path = path
        with named_in_errors(path):
            super().__init__(file, "wb")

    def write(self, data: Any, /) -> int:
        with named_in_errors(self._path):
            return super().write(data)


@contextmanager
def named_in_errors(path: str) -> Iterator[None]:
    """Give an OSError from writing a file its path: that of a full disk has none, others name a temporary file."""
    try:
        yield
    except OSError as error:
        if error.errno in DISK_FAULTS and (error.filename is None or str(error.filename).endswith(TEMPORARY_SUFFIX)):
            raise OSError(error.errno, error.strerror or os.strerror(error.errno or 0), path) from error
        raise


def sizes(folder: str | os.PathLike[str]) -> dict[str, int]:
    """Size in bytes of every file in a folder, by name; empty if the folder does not exist."""
    filesystem, path = resolve(folder)
    listing = filesystem.get_file_info(fs.FileSelector(path, allow_not_found=True))
    return {info.base_name: info.size for info in listing if info.type == fs.FileType.File}


def names(folder: str | os.PathLike[str]) -> list[str]:
    """Names of all files and folders directly inside a folder; empty if the folder does not exist."""
    filesystem, path = resolve(folder)
    listing = filesystem.get_file_info(fs.FileSelector(path, allow_not_found=True))
    return [info.base_name for info in listing]


def remove_file(uri: str | os.PathLike[str]) -> None:
    """Delete a file, if it exists."""
    filesystem, path = resolve(uri)
    if filesystem.get_file_info(path).type != fs.FileType.NotFound:
        filesystem.delete_file(path)


def remove_folder(folder: str | os.PathLike[str]) -> None:
    """Delete a folder with everything in it."""
    filesystem, path = resolve(folder)
    filesystem.delete_dir(path)


def remove_temporaries(folder: str | os.PathLike[str]) -> None:
    """Delete the temporary files of processes that were killed inside `open_atomic`."""
    filesystem, path = resolve(folder)
    for name in sizes(folder):
        if name.startswith(".") and name.endswith(TEMPORARY_SUFFIX):
            filesystem.delete_file(join(path, name))
