"""The thread that uploads an outbox to its MLflow server, and retries for as long as it takes."""

import itertools
import logging
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pipeline.mlflow_access import configure_mlflow
from pipeline.redaction import redact
from pipeline.tracking.outbox import Event, EventLog, Outbox
from pipeline.tracking.settings import TrackingSettings

if TYPE_CHECKING:
    from pipeline.tracking.mlflow_writer import MlflowWriter

logger = logging.getLogger(__name__)

START_SECONDS = 5.0  # before the first upload, unless somebody waits: importing mlflow would slow down the first step
POLL_SECONDS = 1.0  # between checks for new events, which then share requests
FIRST_DELAY, LONGEST_DELAY = 1.0, 60.0  # seconds between attempts, doubled each time
EVENTS_AT_ONCE = 50
STOP_SECONDS = 2.0

Batch = Sequence[tuple[Event, int]]  # events, each with the offset behind it


class Uploader:
    """Uploads until it is stopped. Its failures do not reach the training, except as warnings."""

    def __init__(self, outbox: Outbox, settings: TrackingSettings) -> None:
        self._outbox, self._settings = outbox, settings
        self._progress = threading.Condition()  # notified after an upload, and when somebody waits for one
        self._urgent = False
        self._stopped = False
        self._writer: MlflowWriter | None = None
        self._failures = 0  # in a row
        self._rejected = 0
        self._thread = threading.Thread(target=self._run, name="mlflow-uploader", daemon=True)
        self._thread.start()

    def wait_for_run_id(self, timeout: float) -> str | None:
        """Wait at most `timeout` seconds for MLflow's id of the run."""
        with self._progress:
            self._wake()
            self._progress.wait_for(lambda: self._outbox.uploaded.run_id is not None, timeout)
        return self._outbox.uploaded.run_id

    def flush(self, timeout: float) -> bool:
        """Upload now, and wait at most `timeout` seconds; return whether everything is uploaded."""
        with self._progress:
            self._wake()
            return self._progress.wait_for(lambda: not self._outbox.pending, timeout)

    def stop(self) -> None:
        """End after the current request, without waiting long for it: the server may hang."""
        with self._progress:
            self._stopped = True
            self._progress.notify_all()
        self._thread.join(timeout=STOP_SECONDS)

    def _wake(self) -> None:
        self._urgent = True
        self._progress.notify_all()

    def _run(self) -> None:
        self._pause(START_SECONDS)
        while not self._stopped:
            delay = POLL_SECONDS
            try:
                self._outbox.sync()
                if self._outbox.try_upload_lock():
                    self._upload_all()
            except Exception as error:  # noqa: BLE001 - network, server, database, storage: any failure may be temporary
                self._failures += 1
                delay = min(LONGEST_DELAY, FIRST_DELAY * 2 ** (self._failures - 1))
                self._warn(error)
            self._pause(delay)
        self._outbox.close()

    def _pause(self, seconds: float) -> None:
        with self._progress:
            self._progress.wait_for(lambda: self._stopped or self._urgent, seconds)
            self._urgent = False

    def _upload_all(self) -> None:
        while self._outbox.pending and not self._stopped:
            waiting = self._outbox.pending
            writer = self._open_writer()
            # Records go first, so that an artifact arrives after the records that were logged before it.
            log = self._outbox.records if self._outbox.records.pending else self._outbox.artifacts
            self._upload(writer, log, _one_kind(log.read(EVENTS_AT_ONCE)))
            if self._failures > 1:
                logger.warning("MLflow works again; %d events waited for it", waiting)
            self._failures = 0

    def _open_writer(self) -> "MlflowWriter":
        """Connect, and create the run if there is none yet."""
        if self._writer is None:
            configure_mlflow(retries=0)  # this thread retries itself, and waits without blocking
            # Imported here because importing mlflow takes seconds, in which the training can run.
            from pipeline.tracking.mlflow_writer import MlflowWriter

            identity = self._outbox.identity
            writer = MlflowWriter(
                self._settings,
                run_key=identity.run_key,
                started_at=identity.started_at,
                files=self._outbox.files,
            )
            self._outbox.uploaded.run_id = writer.open_run(self._outbox.uploaded.run_id)
            self._save_progress()
            self._writer = writer
        return self._writer

    def _upload(self, writer: "MlflowWriter", log: EventLog, batch: Batch) -> None:
        """Send events; set aside those that are refused, so that one bad event does not block the others."""
        events = [event for event, _ in batch]
        rejected = False
        try:
            writer.send(events)
        except Exception as error:
            if not writer.is_refusal(error):
                raise
            if len(batch) > 1:  # find the one that is refused
                for single in batch:
                    self._upload(writer, log, [single])
                return
            rejected = True
            self._reject(events[0], error)
        log.advance(len(batch), batch[-1][1])
        self._save_progress()
        if not rejected:  # the content of a rejected event stays for whoever reads rejected.jsonl
            for event in events:
                self._outbox.remove_content(event)

    def _save_progress(self) -> None:
        self._outbox.save_uploaded()
        with self._progress:
            self._progress.notify_all()

    def _reject(self, event: Event, error: Exception) -> None:
        reason = redact(str(error))
        self._outbox.reject(event, reason)
        self._rejected += 1
        if self._rejected == 1:
            logger.warning(
                "MLflow refused an event (%s); it and any further ones are in %s: %s",
                event.get("kind"),
                self._outbox.path / "rejected.jsonl",
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


def _one_kind(batch: Batch) -> Batch:
    """The leading events of metrics together, or else the first event alone."""
    metrics = list(itertools.takewhile(lambda item: item[0].get("kind") == "metrics", batch))
    return metrics or batch[:1]
