"""Tracking server, experiment and run; names and values in the form that MLflow accepts."""

import os
import posixpath
import re
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Self
from urllib.parse import quote

from pyarrow import fs

from pipeline import storage
from pipeline.errors import UserError
from pipeline.mlflow_access import TRACKING_URI
from pipeline.ray_job import relative_problems
from pipeline.redaction import redact

SERVERS = ("http", "https")
DATABASES = ("sqlite", "postgresql", "mysql", "mssql")

RUN_KEY = "dfine.run_key"  # tag: finds the run again after a crash between its creation and noting its id
Scalar = str | int | float | bool | None
EXPERIMENT_FILE = "experiment.yaml"  # artifact of a run: every value of its experiment

# MLflow's limits, in characters; longer values end in an ellipsis.
MAX_KEY = 250
MAX_PARAM = 6000
MAX_TAG = 8000

_ILLEGAL = re.compile(r"[^/\w.\- :]")


class TrackingError(UserError, ValueError):
    """A tracking server or database that is not named, or cannot be used."""


@dataclass(frozen=True, kw_only=True)
class TrackingSettings:
    """Server, experiment and run as plain data, which can be sent to another process. Made by `resolve`."""

    uri: str = field(repr=False)  # may hold a password: print `shown_uri`
    experiment: str
    run_name: str
    parent_run_id: str | None = None
    # Identifies the run before the server has given it an id. None: the outbox generates and keeps one. Where the outbox does
    # not travel with the run (disks of different nodes), the key of the first outbox must.
    run_key: str | None = None
    artifact_location: str | None = None  # for a new experiment; None: the server decides

    @classmethod
    def resolve(
        cls,
        storage_uri: str | os.PathLike[str],
        *,
        experiment: str,
        run_name: str,
        uri: str | None = None,
        parent_run_id: str | None = None,
        run_key: str | None = None,
    ) -> Self:
        """Choose the server: `uri`, else MLFLOW_TRACKING_URI, else a database in the run's storage.

        Raises:
            TrackingError: storage is remote and no server is named, or the URI is not one of a server or database.
        """
        named = uri or os.environ.get(TRACKING_URI)
        artifact_location = None
        if not named:
            if problems := relative_problems([("storage", os.fspath(storage_uri))]):
                raise TrackingError(problems[0])
            filesystem, folder = storage.resolve(storage_uri)
            if not isinstance(filesystem, fs.LocalFileSystem):
                raise TrackingError(
                    f"no tracking server is named, and {storage_uri} cannot hold MLflow's database, which needs a disk:"
                    " start `mlflow server` and set MLFLOW_TRACKING_URI"
                )
            named = f"sqlite:///{folder}/mlflow.db"
        scheme = named.split("://")[0].split("+")[0]
        if "://" not in named or scheme not in (*SERVERS, *DATABASES):
            raise TrackingError(
                f"tracking URI {redact(named)!r}: name a server (http://HOST:PORT) or a database (sqlite:////PATH);"
                " MLflow no longer keeps runs in plain folders"
            )
        if scheme == "sqlite":
            path = named.split(":///", 1)[-1]
            if problems := relative_problems([("tracking URI sqlite:///", path)]):
                raise TrackingError(problems[0])
            if signs := [sign for sign in "%?" if sign in str(Path(path).absolute())]:
                raise TrackingError(
                    f"tracking database {path}: MLflow takes {' and '.join(signs)} in a database's path for parts of a URI, and"
                    " would write it elsewhere: choose another storage folder, or name a server or database by tracking.uri"
                )
            database = Path(path).absolute()  # another process has another working directory
            named = f"sqlite:///{database}"
            artifact_location = f"file://{quote(str(database.parent / 'mlartifacts'))}/{quote(experiment, safe='')}"
        return cls(
            uri=named,
            experiment=experiment,
            run_name=run_name,
            parent_run_id=parent_run_id,
            run_key=run_key,
            artifact_location=artifact_location,
        )

    def to_note(self) -> dict[str, str | None]:
        """Values that the outbox notes, so that a later command can deliver what is left; without a password."""
        return {
            "uri": self.shown_uri,
            "experiment": self.experiment,
            "run_name": self.run_name,
            "parent_run_id": self.parent_run_id,
        }

    @property
    def shown_uri(self) -> str:
        """The URI without its password, for messages and logs."""
        return redact(self.uri)


@lru_cache(maxsize=65536)
def mlflow_key(name: str) -> str:
    """Convert a name to the nearest one that MLflow accepts: letters, digits and `_-. :/`, as a path that leads to itself."""
    legal = posixpath.normpath(_ILLEGAL.sub("_", name).lstrip("/"))
    if legal.startswith("."):  # alone, or leading upwards
        legal = "_" + legal.lstrip(".")
    return legal[:MAX_KEY].rstrip("/")


def mlflow_value(value: Scalar, limit: int) -> str:
    """Convert a value to text of at most `limit` characters."""
    text = str(value)
    return text if len(text) <= limit else f"{text[: limit - 1]}…"
