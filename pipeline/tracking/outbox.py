"""Outbox: the folder in which the log of a run waits for the MLflow server.

run.json           the run's key, its start, whether it has begun; written by the training
records.jsonl      params, metrics, tags, status
artifacts.jsonl    artifacts and models, whose content is in files/ until it is uploaded
uploaded.json      MLflow's run id and the uploaded part of each event log; written by the uploader
rejected.jsonl     events that the server refused for good, with its reason

There are two locks: one process at a time writes, and one uploads. They are separate because an upload may hang in a request
after its process has handed the run on, and the next process must not wait for that.
"""

import fcntl
import json
import os
import shutil
import threading
import time
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from pipeline.errors import UserError
from pipeline.storage import write_atomic

Event = dict[str, Any]
TAIL_BYTES = 1 << 16  # read at once when looking for the end of the last line


class OutboxInUseError(UserError, RuntimeError):
    """An outbox that another process writes to."""


@dataclass
class RunIdentity:
    """Key and start of the run, chosen here: they must be known while the server is not."""

    run_key: str
    started_at: int  # milliseconds since 1970
    begun: bool = False


@dataclass
class UploadedPart:
    """MLflow's id of the run, and the uploaded part of each event log in bytes."""

    run_id: str | None = None
    records: int = 0
    artifacts: int = 0


class Outbox:
    """Event logs and file contents of one run; intact after the death of its process at any moment.

    Raises:
        ValueError: the folder belongs to another run than `run_key`.
        OutboxInUseError: another process writes to it.
    """

    def __init__(self, path: Path, run_key: str | None) -> None:
        self.path = path
        self.files = path / "files"
        self.files.mkdir(parents=True, exist_ok=True)
        self._upload_lock: IO[bytes] | None = None
        writer_lock = _try_lock(path / "writer.lock")
        if writer_lock is None:
            raise OutboxInUseError(f"{path} is written to by another process: close its Tracker first")
        self._writer_lock = writer_lock
        try:
            self.identity = self._read_identity(run_key)
        except ValueError:
            self.release_writer_lock()
            raise
        self.uploaded = self._read_uploaded()
        self.records = EventLog(path / "records.jsonl", self.uploaded.records)
        self.artifacts = EventLog(path / "artifacts.jsonl", self.uploaded.artifacts)

    def try_upload_lock(self) -> bool:
        """Try to become the uploading process; on success, continue where the one before it ended."""
        if self._upload_lock is None:
            self._upload_lock = _try_lock(self.path / "upload.lock")
            if self._upload_lock is not None:
                self.uploaded = self._read_uploaded()
                self.records.continue_from(self.uploaded.records)
                self.artifacts.continue_from(self.uploaded.artifacts)
        return self._upload_lock is not None

    def release_writer_lock(self) -> None:
        """Let another process write."""
        self._writer_lock.close()

    @property
    def pending(self) -> int:
        """Number of events not yet uploaded."""
        return self.records.pending + self.artifacts.pending

    def mark_begun(self) -> None:
        """Note that the run's params and tags are in the log."""
        self.identity.begun = True
        self._save_identity()

    def save_uploaded(self) -> None:
        """Note how far the upload is."""
        self.uploaded.records, self.uploaded.artifacts = self.records.offset, self.artifacts.offset
        write_atomic(self.path / "uploaded.json", json.dumps(asdict(self.uploaded)).encode())

    def store_content(self, source: Path | bytes, name: str) -> str:
        """Copy a file, a folder or bytes under its final name into `files`; return its path in there."""
        stored = Path(uuid.uuid4().hex) / name
        target = self.files / stored
        target.parent.mkdir()
        if isinstance(source, bytes):
            target.write_bytes(source)
        elif source.is_dir():
            shutil.copytree(source, target)
        else:
            shutil.copyfile(source, target)
        return str(stored)

    def remove_content(self, event: Event) -> None:
        """Remove the content of an uploaded event."""
        if "file" in event:
            shutil.rmtree((self.files / event["file"]).parent, ignore_errors=True)

    def reject(self, event: Event, reason: str) -> None:
        """Add an event to `rejected.jsonl`."""
        with (self.path / "rejected.jsonl").open("a") as stream:
            stream.write(json.dumps({"reason": reason, "event": event}) + "\n")

    def sync(self) -> None:
        """Write all events to disk, so that they survive a crash of the machine."""
        self.records.sync()
        self.artifacts.sync()

    def close(self) -> None:
        """Close the event logs, and release the upload lock."""
        self.records.close()
        self.artifacts.close()
        if self._upload_lock is not None:
            self._upload_lock.close()

    def _read_uploaded(self) -> UploadedPart:
        return UploadedPart(**_read_json(self.path / "uploaded.json"))

    def _read_identity(self, run_key: str | None) -> RunIdentity:
        stored = _read_json(self.path / "run.json")
        if not stored:
            self.identity = RunIdentity(run_key=run_key or uuid.uuid4().hex, started_at=milliseconds(time.time()))
            self._save_identity()
            return self.identity
        identity = RunIdentity(**stored)
        if run_key not in (None, identity.run_key):
            raise ValueError(
                f"{self.path} holds the run with run_key {identity.run_key}, not {run_key}: choose another folder"
            )
        return identity

    def _save_identity(self) -> None:
        write_atomic(self.path / "run.json", json.dumps(asdict(self.identity)).encode())


