"""Lock of a run's or sweep's folder: one driver at a time, on a disk and on an object store.

On a disk the lock is `flock` on `driver.lock`, which ends with the process. An object store has no locks: each driver writes a
claim of its own under `driver-claims/`, then lists them all. Whoever sees the live claim of another withdraws its own and tries
again after a random time, so at most one stays. `driver.json` names the holder for people, and for drivers of other hosts.
"""

import errno
import fcntl
import json
import os
import random
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pyarrow import fs

from pipeline import storage
from pipeline.config import ConfigError

DRIVER = "driver.json"
LOCK = "driver.lock"
CLAIMS = "driver-claims"
HEARTBEAT_SECONDS = 10.0
STALE_SECONDS = 60.0  # a driver on another host without a heartbeat for so long is gone
ATTEMPTS = 5  # at a claim, while another driver claims too
BACKOFF_SECONDS = 1.0  # longest time between two attempts
UNSUPPORTED = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)  # a file system without locks


class RunTakenError(ConfigError):
    """Another process drives the run; on another machine it may have died a moment ago."""


@contextmanager
def driver_lock(run: str) -> Iterator[None]:
    """Hold a folder for this process while the block runs.

    Raises:
        RunTakenError: another live process holds it.
    """
    me = {"host": socket.gethostname(), "pid": os.getpid()}
    path = storage.join(run, DRIVER)
    with _exclusive(run, me) as renew:
        if (other := _noted_driver(path)) is not None and _is_alive(other, me):
            raise _taken(run, other)
        # A thread renews the notes; a driver that dies leaves some that go stale.
        ended = threading.Event()

        def note(at: float) -> None:
            storage.write_atomic(path, json.dumps({**me, "at": at}).encode())
            renew()

        def beat() -> None:
            while not ended.wait(HEARTBEAT_SECONDS):
                with suppress(
                    OSError
                ):  # the storage is out of reach for a while; the next heartbeat has the same content
                    note(time.time())

        note(time.time())
        thread = threading.Thread(target=beat, daemon=True, name="driver lock")
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            with suppress(OSError):  # a full disk must not hide how the block ended
                note(0)


@contextmanager
def _exclusive(run: str, me: dict[str, Any]) -> Iterator[Callable[[], None]]:
    """Exclude other drivers while the block runs; yields a function that renews the claim."""
    filesystem, folder = storage.resolve(run)
    if not isinstance(filesystem, fs.LocalFileSystem):
        with claimed(run, me) as renew:
            yield renew
        return
    Path(folder).mkdir(parents=True, exist_ok=True)
    descriptor = os.open(Path(folder, LOCK), os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _taken(run, _noted_driver(storage.join(run, DRIVER))) from None
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise
            with claimed(run, me) as renew:
                yield renew
            return
        yield lambda: None
    finally:
        os.close(descriptor)


@contextmanager
def claimed(run: str, me: dict[str, Any]) -> Iterator[Callable[[], None]]:
    """Hold a folder by a claim while the block runs; yields a function that renews the claim.

    Raises:
        RunTakenError: another live process holds or claims it.
    """
    name = f"{uuid.uuid4().hex}.json"
    uri = storage.join(run, CLAIMS, name)

    def renew() -> None:
        storage.write_atomic(uri, json.dumps(me).encode())

    other: dict[str, Any] | None = None
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(random.uniform(0.1, 1) * BACKOFF_SECONDS)
        renew()
        other = _live_claim(run, name, me)
        if other is None:
            break
        _remove(uri)
    else:
        raise _taken(run, other)
    try:
        yield renew
    finally:
        with suppress(OSError):
            _remove(uri)


def _live_claim(run: str, own: str, me: dict[str, Any]) -> dict[str, Any] | None:
    """Another driver's live claim. Ages are differences of the storage's own times, so that clocks need not agree."""
    filesystem, folder = storage.resolve(storage.join(run, CLAIMS))
    claims = {info.base_name: info for info in filesystem.get_file_info(fs.FileSelector(folder))}
    for name, info in claims.items():
        if name == own or not name.endswith(".json") or name.startswith("."):
            continue
        other = _noted_driver(storage.join(run, CLAIMS, name)) or {}
        age = (claims[own].mtime - info.mtime).total_seconds()
        gone = other.get("host") == me["host"] and not _runs(other.get("pid"))
        if age <= STALE_SECONDS and not gone:
            return other
    return None


def _remove(uri: str) -> None:
    filesystem, path = storage.resolve(uri)
    with suppress(FileNotFoundError):
        filesystem.delete_file(path)


def _noted_driver(uri: str) -> dict[str, Any] | None:
    """Content of a note, with a host and a pid; None if there is none, or it is damaged: its driver died as it wrote."""
    try:
        content = storage.read_json(uri, "host", "pid")
    except (storage.StorageError, OSError):
        return None
    return content if isinstance(content, dict) else None


def _taken(run: str, other: dict[str, Any] | None) -> RunTakenError:
    holder = f"process {other['pid']} on {other['host']}" if other else "another process"
    return RunTakenError(f"{run} is being trained by {holder}: wait for it, stop it, or give another --name")


def _is_alive(other: dict[str, Any], me: dict[str, Any]) -> bool:
    at = other.get("at")
    if not isinstance(at, int | float) or time.time() - at > STALE_SECONDS:
        return False
    same_host = other["host"] == me["host"]
    return not same_host or (other["pid"] != me["pid"] and _runs(other["pid"]))


def _runs(pid: Any) -> bool:
    return os.path.exists(f"/proc/{pid}")
