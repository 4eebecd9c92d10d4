"""The folder in which a run waits for its server.

run.json           the run's key, when it started, whether it has begun; written by the training
records.jsonl      params, metrics, tags, status
artifacts.jsonl    artifacts and models, whose content lies in files/ until it is delivered
delivered.json     MLflow's run id and how far each of the two is delivered; written by the delivery
rejected.jsonl     what the server refused for good, with its reason

Two locks: one process at a time writes, and one delivers. They are apart because a delivery may hang in a request after
its process has handed the run on, and the next one must not wait for that.
"""

import fcntl
import json
import shutil
import time
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from pipeline.errors import UserError
from pipeline.storage import write_atomic
from pipeline.tracking.event_log import Event, EventLog


class QueueInUseError(UserError, RuntimeError):
    """A tracking folder that another process writes to."""


@dataclass
class Identity:
    """Of the run, chosen here: it has to be known while the server is not."""

    run_key: str
    started_at: int  # milliseconds since 1970
    begun: bool = False


@dataclass
class Delivered:
    """What the server has."""

    run_id: str | None = None
    records: int = 0  # bytes
    artifacts: int = 0


class QueueFolder:
    """Whole after its process died at any moment.

    Raises:
        ValueError: the folder belongs to another run than `run_key`.
        QueueInUseError: another process writes to it.
    """

    def __init__(self, path: Path, run_key: str | None) -> None:
        self.path = path
        self.files = path / "files"
        self.files.mkdir(parents=True, exist_ok=True)
        self._delivery_lock: IO[bytes] | None = None
        writer_lock = _try_lock(path / "writer.lock")
        if writer_lock is None:
            raise QueueInUseError(f"{path} is written to by another process: close its Tracker first")
        self._writer_lock = writer_lock
        try:
            self.identity = self._read_identity(run_key)
        except ValueError:
            self.unlock_writing()
            raise
        self.delivered = self._read_delivered()
        self.records = EventLog(path / "records.jsonl", self.delivered.records)
        self.artifacts = EventLog(path / "artifacts.jsonl", self.delivered.artifacts)

    def lock_delivery(self) -> bool:
        """Whether this process delivers now. What the one before it delivered in the end is then known here."""
        if self._delivery_lock is None:
            self._delivery_lock = _try_lock(self.path / "delivery.lock")
            if self._delivery_lock is not None:
                self.delivered = self._read_delivered()
                self.records.continue_from(self.delivered.records)
                self.artifacts.continue_from(self.delivered.artifacts)
        return self._delivery_lock is not None

    def unlock_writing(self) -> None:
        self._writer_lock.close()

    @property
    def pending(self) -> int:
        """Events not yet delivered."""
        return self.records.pending + self.artifacts.pending

    def mark_begun(self) -> None:
        self.identity.begun = True
        self._save_identity()

    def save_delivered(self) -> None:
        self.delivered.records, self.delivered.artifacts = self.records.offset, self.artifacts.offset
        write_atomic(self.path / "delivered.json", json.dumps(asdict(self.delivered)).encode())

    def keep(self, source: Path | bytes, name: str) -> str:
        """Copy a file, a folder or bytes under its final name into `files`; its path in there."""
        kept = Path(uuid.uuid4().hex) / name
        target = self.files / kept
        target.parent.mkdir()
        if isinstance(source, bytes):
            target.write_bytes(source)
        elif source.is_dir():
            shutil.copytree(source, target)
        else:
            shutil.copyfile(source, target)
        return str(kept)

    def forget(self, event: Event) -> None:
        """Remove the content of a delivered event."""
        if "file" in event:
            shutil.rmtree((self.files / event["file"]).parent, ignore_errors=True)

    def reject(self, event: Event, reason: str) -> None:
        with (self.path / "rejected.jsonl").open("a") as stream:
            stream.write(json.dumps({"reason": reason, "event": event}) + "\n")

    def sync(self) -> None:
        self.records.sync()
        self.artifacts.sync()

    def close(self) -> None:
        self.records.close()
        self.artifacts.close()
        if self._delivery_lock is not None:
            self._delivery_lock.close()

    def _read_delivered(self) -> Delivered:
        return Delivered(**_read_json(self.path / "delivered.json"))

    def _read_identity(self, wanted: str | None) -> Identity:
        stored = _read_json(self.path / "run.json")
        if not stored:
            self.identity = Identity(run_key=wanted or uuid.uuid4().hex, started_at=milliseconds(time.time()))
            self._save_identity()
            return self.identity
        identity = Identity(**stored)
        if wanted not in (None, identity.run_key):
            raise ValueError(
                f"{self.path} holds the run with run_key {identity.run_key}, not {wanted}: choose another folder"
            )
        return identity

    def _save_identity(self) -> None:
        write_atomic(self.path / "run.json", json.dumps(asdict(self.identity)).encode())


def milliseconds(seconds: float) -> int:
    return round(seconds * 1000)


def _try_lock(path: Path) -> IO[bytes] | None:
    """Held until the file is closed or the process ends, in whatever way; None if another process holds it."""
    file = path.open("ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file


def _read_json(path: Path) -> Event:
    return json.loads(path.read_bytes()) if path.exists() else {}
