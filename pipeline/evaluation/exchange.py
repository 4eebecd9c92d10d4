"""Files between the workers of an evaluation: rows that can be read class by class, and arrays.

No memory grows with the number of images: rows are written in chunks, by class within each chunk. Nothing waits in a
collective, which would time out while another worker computes for minutes.
"""

import io
import logging
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from pipeline import storage

Rows = NDArray[np.void]  # structured
NAMED_AFTER_SECONDS = 60.0  # of waiting for the files of other workers

log = logging.getLogger(__name__)


class ClassWriter:
    """Writer of rows, chunk after chunk, into one file."""

    def __init__(self, stream: IO[bytes], classes: int):
        self._stream, self._classes = stream, classes
        self._counts: list[NDArray[np.int64]] = []

    def write(self, label: NDArray[np.int32], rows: Rows) -> None:
        """Write a chunk; rows of one class stay in their order."""
        small = label.astype(np.min_scalar_type(self._classes))  # NumPy sorts small integers by radix
        order = np.argsort(small, kind="stable")
        self._stream.write(rows[order].tobytes())
        self._counts.append(np.bincount(label, minlength=self._classes))

    @property
    def counts(self) -> NDArray[np.int64]:
        """[chunks, K] number of rows, which a reader needs."""
        return np.array(self._counts, np.int64).reshape(-1, self._classes)


@dataclass(frozen=True)
class ClassFile:
    """Rows of one worker."""

    uri: str
    row: np.dtype[np.void]
    counts: NDArray[np.int64]  # [chunks, K] number of rows

    def read(self, classes: range) -> Iterator[tuple[NDArray[np.int32], Rows]]:
        """Read adjacent classes, a chunk at a time: labels and rows."""
        starts = np.concatenate([[0], self.counts.sum(1).cumsum()])
        with storage.open_random(self.uri) as stream:
            for start, counts in zip(starts, self.counts, strict=False):
                wanted = counts[classes.start : classes.stop]
                stream.seek(int(start + counts[: classes.start].sum()) * self.row.itemsize)
                content = stream.read(int(wanted.sum()) * self.row.itemsize)
                if len(content) < wanted.sum() * self.row.itemsize:
                    raise OSError(f"{self.uri} ends early: {len(content)} bytes instead of {wanted.sum()} rows")
                rows = np.frombuffer(content, self.row)
                yield np.repeat(np.arange(classes.start, classes.stop, dtype=np.int32), wanted), rows


def read_classes(files: Sequence[ClassFile], classes: range) -> tuple[NDArray[np.int32], Rows]:
    """Read adjacent classes from the files of all workers."""
    chunks = [chunk for file in files for chunk in file.read(classes)]
    labels, rows = ([chunk[part] for chunk in chunks] for part in (0, 1))
    return (
        np.concatenate([np.zeros(0, np.int32), *labels]),
        np.concatenate([np.zeros(0, files[0].row), *rows]),
    )


def write_arrays(folder: str, name: str, **arrays: Any) -> None:
    """Write arrays to a file; a reader never sees a part of it."""
    content = io.BytesIO()
    np.savez(content, **arrays)
    storage.write_atomic(storage.join(folder, name), content.getvalue(), durable=False)


def read_arrays(folder: str, name: str) -> dict[str, NDArray[Any]]:
    """Read the arrays of a file."""
    with np.load(io.BytesIO(storage.read_bytes(storage.join(folder, name)))) as arrays:
        return dict(arrays)


def await_files(folder: str, names: Sequence[str]) -> None:
    """Wait until all files are there, however long the other workers compute; once a minute, name those that are missing.

    A worker that fails ends the training, and with it this wait.
    """
    pause_s, named_at = 0.002, time.monotonic()
    while missing := set(names) - storage.sizes(folder).keys():
        if time.monotonic() - named_at >= NAMED_AFTER_SECONDS:
            named_at = time.monotonic()
            log.warning("the evaluation waits for other workers to write %s", ", ".join(sorted(missing)))
        time.sleep(pause_s)
        pause_s = min(1.5 * pause_s, 1.0)


def _left(rank: int) -> str:
    return f"left-{rank:05d}"


@contextmanager
def exchange_folder(shared: str | None, rank: int, world_size: int, broadcast: Callable[[Any], Any]) -> Iterator[str]:
    """Make a folder that all workers can read, new for every evaluation. Collective.

    A worker alone takes one on its own disk. Several workers may be on several nodes, so they need `shared`, a folder or URI
    that is theirs alone: rank 0 removes what a killed evaluation left there, and the folder itself once all workers have left it.
    With fewer ranges of classes than workers, some have nothing to compute, and may still read when rank 0 has its report.

    Raises:
        ValueError: there are several workers and no shared folder.
    """
    if world_size == 1:
        with tempfile.TemporaryDirectory(prefix="evaluation-") as folder:
            yield folder
        return
    if shared is None:
        raise ValueError("an evaluation by several workers needs a folder that all of them can read")
    if rank == 0 and storage.exists(shared):
        storage.remove_folder(shared)
    try:
        # The name is new, so that no file of a killed evaluation is taken for one of this.
        folder = broadcast(storage.join(shared, uuid.uuid4().hex) if rank == 0 else None)
        yield folder
        if rank == 0:
            await_files(folder, [_left(other) for other in range(1, world_size)])
        else:
            storage.write_atomic(storage.join(folder, _left(rank)), b"left")
    finally:
        if rank == 0 and storage.exists(shared):
            storage.remove_folder(shared)
