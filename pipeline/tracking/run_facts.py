"""Facts of a run in MLflow: configuration, data, code and results, as they are compared."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.mlflow_access import ACCURACY, FINAL, VAL
from pipeline.redaction import redact
from pipeline.tracking.client import (
    COMMIT,
    DIGEST,
    PARENT_RUN,
    VERSION,
    RunLookupError,
    connect,
    find_run,
    find_run_by_key,
    mlflow_errors,
    quoted,
    search_runs,
)
from pipeline.tracking.settings import TrackingSettings

if TYPE_CHECKING:
    from mlflow.entities import Run


@dataclass(frozen=True)
class RunFacts:
    """Configuration, data, code and results of one run, whether from MLflow or from its folder."""

    title: str
    params: dict[str, str]  # by dotted key
    data: dict[str, str]  # digest by use: train, val
    commit: str | None
    versions: dict[str, str]  # by package
    results: dict[str, float]  # by name: AP, AP50, ...
    run_id: str | None = None  # MLflow's
    parent_id: str | None = None  # MLflow's run id of the sweep
    status: str = ""
    folder: str | None = None  # maybe on another machine
    tags: dict[str, str] = field(default_factory=dict)


class Runs:
    """The runs of one server or database.

    Args:
        storage: holds the database that is used where no server is named.

    Raises:
        RunLookupError: there is no server and no database.
    """

    def __init__(self, uri: str | None, storage: str) -> None:
        try:
            settings = TrackingSettings.resolve(storage, experiment="any", run_name="any", uri=uri)
        except ValueError as error:
            raise RunLookupError(str(error)) from None
        if settings.uri.startswith("sqlite:") and not Path(settings.uri.split(":///", 1)[1]).exists():
            raise RunLookupError(
                f"there is no database {settings.shown_uri}: name the server or database with --tracking or MLFLOW_TRACKING_URI"
            )
        self.shown_uri = settings.shown_uri
        self._client = connect(settings.uri)

    def find(self, named: str) -> RunFacts:
        """Facts of one run; see `find_run`."""
        return facts_of(find_run(self._client, named))

    def by_key(self, run_key: str) -> RunFacts | None:
        """Facts of the run with this key; see `find_run_by_key`."""
        with mlflow_errors(self.shown_uri):
            run = find_run_by_key(self._client, run_key)
        return facts_of(run) if run is not None else None

    def download(self, run_id: str, path: str, folder: str) -> Path | None:
        """Download the artifact `path` of a run into a folder; None if the run does not have it."""
        with mlflow_errors(run_id):
            if path not in {artifact.path for artifact in self._client.list_artifacts(run_id)}:
                return None
            return Path(self._client.download_artifacts(run_id, path, folder))

    def children(self, parent_id: str) -> list[RunFacts]:
        """Facts of all runs of a sweep."""
        with mlflow_errors(self.shown_uri), no_garbage_collection():
            runs = search_runs(self._client, f"tags.`{PARENT_RUN}` = '{quoted(parent_id)}'")
        return [facts_of(run) for run in runs]

    def log_text(self, run_id: str, text: str, path: str) -> None:
        """Log a text as the artifact `path` of a run."""
        with mlflow_errors(f"{path} for run {run_id}"):
            self._client.log_text(run_id, text, path)


def facts_of(run: "Run") -> RunFacts:
    """Read the facts out of a run of MLflow."""
    tags: dict[str, str] = dict(run.data.tags)
    metrics: dict[str, float] = run.data.metrics
    finished = f"{FINAL}/AP" in metrics  # else the newest evaluation
    groups = (f"{FINAL}/",) if finished else (f"{ACCURACY}/", f"{VAL}/")
    results = {
        name.removeprefix(group): value for group in groups for name, value in metrics.items() if name.startswith(group)
    }
    return RunFacts(
        title=f"{run.info.run_name} ({run.info.run_id[:8]})",
        params=dict(run.data.params),
        data=_with_prefix(tags, DIGEST),
        commit=tags.get(COMMIT),
        versions=_with_prefix(tags, VERSION),
        results=results,
        run_id=run.info.run_id,
        parent_id=tags.get(PARENT_RUN),
        status=run.info.status.lower(),
        folder=tags.get("run_folder"),
        tags={key: redact(value) for key, value in tags.items()},
    )


def _with_prefix(tags: dict[str, str], prefix: str) -> dict[str, str]:
    return {key.removeprefix(prefix): value for key, value in sorted(tags.items()) if key.startswith(prefix)}


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Suspend the search for reference cycles: it takes most of the time while MLflow makes hundreds of thousands of objects."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
