"""The thread that carries a queue to its server, for as long as that takes."""

import itertools
import logging
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pipeline.redaction import redact
from pipeline.tracking.event_log import Event, EventLog
from pipeline.tracking.outbox import QueueFolder
from pipeline.tracking.settings import TrackingSettings

if TYPE_CHECKING:
    from pipeline.tracking.mlflow_writer import Delivery

logger = logging.getLogger(__name__)

POLL_SECONDS = 1.0  # between looks for new events: what came meanwhile shares its requests
FIRST_DELAY, LONGEST_DELAY = 1.0, 60.0  # seconds between attempts, doubled each time
EVENTS_AT_ONCE = 50
STOP_SECONDS = 2.0

Batch = Sequence[tuple[Event, int]]  # each with the offset behind it


class Courier:
    """Delivers until stopped. Nothing that fails in here reaches the training, except as a warning."""

    def __init__(self, queue: QueueFolder, settings: TrackingSettings) -> None:
        self._queue, self._settings = queue, settings
        self._progress = threading.Condition()  # something was delivered, or somebody waits for that
        self._urgent = False
        self._stopped = False
        self._delivery: Delivery | None = None
        self._failures = 0  # in a row
        self._rejected = 0
        self._thread = threading.Thread(target=self._work, name="mlflow-delivery", daemon=True)
        self._thread.start()

    def wait_for_run_id(self, timeout: float) -> str | None:
        with self._progress:
            self._wake()
            self._progress.wait_for(lambda: self._queue.delivered.run_id is not None, timeout)
        return self._queue.delivered.run_id

    def flush(self, timeout: float) -> bool:
        """Try at once, and wait at most `timeout` seconds; whether everything is delivered."""
        with self._progress:
            self._wake()
            return self._progress.wait_for(lambda: not self._queue.pending, timeout)

    def stop(self) -> None:
        """End after the request under way, without waiting long for that: the server may hang."""
        with self._progress:
            self._stopped = True
            self._progress.notify_all()
        self._thread.join(timeout=STOP_SECONDS)

    def _wake(self) -> None:
        self._urgent = True
        self._progress.notify_all()

    def _work(self) -> None:
        while not self._stopped:
            delay = POLL_SECONDS
            try:
                self._queue.sync()
                if self._queue.lock_delivery():
                    self._deliver_all()
            except Exception as error:  # of network, server, database, storage: all of them can pass
                self._failures += 1
                delay = min(LONGEST_DELAY, FIRST_DELAY * 2 ** (self._failures - 1))
                self._warn(error)
            with self._progress:
                self._progress.wait_for(lambda: self._stopped or self._urgent, delay)
                self._urgent = False
        self._queue.close()

    def _deliver_all(self) -> None:
        while self._queue.pending and not self._stopped:
            waiting = self._queue.pending
            delivery = self._open()
            log = self._queue.records if self._queue.records.pending else self._queue.artifacts
            self._deliver(delivery, log, _one_kind(log.read(EVENTS_AT_ONCE)))
            if self._failures > 1:
                logger.warning("MLflow works again; %d events waited for it", waiting)
            self._failures = 0

    def _open(self) -> "Delivery":
        """A connection whose run exists."""
        # Imported here because importing mlflow takes seconds, which are not the training's.
        from pipeline.tracking.mlflow_writer import Delivery

        if self._delivery is None:
            identity = self._queue.identity
            delivery = Delivery(self._settings, identity.run_key, identity.started_at, self._queue.files)
            self._queue.delivered.run_id = delivery.open_run(self._queue.delivered.run_id)
            self._note()
            self._delivery = delivery
        return self._delivery

    def _deliver(self, delivery: "Delivery", log: EventLog, batch: Batch) -> None:
        """Send events, or set aside what is refused: one bad event must not hold up those behind it."""
        events = [event for event, _ in batch]
        rejected = False
        try:
            delivery.send(events)
        except Exception as error:
            if not delivery.is_refusal(error):
                raise
            if len(batch) > 1:
                for single in batch:
                    self._deliver(delivery, log, [single])
                return
            rejected = True
            self._reject(events[0], error)
        log.passed(len(batch), batch[-1][1])
        self._note()
        if not rejected:  # else its content stays for whoever reads rejected.jsonl
            for event in events:
                self._queue.forget(event)

    def _note(self) -> None:
        self._queue.save_delivered()
        with self._progress:
            self._progress.notify_all()

    def _reject(self, event: Event, error: Exception) -> None:
        reason = redact(str(error))
        self._queue.reject(event, reason)
        self._rejected += 1
        if self._rejected == 1:
            logger.warning(
                "MLflow refused an event (%s); it and any further ones are in %s: %s",
                event.get("kind"),
                self._queue.path / "rejected.jsonl",
                reason,
            )

    def _warn(self, error: Exception) -> None:
        if self._failures == 2:  # one alone is often a connection that was closed meanwhile
            logger.warning(
                "MLflow at %s fails; the training goes on, and what it logs waits in %s: %s",
                self._settings.shown_uri,
                self._queue.path,
                redact(str(error)),
            )


def _one_kind(read: Batch) -> Batch:
    """The metrics at the front together, or one event of another kind."""
    metrics = list(itertools.takewhile(lambda item: item[0].get("kind") == "metrics", read))
    return metrics or read[:1]
