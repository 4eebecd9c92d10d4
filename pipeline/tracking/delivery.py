"""Delivery of what a run has logged and MLflow does not have yet, after the run's own processes have ended."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.errors import UserError
from pipeline.progress import Progress
from pipeline.tracking.outbox import DATABASE, Event, Outbox, Pending
from pipeline.tracking.settings import TrackingError, TrackingSettings
from pipeline.tracking.tracker import PATIENCE_S, Tracker
from pipeline.wording import plural

NAMED_REJECTIONS = 3
HIDDEN = "***"  # stands for a password in a noted URI


class UndeliveredError(UserError, RuntimeError):
    """Events of a run that MLflow still does not have."""


@dataclass(frozen=True)
class Delivery:
    """Outcome of a delivery."""

    delivered: int = 0  # events
    left: Pending = field(default_factory=lambda: Pending({}, 0))
    rejected: list[tuple[Event, str]] = field(default_factory=list)

    def problem(self, run: str) -> str | None:
        """Everything that MLflow does not have, and the way out; None if it has all."""
        return missing_from_mlflow(self.left, self.rejected, run)


def missing_from_mlflow(left: Pending, rejected: list[tuple[Event, str]], run: str) -> str | None:
    """Describe pending and refused events of a run, with the way out; None if there are none."""
    lines = []
    if left.events:
        lines.append(f"not in MLflow yet: {left}; `dfine record {run}` delivers the rest")
    if rejected:
        named = "; ".join(f"{event.get('kind')}: {reason}" for event, reason in rejected[:NAMED_REJECTIONS])
        lines.append(f"refused by MLflow: {plural(len(rejected), 'event')}, {named}")
    return "\n".join(lines) or None


def has_outbox(folder: Path) -> bool:
    """Whether an outbox lies in a folder of this machine."""
    return (folder / DATABASE).exists()


def settings_of(folder: Path, uri: str | None = None) -> TrackingSettings:
    """Settings that the last process of a run has noted in its outbox.

    Args:
        uri: another server or database than the noted one.

    Raises:
        TrackingError: the noted URI had a password, and neither `uri` nor MLFLOW_TRACKING_URI gives it again.
    """
    noted = Outbox(folder, None).read_settings()
    known = noted.get("uri") or ""
    if uri is None and HIDDEN not in known:
        uri = known
    try:
        return TrackingSettings.resolve(
            "s3://none",  # without a server there is no place for a database
            experiment=noted.get("experiment") or "dfine",
            run_name=noted.get("run_name") or "run",
            uri=uri,
            parent_run_id=noted.get("parent_run_id"),
        )
    except TrackingError:
        if uri is not None:
            raise
        raise TrackingError(
            f"{folder}: the run was tracked at {known}, whose password is not kept: give --tracking, or set MLFLOW_TRACKING_URI"
        ) from None


def deliver_rest(folder: Path, settings: TrackingSettings, *, patience: float = PATIENCE_S) -> Delivery:
    """Deliver all pending events, with progress on stderr, as long as the server makes progress.

    Args:
        folder: the outbox.
        patience: seconds without progress after which the rest is left.
    """
    if not has_outbox(folder):
        return Delivery()
    tracker = Tracker(folder, settings, standby=True)
    try:
        before = tracker.pending
        if not before:
            return Delivery(rejected=tracker.rejected)
        Progress.write(f"delivering {before} events to MLflow at {settings.shown_uri} …")
        with Progress("MLflow", total=before, unit="event") as progress:
            show = _shown_by(progress, before)
            left = tracker.deliver(patience, show)
            show(left)
        return Delivery(before - left.events, left, tracker.rejected)
    finally:
        tracker.stop()


def _shown_by(progress: Progress, total: int) -> Callable[[Pending], None]:
    done = 0

    def show(left: Pending) -> None:
        nonlocal done
        progress.advance(max(0, total - left.events - done), f", {left} left" if left.events else "")
        done = max(done, total - left.events)

    return show
