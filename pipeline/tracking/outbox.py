"""Outbox: the events of a run that wait for the MLflow server.

outbox.db       one SQLite file: key and settings of the run, pending events in order, events that the server refused
files/          content of pending artifacts and models
uploader.lock   held by the one process that uploads

Several processes may log at once. Each change is one transaction on a connection of its own, with a rollback journal: unlike
WAL it also works between machines that share a network file system. A process may die at any moment.
"""

import errno
import fcntl
import json
import os
import shutil
import sqlite3
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path, PurePosixPath
from typing import IO, Any

from pipeline.errors import UserError
from pipeline.storage import stays_inside

Event = dict[str, Any]

DISK_ERRORS = {"disk is full": errno.ENOSPC, "readonly": errno.EROFS}  # by what SQLite says
DATABASE = "outbox.db"
LOCK_SECONDS = 60.0  # wait for another process's transaction, which takes milliseconds
ORPHAN_SECONDS = 3600.0  # content without an event is younger than this while it is being stored
WORDS = {"begin": "parameters", "running": "status", "finish": "status", "artifact": "artifacts", "model": "models"}

SCHEMA = """
create table run (
    run_key text not null, started_at integer not null, settings text not null,
    begun integer not null default 0, status text not null default '', run_id text
);
create table events (
    id integer primary key autoincrement, lane integer not null, kind text not null, bytes integer not null, body text not null
);
create index events_by_lane on events (lane, id);
create table logged_once (key text primary key);
create table rejected (id integer primary key, reason text not null, body text not null);
"""
# The end of the run waits for everything that was logged before it; all else that was logged later waits for the end.
NEXT = """
select id, body from events where id <= coalesce((select min(id) from events where lane = ?), 9223372036854775807)
order by lane, id limit ?
"""


class OutboxError(UserError, ValueError):
    """An outbox that is damaged, belongs to another run, or names a file outside of it."""


class Lane(IntEnum):
    """Order of delivery: artifacts wait for the records logged before them, and delay no later ones."""

    RECORDS = 0
    ARTIFACTS = 1
    FINISHED = 2


@dataclass(frozen=True)
class Pending:
    """Everything that MLflow does not have yet."""

    counts: dict[str, int]  # by kind of event, in words
    content_bytes: int  # of artifacts and models

    @property
    def events(self) -> int:
        """Number of events."""
        return sum(self.counts.values())

    def __str__(self) -> str:
        size = f" ({self.content_bytes / 1e6:.1f} MB)" if self.content_bytes else ""
        return ", ".join(f"{name} {count}" for name, count in self.counts.items()) + size


