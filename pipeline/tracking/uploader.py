"""The thread that uploads an outbox to its MLflow server, and retries for as long as it takes."""

import itertools
import logging
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING

import psutil

from pipeline.mlflow_access import configure_mlflow, import_lock
from pipeline.redaction import redact
from pipeline.tracking.outbox import Event, Outbox, Pending
from pipeline.tracking.settings import TrackingSettings

if TYPE_CHECKING:
    from pipeline.tracking.mlflow_writer import MlflowWriter

logger = logging.getLogger(__name__)

START_SECONDS = 5.0  # before the first upload, unless somebody waits: importing mlflow would slow down the first step
STANDBY_SECONDS = 30.0  # before a process on standby imports mlflow, so that its workers start first
POLL_SECONDS = 1.0  # between checks for new events, which then share requests
WAIT_SECONDS = 0.2  # between checks of somebody who waits
SHOW_SECONDS = 1.0  # between two reports to them
FIRST_DELAY, LONGEST_DELAY = 1.0, 60.0  # seconds between attempts, doubled each time
LONGEST_DELAY_WAITED_FOR = 5.0  # the same while somebody waits
EVENTS_AT_ONCE = 50
STOP_SECONDS = 2.0

Batch = Sequence[tuple[int, Event]]  # events, each with its number


