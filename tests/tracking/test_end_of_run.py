"""The end of a run under faults: server down, slow link, locked database, a kill at every point. Each event arrives once."""

import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.models import Model

from pipeline.tracking.delivery import UndeliveredError, deliver_rest, settings_of
from pipeline.tracking.settings import TrackingError
from pipeline.tracking.tracker import Tracker
from pipeline.training import run_dir
from pipeline.training.recording import deliver_run
from tests.support import end_of_run
from tests.support.end_of_run import KEY, assert_recorded_once, end, end_killed_at, tracking_at
from tests.support.mlflow_server import Server
from tests.support.slow_link import SlowLink

# MLflow's database layer uses options that SQLAlchemy 2.1 has deprecated; this project does not call SQLAlchemy.
pytestmark = pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SADeprecationWarning")
NOWHERE = "http://127.0.0.1:9"
POINTS = 60  # more than the end has

# Holds an exclusive lock on a database for some seconds.
LOCKING = """
import sqlite3, sys, time
database = sqlite3.connect(sys.argv[1], timeout=60, isolation_level=None)
database.execute("begin exclusive")
print("locked", flush=True)
time.sleep(float(sys.argv[2]))
"""


@pytest.fixture(autouse=True)
def _no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture
def database(tmp_path: Path, empty_database: Path) -> Path:
    return Path(shutil.copyfile(empty_database, tmp_path / "mlflow.db"))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server"))
    server.start()
    yield server
    server.kill()


def model_of(folder: Path, size: int) -> Path:
    """A saved MLflow model whose weights have `size` bytes."""
    folder.mkdir()
    Model().save(folder / "MLmodel")
    with (folder / "weights.safetensors").open("wb") as file:
        file.truncate(size)
    return folder


def uri_of(database: Path) -> str:
    return f"sqlite:///{database}"


def test_a_server_that_is_down_at_the_end_and_back_later_gets_everything(tmp_path: Path, database: Path) -> None:
    run = tmp_path / "run"
    end(run, NOWHERE, model_of(tmp_path / "model", 1000), patience=1.0)
    assert run_dir.is_finished(str(run))
    with pytest.raises(UndeliveredError, match=r"not in MLflow yet: .*models 1.*status 1.*dfine record"):
        raise UndeliveredError(
            deliver_rest(run / "tracking", tracking_at(NOWHERE, run), patience=1.0).problem(str(run))
        )
    assert (run / run_dir.UNRECORDED).exists()
    assert deliver_run(str(run), uri_of(database)).delivered > 0
    assert_recorded_once(run, database)
    assert deliver_run(str(run), uri_of(database)).delivered == 0


