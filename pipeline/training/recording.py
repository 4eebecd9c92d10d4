"""Delivery to MLflow of what a run, chain or sweep has left, by its folder."""

from pipeline.config import ConfigError
from pipeline.tracking.delivery import Delivery, UndeliveredError, deliver_rest, has_outbox, settings_of
from pipeline.training import run_dir


def deliver_run(run: str, uri: str | None = None) -> Delivery:
    """Deliver all pending events of a run, with progress on stderr, as long as the server makes progress.

    Args:
        run: folder or URI of a run, chain or sweep.
        uri: server or database; default: the one that the run was tracked at.

    Raises:
        UndeliveredError: MLflow still lacks something, with the way out.
        ConfigError: this is not the folder of a run.
    """
    key = run_dir.key_of(run)
    if key is None:
        raise ConfigError(f"{run} is not the folder of a run, chain or sweep")
    folder = run_dir.outbox_folder(run, key)
    if not has_outbox(folder):
        if place := run_dir.waits_elsewhere(run):
            raise UndeliveredError(f"{run}: what MLflow lacks waits in {place}; give this command there")
        return Delivery()
    delivery = deliver_rest(folder, settings_of(folder, uri))
    if not delivery.left.events:
        run_dir.note_recorded(run)
    if problem := delivery.problem(run):
        raise UndeliveredError(f"{run}: {problem}")
    return delivery