class Uploader:
    """Uploads until it is stopped. Its failures do not reach the training, except as warnings.

    Args:
        standby: import mlflow, but upload only while somebody waits.
    """

    def __init__(self, outbox: Outbox, settings: TrackingSettings, *, standby: bool = False) -> None:
        self._outbox, self._settings, self._standby = outbox, settings, standby
        self._changed = threading.Condition()  # notified after an upload, at the end, and when somebody begins to wait
        self._waiting = 0  # number of those who wait
        self._stopped = False
        self._lock: IO[bytes] | None = None
        self._writer: MlflowWriter | None = None
        self._failures = 0  # in a row
        self._rejected = 0
        self._thread = threading.Thread(target=self._run, name="mlflow-uploader", daemon=True)
        self._thread.start()

    # Waiting

    def wait_for_run_id(self, timeout: float) -> str | None:
        """Wait at most `timeout` seconds for MLflow's id of the run."""
        ends_at = time.monotonic() + timeout
        with self._waits():
            while (run_id := self._outbox.run_id) is None and time.monotonic() < ends_at:
                self._wait()
        return run_id

    def deliver(self, patience: float, limit: float, show: Callable[[Pending], None]) -> Pending:
        """Upload now, and wait as long as the server makes progress; return what is left.

        Args:
            patience: seconds without an event or a byte of content on its way, after which waiting ends.
            limit: seconds after which it ends in any case.
            show: called once a second.
        """
        least, sent = math.inf, SentBytes(self._outbox)
        began_at = moved_at = time.monotonic()
        shown_at = 0.0
        with self._waits():
            while (left := self._outbox.pending()).events:
                now = time.monotonic()
                if sent.grew() or left.events < least:
                    least, moved_at = left.events, now
                if now - moved_at >= patience or now - began_at >= limit:
                    break
                if now - shown_at >= SHOW_SECONDS:
                    shown_at = now
                    show(left)
                self._wait()
        return left

    def stop(self) -> None:
        """End after the current request, without waiting long for it: the server may hang."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        self._thread.join(timeout=STOP_SECONDS)

    @contextmanager
    def _waits(self) -> Iterator[None]:
        with self._changed:
            self._waiting += 1
            self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._waiting -= 1

    def _wait(self) -> None:
        with self._changed:  # another process may upload, so this one looks again after a while
            self._changed.wait(WAIT_SECONDS)

    # Uploading

    def _run(self) -> None:
        self._pause(STANDBY_SECONDS if self._standby else START_SECONDS, waited_for=0)
        if self._standby and not self._stopped:
            import_writer()
            self._pause(threading.TIMEOUT_MAX, waited_for=0)
        while not self._stopped:
            try:
                if self._outbox.next_events(1) and self._take_lock():
                    self._upload_all()
                self._pause(POLL_SECONDS, waited_for=WAIT_SECONDS)
            except Exception as error:  # noqa: BLE001 - network, server, database, storage: any failure may be temporary
                self._failures += 1
                self._warn(error)
                delay = min(LONGEST_DELAY, FIRST_DELAY * 2 ** (self._failures - 1))
                self._pause(delay, waited_for=min(delay, LONGEST_DELAY_WAITED_FOR))
        if self._lock is not None:
            self._lock.close()

    def _pause(self, seconds: float, *, waited_for: float) -> None:
        """Wait `seconds`, or the shorter `waited_for` while somebody waits for an upload."""
        began_at = time.monotonic()
        with self._changed:
            while not self._stopped:
                left = began_at + (waited_for if self._waiting else seconds) - time.monotonic()
                if left <= 0:
                    return
                self._changed.wait(min(left, threading.TIMEOUT_MAX))

    def _take_lock(self) -> bool:
        if self._lock is None:
            self._lock = self._outbox.try_upload_lock()
            if self._lock is not None:
                self._outbox.remove_orphans()
        return self._lock is not None

    def _upload_all(self) -> None:
        while not self._stopped and (events := self._outbox.next_events(EVENTS_AT_ONCE)):
            waited = self._outbox.pending().events if self._failures > 1 else 0
            self._upload(self._open_writer(), _one_kind(events))
            if waited:
                logger.warning("MLflow works again; %d events waited for it", waited)
            self._failures = 0

    def _open_writer(self) -> "MlflowWriter":
        """Connect, and create the run if there is none yet."""
        if self._writer is None:
            writer = import_writer()(
                self._settings,
                run_key=self._outbox.run_key,
                started_at=self._outbox.started_at,
                content_of=self._outbox.content_of,
            )
            known = self._outbox.run_id
            run_id = writer.open_run(known)
            if run_id != known:
                self._outbox.note_run_id(run_id)
            self._writer = writer
        return self._writer

    def _upload(self, writer: "MlflowWriter", batch: Batch) -> None:
        """Send events; set aside those that are refused, so that one bad event does not block the others."""
        events = [event for _, event in batch]
        try:
            writer.send(events)
        except Exception as error:
            if not writer.is_refusal(error):
                raise
            if len(batch) > 1:  # find the one that is refused
                for single in batch:
                    self._upload(writer, [single])
                return
            self._reject(*batch[0], error)
        else:
            self._outbox.remove([number for number, _ in batch], events)
        with self._changed:
            self._changed.notify_all()

    def _reject(self, number: int, event: Event, error: Exception) -> None:
        reason = redact(str(error))
        self._outbox.reject(number, event, reason)
        self._rejected += 1
        if self._rejected == 1:
            logger.warning(
                "MLflow refused an event (%s); `dfine record` lists it and any further ones: %s",
                event.get("kind"),
                reason,
            )

    def _warn(self, error: Exception) -> None:
        if self._failures == 2:  # a single failure is often a connection that the server has closed
            logger.warning(
                "uploading to MLflow at %s fails; training continues, and its log waits in %s: %s",
                self._settings.shown_uri,
                self._outbox.path,
                redact(str(error)),
            )


class SentBytes:
    """Bytes of content that this process has read to send them; they grow where one large file takes minutes."""

    def __init__(self, outbox: Outbox) -> None:
        self._files = str(outbox.files.resolve())
        self._furthest: dict[str, int] = {}  # position by file; a repeated attempt counts once it is further

    def grew(self) -> bool:
        """Whether there are more than at the last call."""
        grew = False
        for file in psutil.Process().open_files():
            position = getattr(file, "position", 0)  # known on Linux alone
            if file.path.startswith(self._files) and position > self._furthest.get(file.path, 0):
                self._furthest[file.path], grew = position, True
        return grew


def import_writer() -> "type[MlflowWriter]":
    """Import mlflow, which takes seconds in which the training can run."""
    configure_mlflow(retries=0)  # the uploader's thread retries itself, and waits without blocking
    with import_lock:
        from pipeline.tracking.mlflow_writer import MlflowWriter

    return MlflowWriter


def _one_kind(batch: Batch) -> Batch:
    """The leading events of metrics together, or else the first event alone."""
    metrics = list(itertools.takewhile(lambda item: item[1].get("kind") == "metrics", batch))
    return metrics or batch[:1]
