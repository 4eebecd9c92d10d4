"""Which tracking server, experiment and run."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self
from urllib.parse import quote

from pyarrow import fs

from pipeline import storage
from pipeline.errors import UserError
from pipeline.ray_job import relative_problems
from pipeline.redaction import redact

SERVERS = ("http", "https")
DATABASES = ("sqlite", "postgresql", "mysql", "mssql")


class TrackingError(UserError, ValueError):
    """A tracking server or database that is not named, or cannot be used."""


@dataclass(frozen=True, kw_only=True)
class TrackingSettings:
    """Plain data, to be handed to another process. Made by `resolve`."""

    uri: str = field(repr=False)  # may hold a password: show `shown_uri`
    experiment: str
    run_name: str
    parent_run_id: str | None = None
    # Identifies the run before the server has given it an id. None: the queue's folder draws and keeps one. Where the
    # folder does not travel with the run (disks of different nodes), the key of the first one must.
    run_key: str | None = None
    artifact_location: str | None = None  # of a new experiment; None: the server decides

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
        """The server is `uri`, else MLFLOW_TRACKING_URI, else a database in the run's storage.

        Raises:
            TrackingError: storage is remote and no server is named, or MLflow cannot keep a run in what is named.
        """
        named = uri or os.environ.get("MLFLOW_TRACKING_URI")
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

    @property
    def shown_uri(self) -> str:
        """For people and logs."""
        return redact(self.uri)
