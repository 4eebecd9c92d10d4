"""Runs that MLflow knows: what each was, and what came of it."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.utils.mlflow_tags import MLFLOW_GIT_COMMIT, MLFLOW_PARENT_RUN_ID

from pipeline.errors import UserError
from pipeline.redaction import redact
from pipeline.tracking.asking import asking
from pipeline.tracking.names import RUN_KEY
from pipeline.tracking.settings import TrackingSettings

RUNS = "runs:/"
VERSION, DIGEST = "version.", "digest."  # beginnings of tags
_ID = re.compile(r"[0-9a-f]{32}")


class RunLookupError(UserError, ValueError):
    """No run, or several, by what was asked for."""


@dataclass(frozen=True)
class RunFacts:
    title: str
    params: dict[str, str]  # by dotted key
    data: dict[str, str]  # digest by use: train, val
    commit: str | None
    versions: dict[str, str]  # of packages
    results: dict[str, float]  # by name: AP, AP50, ...
    run_id: str | None = None  # of MLflow
    parent_id: str | None = None  # of the sweep that it belongs to
    status: str = ""
    tags: dict[str, str] = field(default_factory=dict)


class Runs:
    """Args:
    storage: whose database is taken where no server is named.

    Raises:
        RunLookupError: there is none.
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
        self._client = MlflowClient(settings.uri, registry_uri=settings.uri)

    def find(self, named: str) -> RunFacts:
        """
        Args:
            named: id, `runs:/ID`, or name of a run.

        Raises:
            RunLookupError: nothing or several are so called.
        """
        wanted = named.removeprefix(RUNS)
        if _ID.fullmatch(wanted):
            with asking(f"{named} at {self.shown_uri}", RunLookupError):
                return facts_of(self._client.get_run(wanted))
        found = self._search(f"attributes.run_name = '{_quoted(wanted)}'")
        if len(found) != 1:
            several = ", ".join(run.info.run_id for run in found[:5])
            raise RunLookupError(
                f"{named}: {len(found)} runs of {self.shown_uri} are so called"
                + (f": give one of the ids {several}" if found else ": give a run's folder, id or name")
            )
        return facts_of(found[0])

    def by_key(self, run_key: str) -> RunFacts | None:
        """The run with our own key, which is in the run's folder as well."""
        found = self._search(f"tags.`{RUN_KEY}` = '{_quoted(run_key)}'")
        return facts_of(found[0]) if found else None

    def children(self, parent_id: str) -> list[RunFacts]:
        return [facts_of(run) for run in self._search(f"tags.`{MLFLOW_PARENT_RUN_ID}` = '{_quoted(parent_id)}'")]

    def log_text(self, run_id: str, text: str, path: str) -> None:
        """As the run's artifact `path`."""
        with asking(f"{path} for run {run_id}", RunLookupError):
            self._client.log_text(run_id, text, path)

    def _search(self, condition: str) -> list[Run]:
        with asking(self.shown_uri, RunLookupError):
            experiments = [experiment.experiment_id for experiment in self._client.search_experiments()]
            return list(self._pages(experiments, condition)) if experiments else []

    def _pages(self, experiments: Sequence[str], condition: str) -> Iterator[Run]:
        token: str | None = None
        while True:
            page = self._client.search_runs(list(experiments), condition, page_token=token)
            yield from page
            token = page.token
            if not token:
                return


def _quoted(text: str) -> str:
    """Raises: RunLookupError, for what the search language cannot hold."""
    if "'" in text or "\\" in text:
        raise RunLookupError(f"{text!r} is no run: names with quotes cannot be searched for, give the id")
    return text


def facts_of(run: Run) -> RunFacts:
    tags: dict[str, str] = dict(run.data.tags)
    final = {
        name.removeprefix("final/"): value for name, value in run.data.metrics.items() if name.startswith("final/")
    }
    return RunFacts(
        title=f"{run.info.run_name} ({run.info.run_id[:8]})",
        params=dict(run.data.params),
        data=_beginning(tags, DIGEST),
        commit=tags.get(MLFLOW_GIT_COMMIT),
        versions=_beginning(tags, VERSION),
        results=final,
        run_id=run.info.run_id,
        parent_id=tags.get(MLFLOW_PARENT_RUN_ID),
        status=run.info.status.lower(),
        tags={key: redact(value) for key, value in tags.items()},
    )


def _beginning(tags: dict[str, str], prefix: str) -> dict[str, str]:
    return {key.removeprefix(prefix): value for key, value in sorted(tags.items()) if key.startswith(prefix)}