def test_a_database_locked_by_another_process_is_waited_for(tmp_path: Path, database: Path) -> None:
    command = [sys.executable, "-c", LOCKING, str(database), "12"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as locking:
        assert locking.stdout is not None
        assert locking.stdout.readline() == "locked\n"
        run = tmp_path / "run"
        end(run, uri_of(database), model_of(tmp_path / "model", 1000))
        assert locking.wait() == 0, "it was not locked to the end"
    assert_recorded_once(run, database)


@pytest.mark.parametrize(
    ("size", "bytes_per_s", "request_s", "patience"),
    [
        (8_000_000, 800_000, 0.0, 7.0),  # at least 10 s for one file, of which the kernel holds about 3 s
        pytest.param(10_000, 1e9, 2.0, 10.0, marks=pytest.mark.slow),  # 2 s a request
        pytest.param(250_000_000, 5_000_000, 0.2, 30.0, marks=pytest.mark.slow),  # 50 s for one file
    ],
)
def test_a_slow_link_is_waited_for_as_long_as_bytes_pass(
    tmp_path: Path, server: Server, size: int, bytes_per_s: float, request_s: float, patience: float
) -> None:
    with SlowLink(server.port, bytes_per_s=bytes_per_s, request_s=request_s) as link:
        # A run of its own: MLflow keeps the way to a run's artifacts, which here is another link for every case.
        settings = replace(tracking_at(link.uri, tmp_path / f"{size}"), run_key=f"{size}")
        tracker = Tracker(tmp_path / "outbox", settings)
        tracker.begin({}, {})
        assert tracker.wait_for_run_id(180) is not None
        tracker.model(model_of(tmp_path / "model", size), name="detector", step=1, metrics={})
        tracker.finish("FINISHED")
        shown: list[str] = []
        started_at = time.monotonic()
        left = tracker.deliver(patience, lambda left: shown.append(str(left)))
        assert left.events == 0, f"{left} left after {time.monotonic() - started_at:.0f} s, {link.passed} bytes"
        assert tracker.rejected == []
        assert time.monotonic() - started_at > max(patience, size / bytes_per_s)
        assert "models 1, status 1" in shown[0]
        assert MlflowClient(server.uri).get_run(str(tracker.run_id)).info.status == "FINISHED"
        tracker.stop()


def test_a_link_over_which_nothing_passes_is_given_up(tmp_path: Path, server: Server) -> None:
    with SlowLink(server.port, bytes_per_s=1.0) as link:
        tracker = Tracker(tmp_path / "outbox", tracking_at(link.uri, tmp_path / "run"))
        tracker.begin({}, {})
        started_at = time.monotonic()
        assert tracker.deliver(2.0).counts == {"parameters": 1}
        assert time.monotonic() - started_at < 20
        tracker.stop()


def finish_after_a_kill(point: int, folder: Path, empty_database: Path, *, deliver: bool) -> bool:
    """Kill an end at a point, and end it by the same command or by `dfine record`; False if it had no such point."""
    folder.mkdir()
    database = Path(shutil.copyfile(empty_database, folder / "mlflow.db"))
    run, model = folder / "run", model_of(folder / "model", 1000)
    killed = end_killed_at(point, run, uri_of(database), model)
    assert killed in (0, -9)
    if killed and deliver and run_dir.is_finished(str(run)):
        deliver_run(str(run), uri_of(database))
    else:
        end(run, uri_of(database), model)
    assert_recorded_once(run, database)
    return killed == -9


@pytest.mark.parametrize("point", [5, 12, 14, 20, 28, 36])
def test_an_end_that_is_killed_is_completed(point: int, tmp_path: Path, empty_database: Path) -> None:
    end_of_run.preload()
    assert finish_after_a_kill(point, tmp_path / "end", empty_database, deliver=True)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("deliver", [True, False], ids=["record", "same command"])
def test_a_kill_at_every_point_of_the_end_loses_and_doubles_nothing(
    tmp_path: Path, empty_database: Path, deliver: bool
) -> None:
    end_of_run.preload()
    killed = [
        point
        for point in range(1, POINTS)
        if finish_after_a_kill(point, tmp_path / f"{point}", empty_database, deliver=deliver)
    ]
    assert killed == list(range(1, len(killed) + 1))
    assert 30 < len(killed) < POINTS - 1, "the end has more points than were tried"


def test_two_processes_deliver_one_rest_once(tmp_path: Path, database: Path) -> None:
    run = tmp_path / "run"
    end(run, NOWHERE, model_of(tmp_path / "model", 1000), patience=0.0)
    threads = [threading.Thread(target=deliver_run, args=(str(run), uri_of(database))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert_recorded_once(run, database)


def test_a_crafted_path_is_refused_and_touches_nothing_outside_of_the_run(tmp_path: Path, database: Path) -> None:
    secret = tmp_path / "secret" / "key"
    secret.parent.mkdir()
    secret.write_text("mine")
    run = tmp_path / "run"
    with Tracker(run / "tracking", tracking_at(uri_of(database), run)) as tracker:
        tracker.begin({}, {})
        tracker.text("harmless", "note.txt")
        with sqlite3.connect(run / "tracking" / "outbox.db") as outbox:
            outbox.execute('update events set body = replace(body, \'"file":"\', \'"file":"../../../secret/../\')')
            outbox.execute("update events set body = replace(body, 'note.txt', 'key') where kind = 'artifact'")
        assert tracker.flush(60)
    ((event, reason),) = tracker.rejected
    assert event["file"].startswith("../../../secret")
    assert "does not lie in" in reason
    assert secret.read_text() == "mine"
    assert MlflowClient(uri_of(database)).list_artifacts(str(tracker.run_id)) == []


def test_a_password_is_asked_for_where_it_was_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Tracker(tmp_path, tracking_at("http://me:secret@127.0.0.1:9", tmp_path)).stop()
    with pytest.raises(TrackingError, match="--tracking"):
        settings_of(tmp_path)
    assert settings_of(tmp_path, "http://other:5000").uri == "http://other:5000"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@127.0.0.1:9")
    assert settings_of(tmp_path).uri == "http://me:secret@127.0.0.1:9"


def test_the_rest_of_a_run_in_an_object_store_is_named_with_its_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    end(run, NOWHERE, model_of(tmp_path / "model", 1000), patience=0.0)
    monkeypatch.setattr(run_dir, "outbox_folder", lambda *_: tmp_path / f"elsewhere-{KEY}")  # as on another machine
    with pytest.raises(UndeliveredError, match=f"waits in {run}/tracking on "):
        deliver_run(str(run), NOWHERE)
