"""MLflow's SQLite database, made aside and moved into place, so that no kill and no race can leave a half-made one.

MLflow creates its tables and then migrates them in some fifty steps. A process that is killed meanwhile, or a second one
that starts at the same moment, leaves tables that every later start fails on.
"""

import fcntl
import logging
import os
import sqlite3
import time
import uuid
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from urllib.parse import quote

from pipeline.mlflow_access import import_mlflow
from pipeline.tracking.settings import TrackingError

SCHEME = "sqlite:///"
LEFTOVER_TABLES = "_alembic_tmp_%"  # a migration that was cut off leaves them

logger = logging.getLogger(__name__)


def ensure_database(tracking_uri: str) -> None:
    """Create the database of a `sqlite:///` URI if there is none; a half-made one is set aside. Other URIs are left alone.

    Raises:
        TrackingError: the database holds runs, and a migration of it was cut off.
    """
    if not tracking_uri.startswith(SCHEME):
        return
    path = Path(tracking_uri.removeprefix(SCHEME))
    if _is_complete(path):
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with _exclusive(path.with_name(f"{path.name}.lock")):
        if _is_complete(path):  # another process was faster
            return
        if path.exists():
            aside = path.with_name(f"{path.name}.incomplete-{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:6]}")
            path.rename(aside)
            logger.warning("%s was only half made, without a run in it; set aside as %s", path, aside.name)
        _create(path)


def artifact_root(database: Path) -> str:
    """URI of the folder beside a database that holds the artifacts of its experiments."""
    return f"file://{quote(str(database.parent / 'mlartifacts'))}"


def _is_complete(path: Path) -> bool:
    """Whether the database was made to its end; one that holds experiments was, whatever version made it."""
    if not path.exists():
        return False
    try:
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=60)) as database:
            tables = {name for (name,) in database.execute("select name from sqlite_master where type = 'table'")}
            leftover = database.execute("select 1 from sqlite_master where name like ?", (LEFTOVER_TABLES,)).fetchone()
            used = "experiments" in tables and database.execute("select 1 from experiments").fetchone()
            rows = database.execute("select * from alembic_version").fetchall() if "alembic_version" in tables else []
    except sqlite3.DatabaseError as error:
        raise TrackingError(
            f"{path}: not a readable SQLite database: {error}; move it away, or name another one"
        ) from None
    if used and leftover:
        raise TrackingError(
            f"{path}: a migration of this database was cut off, and it holds runs: restore a backup, or move it away"
        )
    return bool(used) or (not leftover and rows == [(_newest_revision(),)])


def _newest_revision() -> str:
    import_mlflow()
    from mlflow.store.db.utils import _get_latest_schema_revision

    revision: str = _get_latest_schema_revision()
    return revision


def _create(path: Path) -> None:
    import_mlflow()
    from mlflow.store.db.utils import _initialize_tables, create_sqlalchemy_engine_with_retry
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    for leftover in path.parent.glob(f".{path.name}.*.new*"):  # of a process that was killed here
        leftover.unlink()
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}.new")
    engine = create_sqlalchemy_engine_with_retry(f"{SCHEME}{aside}")
    try:
        _initialize_tables(engine)
    finally:
        engine.dispose()
    # The experiment "Default" is made now: the first process that opens the database would give it a folder where that works,
    # such as the temporary copy of a submitted job.
    store = SqlAlchemyStore(f"{SCHEME}{aside}", artifact_root(path))
    store._dispose_engine()
    os.replace(aside, path)


@contextmanager
def _exclusive(lock: Path) -> Iterator[None]:
    """Hold a lock file while the block runs; it is freed with the process, also by a kill."""
    with lock.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