class EventLog:
    """File of events, one JSON object per line, appended by the training and read by the uploader.

    It survives the death of its process at any moment: an unfinished line does not count. Any thread may append, one reads.
    Numbers that are not finite are legal.

    Args:
        offset: bytes from the start that are already uploaded.
    """

    def __init__(self, path: Path, offset: int) -> None:
        self._writer = path.open("ab", buffering=0)
        self._reader = path.open("rb")
        self._appending = threading.Lock()
        self._unsynced = False
        _drop_torn_line(path)
        self.continue_from(offset)

    def continue_from(self, offset: int) -> None:
        """Count everything behind `offset` as pending."""
        with self._appending:
            end = self._reader.seek(0, os.SEEK_END)
            self.offset = min(offset, end)  # a machine that crashed may have kept the offset and lost the events
            self._reader.seek(self.offset)
            self.pending = sum(1 for _ in self._reader)

    def append(self, event: Event) -> None:
        """Append an event, in one write of one line.

        Raises:
            OSError: the disk is full or gone.
        """
        line = json.dumps(event, separators=(",", ":")).encode() + b"\n"
        with self._appending:
            if self._writer.write(line) != len(line):
                raise OSError(f"{self._writer.name}: an event of {len(line)} bytes was cut short: is the disk full?")
            self.pending += 1
            self._unsynced = True

    def sync(self) -> None:
        """Write all events to disk, so that they survive a crash of the machine."""
        if self._unsynced:
            self._unsynced = False
            os.fsync(self._writer.fileno())

    def read(self, limit: int) -> list[tuple[Event, int]]:
        """Read the next events without advancing; each comes with the offset behind it."""
        self._reader.seek(self.offset)
        events: list[tuple[Event, int]] = []
        while len(events) < limit and (line := self._reader.readline()).endswith(b"\n"):
            events.append((_parse(line), self._reader.tell()))
        return events

    def advance(self, count: int, offset: int) -> None:
        """Count the next `count` events, which end at `offset`, as uploaded."""
        with self._appending:
            self.pending -= count
            self.offset = offset

    def close(self) -> None:
        """Close the file."""
        self._reader.close()
        self._writer.close()


def milliseconds(seconds: float) -> int:
    """Convert seconds to whole milliseconds."""
    return round(seconds * 1000)


def _drop_torn_line(path: Path) -> None:
    """Cut the file behind its last newline."""
    with path.open("rb+") as file:
        size = end = file.seek(0, os.SEEK_END)
        while end > 0:
            start = max(0, end - TAIL_BYTES)
            file.seek(start)
            newline = file.read(end - start).rfind(b"\n")
            end = start + newline + 1
            if newline >= 0:
                break
        if end < size:
            file.truncate(end)


def _parse(line: bytes) -> Event:
    try:
        event = json.loads(line)
    except ValueError:
        event = None
    return event if isinstance(event, dict) else {"kind": "unreadable", "line": line.decode(errors="replace")}


def _try_lock(path: Path) -> IO[bytes] | None:
    """Lock a file until it is closed or the process ends in any way; None if another process holds the lock."""
    file = path.open("ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file


def _read_json(path: Path) -> Event:
    return json.loads(path.read_bytes()) if path.exists() else {}
