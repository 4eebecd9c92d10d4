"""A file of events, one JSON object a line: appended by the training, read by the delivery."""

import json
import os
import threading
from pathlib import Path
from typing import Any

Event = dict[str, Any]
TAIL_BYTES = 1 << 16  # read at once when looking for the end of the last line


class EventLog:
    """Survives the death of its process at any moment: a line that was not finished was never an event.

    Any thread may append, one reads. Numbers that are not finite are legal.

    Args:
        offset: bytes from the start that are done with.
    """

    def __init__(self, path: Path, offset: int) -> None:
        self._writer = path.open("ab", buffering=0)
        self._reader = path.open("rb")
        self._appending = threading.Lock()
        self._unsynced = False
        _drop_torn_line(path)
        self.continue_from(offset)

    def continue_from(self, offset: int) -> None:
        """Take everything behind `offset` as pending."""
        with self._appending:
            end = self._reader.seek(0, os.SEEK_END)
            self.offset = min(offset, end)  # a machine that crashed may have kept the offset and lost the events
            self._reader.seek(self.offset)
            self.pending = sum(1 for _ in self._reader)

    def append(self, event: Event) -> None:
        """One write of one line.

        Raises:
            OSError: the disk is full or gone.
        """
        line = json.dumps(event, separators=(",", ":")).encode() + b"\n"
        with self._appending:
            if self._writer.write(line) != len(line):
                raise OSError(
                    f"{self._writer.name} took only a part of an event of {len(line)} bytes: is the disk full?"
                )
            self.pending += 1
            self._unsynced = True

    def sync(self) -> None:
        """Let everything so far outlive a crash of the machine."""
        if self._unsynced:
            self._unsynced = False
            os.fsync(self._writer.fileno())

    def read(self, limit: int) -> list[tuple[Event, int]]:
        """The next events, each with the offset behind it. Reading does not pass them."""
        self._reader.seek(self.offset)
        found: list[tuple[Event, int]] = []
        while len(found) < limit and (line := self._reader.readline()).endswith(b"\n"):
            found.append((_parse(line), self._reader.tell()))
        return found

    def passed(self, count: int, offset: int) -> None:
        """The next `count` events, up to `offset`, are done with."""
        with self._appending:
            self.pending -= count
            self.offset = offset

    def close(self) -> None:
        self._reader.close()
        self._writer.close()


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
