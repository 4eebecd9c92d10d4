"""MLflow's SQLite database: made whole or not at all, by whoever comes first."""

import os
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest

from pipeline.tracking.client import connect
from pipeline.tracking.database import ensure_database
from pipeline.tracking.settings import TrackingError

pytestmark = pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SADeprecationWarning")
MAKE = "import sys; from pipeline.tracking.database import ensure_database; ensure_database(sys.argv[1])"
ROOT = Path(__file__).parents[2]


def uri(folder: Path) -> str:
    return f"sqlite:///{folder}/mlflow.db"


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def half_made(path: Path) -> None:
    """The state that a killed process of MLflow leaves: some tables, and one of a migration that was cut off."""
    with closing(sqlite3.connect(path)) as database:
        database.execute("create table experiments (experiment_id integer primary key)")
        database.execute("create table _alembic_tmp_tags (key text)")
        database.execute("create table alembic_version (version_num text)")
        database.commit()


def test_a_new_database_works_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    client = connect(uri(tmp_path))
    client.create_run(client.create_experiment("one"))
    assert names(tmp_path) == {"mlflow.db", "mlflow.db.lock"}
    before = (tmp_path / "mlflow.db").stat().st_ino
    ensure_database(uri(tmp_path))
    assert (tmp_path / "mlflow.db").stat().st_ino == before


def test_no_experiment_keeps_its_artifacts_where_the_process_worked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as the temporary copy of a submitted job, which Ray deletes."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "temporary").mkdir()
    monkeypatch.chdir(tmp_path / "temporary")
    client = connect(uri(tmp_path / "runs"))
    (default,) = client.search_experiments()
    assert default.artifact_location == f"file://{tmp_path}/runs/mlartifacts/0"


def test_a_half_made_database_is_set_aside_by_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    half_made(tmp_path / "mlflow.db")
    client = connect(uri(tmp_path))
    client.create_experiment("one")
    (aside,) = [name for name in names(tmp_path) if "incomplete" in name]
    assert aside in caplog.text
    with closing(sqlite3.connect(tmp_path / aside)) as database:
        assert database.execute("select name from sqlite_master where name = '_alembic_tmp_tags'").fetchone()


def test_a_database_with_runs_is_never_moved(tmp_path: Path) -> None:
    client = connect(uri(tmp_path))
    client.create_run(client.create_experiment("one"))
    with closing(sqlite3.connect(tmp_path / "mlflow.db")) as database:
        database.execute("create table _alembic_tmp_tags (key text)")
        database.commit()
    with pytest.raises(TrackingError, match="a migration of this database was cut off"):
        ensure_database(uri(tmp_path))
    assert "mlflow.db" in names(tmp_path)
    (tmp_path / "text.db").write_text("no database at all, but of some length " * 50)
    with pytest.raises(TrackingError, match="not a readable SQLite database"):
        ensure_database(f"sqlite:///{tmp_path}/text.db")


@pytest.mark.slow
def test_six_processes_at_once_make_one_database(tmp_path: Path) -> None:
    makers = [subprocess.Popen([sys.executable, "-c", MAKE, uri(tmp_path)], cwd=ROOT) for _ in range(6)]
    assert [maker.wait(timeout=300) for maker in makers] == [0] * 6
    assert names(tmp_path) == {"mlflow.db", "mlflow.db.lock"}
    connect(uri(tmp_path)).create_experiment("one")


@pytest.mark.slow
@pytest.mark.parametrize("after", [0.0, 0.2, 0.4])
def test_a_kill_while_it_is_made_leaves_no_half_one(tmp_path: Path, after: float) -> None:
    maker = subprocess.Popen([sys.executable, "-c", MAKE, uri(tmp_path)], cwd=ROOT)
    until = time.monotonic() + 120
    while not any(name.endswith(".new") for name in names(tmp_path)):
        assert time.monotonic() < until
        assert maker.poll() is None
        time.sleep(0.01)
    time.sleep(after)
    os.kill(maker.pid, signal.SIGKILL)
    maker.wait()
    connect(uri(tmp_path)).create_experiment("one")
    assert names(tmp_path) == {"mlflow.db", "mlflow.db.lock"}