class Outbox:
    """Pending events and their content, of one run.

    Args:
        path: folder, created if missing.
        run_key: None: that of the folder, or a new one.
        settings: plain values to note for `read_settings`; None leaves those of the folder.

    Raises:
        OutboxError: the folder belongs to another run than `run_key`, or its database is damaged.
        OSError: the disk is full or gone. All methods may raise it.
    """

    def __init__(self, path: Path, run_key: str | None, settings: dict[str, str | None] | None = None) -> None:
        self.path = path
        self.files = path / "files"
        self.files.mkdir(parents=True, exist_ok=True)
        with self._transaction() as database:
            if not database.execute("select 1 from sqlite_master where name = 'run'").fetchone():
                for statement in filter(str.strip, SCHEMA.split(";")):
                    database.execute(statement)
                values = (run_key or uuid.uuid4().hex, milliseconds(time.time()), "{}")
                database.execute("insert into run (run_key, started_at, settings) values (?, ?, ?)", values)
            self.run_key, self.started_at = database.execute("select run_key, started_at from run").fetchone()
            if run_key not in (None, self.run_key):
                raise OutboxError(
                    f"{path} holds the run with run_key {self.run_key}, not {run_key}: choose another folder"
                )
            if settings is not None:
                database.execute("update run set settings = ?", (json.dumps(settings),))

    # The run

    @property
    def run_id(self) -> str | None:
        """MLflow's id of the run, once the server has given one."""
        run_id: str | None = self._read("select run_id from run")[0][0]
        return run_id

    def note_run_id(self, run_id: str) -> None:
        """Note MLflow's id of the run."""
        with self._transaction() as database:
            database.execute("update run set run_id = ?", (run_id,))

    def read_settings(self) -> dict[str, str | None]:
        """Settings that the last process noted."""
        settings: dict[str, str | None] = json.loads(self._read("select settings from run")[0][0])
        return settings

    # Logging

    def begin(self, event: Event) -> None:
        """Log the first event of the run; in a run that has begun, log that it runs again."""
        with self._transaction() as database:
            (begun,) = database.execute("select begun from run").fetchone()
            _insert(database, {"kind": "running"} if begun else event, Lane.RECORDS)
            database.execute("update run set begun = 1, status = ''")

    def finish(self, event: Event) -> None:
        """Log the end of the run, once. A run that is FINISHED stays so: what stops its processes later does not matter."""
        status = event["status"]
        with self._transaction() as database:
            (before,) = database.execute("select status from run").fetchone()
            if before not in ("FINISHED", status):
                _insert(database, event, Lane.FINISHED if status == "FINISHED" else Lane.RECORDS)
                database.execute("update run set status = ?", (status,))

    def append(self, *events: Event, lane: Lane, once: str | None = None) -> None:
        """Log events, all or none of them.

        Args:
            once: key of the events; dropped if others with this key were logged before, delivered or not.
        """
        with self._transaction() as database:
            if (
                once is not None
                and not database.execute("insert or ignore into logged_once values (?)", (once,)).rowcount
            ):
                dropped = events
            else:
                dropped = ()
                for event in events:
                    _insert(database, event, lane)
        self._remove_content(dropped)

    def is_logged(self, key: str) -> bool:
        """Whether events with this key were logged before."""
        return bool(self._read("select 1 from logged_once where key = ?", key))

    def store_content(self, source: Path | bytes, name: str) -> Event:
        """Copy a file, a folder or bytes under its final name into `files`; return the keys of its event."""
        stored = PurePosixPath(uuid.uuid4().hex) / name
        target = self.files / stored
        target.parent.mkdir()
        if isinstance(source, bytes):
            target.write_bytes(source)
        elif source.is_dir():
            shutil.copytree(source, target)
        else:
            shutil.copyfile(source, target)
        files = [path for path in (target, *target.rglob("*")) if path.is_file()]
        for path in files:
            _sync(path)
        return {"file": str(stored), "bytes": sum(path.stat().st_size for path in files)}

    # Delivering

    def pending(self) -> Pending:
        """Count the events that are not yet uploaded."""
        rows = self._read("select kind, count(*), sum(bytes) from events group by kind order by min(id)")
        counts: dict[str, int] = {}
        for kind, count, _ in rows:
            word = WORDS.get(kind, kind)
            counts[word] = counts.get(word, 0) + count
        return Pending(counts, sum(row[2] for row in rows))

    def next_events(self, limit: int) -> list[tuple[int, Event]]:
        """Read the events to deliver next, each with its number."""
        rows = self._read(NEXT, Lane.FINISHED, limit)
        return [(number, _parse(body)) for number, body in rows]

    def content_of(self, event: Event) -> Path:
        """Path of an event's content.

        Raises:
            OutboxError: it leads out of this outbox: a path from elsewhere, or a link.
        """
        stored = PurePosixPath(event["file"])
        path = self.files / stored
        outside = not stays_inside(event["file"]) or len(stored.parts) != 2
        if outside or path.resolve() != self.path.resolve() / "files" / stored or _holds_a_link(path):
            raise OutboxError(f"{event['file']!r} does not lie in {self.files}: nothing outside of it is touched")
        return path

    def remove(self, numbers: Sequence[int], events: Sequence[Event]) -> None:
        """Forget delivered events, and remove their content."""
        with self._transaction() as database:
            database.executemany("delete from events where id = ?", [(number,) for number in numbers])
        self._remove_content(events)

    def reject(self, number: int, event: Event, reason: str) -> None:
        """Set an event aside that the server refuses for good; its content stays."""
        with self._transaction() as database:
            database.execute("insert into rejected values (?, ?, ?)", (number, reason, json.dumps(event)))
            database.execute("delete from events where id = ?", (number,))

    def rejected(self) -> list[tuple[Event, str]]:
        """All events that the server refused, each with the reason."""
        return [(_parse(body), reason) for body, reason in self._read("select body, reason from rejected order by id")]

    def try_upload_lock(self) -> IO[bytes] | None:
        """Become the uploading process until the file is closed or the process ends; None while another one is."""
        file = (self.path / "uploader.lock").open("ab")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return None
        return file

    def remove_orphans(self) -> None:
        """Remove content whose event was never logged, or was delivered, by a process that died in between."""
        owned = {_parse(body).get("file", "") for (body,) in self._read("select body from events")}
        owned |= {event.get("file", "") for event, _ in self.rejected()}
        folders = {PurePosixPath(file).parts[0] for file in owned if file}
        for folder in self.files.iterdir():
            if folder.name not in folders and time.time() - folder.lstat().st_mtime > ORPHAN_SECONDS:
                shutil.rmtree(folder, ignore_errors=True)

    def _remove_content(self, events: Sequence[Event]) -> None:
        for event in events:
            if "file" in event:
                shutil.rmtree(self.content_of(event).parent, ignore_errors=True)

    def _read(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        with self._connection() as database:
            return database.execute(query, values).fetchall()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._connection() as database:
            database.execute("begin immediate")
            yield database
            database.execute("commit")

    @contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        file = self.path / DATABASE
        try:
            with closing(sqlite3.connect(file, timeout=LOCK_SECONDS, isolation_level=None)) as database:
                database.execute("pragma auto_vacuum = full")  # the file shrinks once the events are delivered
                database.execute("pragma journal_mode = truncate")
                database.execute("pragma synchronous = full")
                yield database
        except sqlite3.OperationalError as error:
            code = next((code for text, code in DISK_ERRORS.items() if text in str(error)), None)
            raise (OSError(f"{file}: {error}") if code is None else OSError(code, str(error), str(file))) from error
        except sqlite3.DatabaseError as error:
            raise OutboxError(f"{file} is damaged: {error}; move it away, and what it held is not recorded") from error


def milliseconds(seconds: float) -> int:
    """Convert seconds to whole milliseconds."""
    return round(seconds * 1000)


def _insert(database: sqlite3.Connection, event: Event, lane: Lane) -> None:
    values = (lane, event["kind"], event.get("bytes", 0), json.dumps(event, separators=(",", ":")))
    database.execute("insert into events (lane, kind, bytes, body) values (?, ?, ?, ?)", values)


def _parse(body: str) -> Event:
    try:
        event = json.loads(body)
    except ValueError:
        event = None
    return event if isinstance(event, dict) else {"kind": "unreadable"}


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _holds_a_link(path: Path) -> bool:
    """Whether anything in a folder is neither a plain file nor a folder."""
    for folder, folders, files in os.walk(path):
        if any(Path(folder, name).is_symlink() for name in folders):
            return True
        if any(Path(folder, name).is_symlink() or not Path(folder, name).is_file() for name in files):
            return True
    return path.exists() and not (path.is_file() or path.is_dir())
