"""The queue and its delivery, into a database without a server. `test_tracking_server.py` has the server."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from mlflow import MlflowClient
from mlflow.entities import Run

from pipeline.tracking.event_log import EventLog
from pipeline.tracking.names import flatten, mlflow_key, mlflow_value, redact
from pipeline.tracking.settings import TrackingSettings
from pipeline.tracking.system import system_metrics
from pipeline.tracking.tracker import DatasetInput, Tracker

ROOT = Path(__file__).parent.parent
PATIENCE = 60.0  # seconds

# MLflow's database layer uses options that SQLAlchemy 2.1 has deprecated; nothing of ours calls SQLAlchemy.
pytestmark = pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SADeprecationWarning")

# A training in another process: it logs ever on, until it is killed.
TRAINING = """
import sys, time
from pathlib import Path
from pipeline.tracking.settings import TrackingSettings
from pipeline.tracking.tracker import Tracker

storage, first, count = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
tracker = Tracker(storage / "queue", TrackingSettings.resolve(storage, experiment="e", run_name="r"))
tracker.begin({"lr": 0.1}, {})
for step in range(first, first + count):
    tracker.metrics({f"train/loss_{i}": step + i / 100 for i in range(8)}, step, timestamp=1e9 + step)
print("logged", flush=True)
time.sleep(600)
"""


@pytest.fixture(autouse=True)
def _no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture(scope="module")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MLflow takes seconds to make its tables; they are made once."""
    folder = tmp_path_factory.mktemp("database")
    MlflowClient(f"sqlite:///{folder}/mlflow.db").search_experiments()
    return folder / "mlflow.db"


@pytest.fixture
def storage(tmp_path: Path, empty_database: Path) -> Path:
    shutil.copyfile(empty_database, tmp_path / "mlflow.db")
    return tmp_path


def resolved(storage: Path, **settings: str) -> TrackingSettings:
    return TrackingSettings.resolve(storage, experiment="e", run_name="r", **settings)


def open_tracker(storage: Path) -> Tracker:
    return Tracker(storage / "queue", resolved(storage))


def delivered_run(tracker: Tracker, storage: Path) -> Run:
    """The only run there is, once everything has arrived."""
    assert tracker.flush(PATIENCE)
    client = MlflowClient(resolved(storage).uri)
    experiment = client.get_experiment_by_name("e")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    return run


def history(storage: Path, run: Run, key: str) -> list[tuple[int, float]]:
    """(step, value) of every row, as they were stored."""
    rows = MlflowClient(resolved(storage).uri).get_metric_history(run.info.run_id, key)
    return [(row.step, row.value) for row in rows]


def test_a_run_carries_everything_that_was_logged(storage: Path) -> None:
    datasets = [DatasetInput("coco", "sha256:" + "ab" * 32, "s3://bucket/coco", "training")]
    with open_tracker(storage) as tracker:
        assert tracker.run_id is None
        tracker.begin(flatten({"model": {"reg_max": 32}, "seed": None}), {"variant": "n"}, datasets, "jobs/train.py")
        tracker.metrics({"train/loss": 2.5, "val/AP": 0.25}, step=3, timestamp=1e9)
        tracker.tags({"stage": "2"})
        tracker.finish("FINISHED")
        run = delivered_run(tracker, storage)
        assert tracker.run_id == run.info.run_id
        assert tracker.pending == 0
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "r"
    assert run.data.params == {"model.reg_max": "32", "seed": "None"}
    assert run.data.metrics == {"train/loss": 2.5, "val/AP": 0.25}
    expected = {"variant": "n", "stage": "2", "mlflow.source.name": "jobs/train.py", "dfine.run_key": tracker.run_key}
    assert expected.items() <= run.data.tags.items()
    (source,) = run.inputs.dataset_inputs
    assert (source.dataset.name, source.dataset.digest) == ("coco", ("ab" * 32)[:36])
    assert json.loads(source.dataset.source) == {"uri": "s3://bucket/coco"}
    assert [(tag.key, tag.value) for tag in source.tags] == [("mlflow.data.context", "training")]


def test_every_kind_of_artifact_arrives_whole_and_leaves_the_queue(storage: Path) -> None:
    folder = storage / "plots"
    folder.mkdir()
    (folder / "a.txt").write_text("a")
    file = storage / "report.txt"
    file.write_text("before")
    figure = Figure(figsize=(1, 1))
    figure.subplots().plot([0, 1])
    with open_tracker(storage) as tracker:
        tracker.begin({}, {})
        tracker.artifact(file, "reports/report.txt")
        file.write_text("after")
        tracker.artifact(folder, "plots")
        tracker.text("secret at http://user:word@host/", "note.txt")
        tracker.figure(figure, "curves/pr.png")
        tracker.table({"name": ["cat", "dog"], "AP": [0.5, math.nan]}, "tables/per_class.json")
        tracker.image("val/pred", np.zeros((300, 400, 3), np.uint8), step=7)
        run = delivered_run(tracker, storage)
    client = MlflowClient(resolved(storage).uri)

    def content(path: str) -> str:
        return Path(client.download_artifacts(run.info.run_id, path)).read_text()

    assert content("reports/report.txt") == "before"
    assert content("plots/a.txt") == "a"
    assert content("note.txt") == "secret at http://***@host/"
    assert [info.path for info in client.list_artifacts(run.info.run_id, "curves")] == ["curves/pr.png"]
    table = client.load_table(run.info.experiment_id, "tables/per_class.json", [run.info.run_id])
    assert table["name"].tolist() == ["cat", "dog"]
    assert table["AP"].iloc[0] == 0.5
    assert math.isnan(table["AP"].iloc[1])
    images = [info.path for info in client.list_artifacts(run.info.run_id, "images")]
    assert [path.startswith("images/val~pred+step+7+timestamp+") for path in images] == [True, True]
    assert sorted(path.partition("Z")[0].rpartition(".")[2] for path in images) == ["png", "webp"]
    assert run.data.tags["mlflow.loggedImages"] == "True"
    assert json.loads(run.data.tags["mlflow.loggedArtifacts"]) == [{"path": "tables/per_class.json", "type": "table"}]
    assert list((storage / "queue" / "files").iterdir()) == []


def test_steps_repeated_after_a_resume_are_stored_once(storage: Path) -> None:
    with open_tracker(storage) as tracker:
        tracker.begin({"lr": 0.1}, {})
        for step in range(10):
            tracker.metrics({"loss": step}, step)
        assert tracker.flush(PATIENCE)
    with open_tracker(storage) as tracker:
        tracker.begin({"lr": 0.2}, {})  # params cannot change: the first time counts
        for step in range(5, 15):
            tracker.metrics({"loss": -step}, step)
        tracker.metrics({"val/AP": 0.5}, step=8)  # another name has its own steps
        run = delivered_run(tracker, storage)
    assert history(storage, run, "loss") == [(s, s) for s in range(10)] + [(s, -s) for s in range(10, 15)]
    assert history(storage, run, "val/AP") == [(8, 0.5)]
    assert run.data.params == {"lr": "0.1"}


def test_a_run_that_continues_is_running_again(storage: Path) -> None:
    with open_tracker(storage) as tracker:
        tracker.begin({}, {})
        tracker.finish("FAILED")
        assert delivered_run(tracker, storage).info.status == "FAILED"
    with open_tracker(storage) as tracker:
        tracker.begin({}, {})
        assert delivered_run(tracker, storage).info.status == "RUNNING"


@pytest.mark.parametrize("lost", ["offsets", "everything"])
def test_a_delivery_that_was_not_noted_is_repeated_without_a_trace(storage: Path, lost: str) -> None:
    with open_tracker(storage) as tracker:
        tracker.begin({"lr": 0.1}, {}, [DatasetInput("d", "1", "/d", "training")])
        for step in range(120):
            tracker.metrics({"loss": step, "odd": math.nan}, step)
        tracker.finish("FINISHED")
        before = delivered_run(tracker, storage)
    noted = storage / "queue" / "delivered.json"
    if lost == "everything":  # killed between the run's creation and noting its id
        noted.unlink()
    else:
        noted.write_text(json.dumps({"run_id": tracker.run_id}))
    with open_tracker(storage) as again:
        assert again.pending == 122
        again.metrics({"loss": 120}, 120)
        after = delivered_run(again, storage)
    assert after.info.run_id == before.info.run_id
    assert history(storage, after, "loss") == [(step, step) for step in range(121)]
    assert len(history(storage, after, "odd")) == 120
    assert len(after.inputs.dataset_inputs) == 1
    assert not (storage / "queue" / "rejected.jsonl").exists()


def test_a_request_whose_answer_was_lost_stores_nothing_twice(storage: Path) -> None:
    with open_tracker(storage) as tracker:
        tracker.begin({}, {})
        run = delivered_run(tracker, storage)
        delivery = tracker._courier._delivery
        assert delivery is not None
        event = {"kind": "metrics", "step": 1, "time": 5, "values": {"a": 1.0, "b": math.nan}}
        for _ in range(2):
            delivery._last_steps = {}  # as if asked before the first of the two requests had taken effect
            delivery.send([event])
    assert history(storage, run, "a") == [(1, 1.0)]
    assert len(history(storage, run, "b")) == 1


def test_a_training_killed_while_it_delivers_loses_and_doubles_nothing(storage: Path) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", TRAINING, str(storage), "0", "600"], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    noted = storage / "queue" / "delivered.json"
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == "logged\n"
        deadline = time.monotonic() + PATIENCE
        while not noted.exists() or json.loads(noted.read_text())["records"] < 20_000:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        child.send_signal(signal.SIGKILL)
        child.communicate()
    with open_tracker(storage) as tracker:
        assert tracker.pending > 100, "it was killed too late"
        tracker.begin({}, {})
        for step in range(500, 650):  # resumed from the checkpoint before step 500
            tracker.metrics({f"train/loss_{i}": step + i / 100 for i in range(8)}, step)
        run = delivered_run(tracker, storage)
    for i in range(8):
        rows = history(storage, run, f"train/loss_{i}")
        assert rows == [(step, step + i / 100) for step in range(650)]


def test_a_database_that_cannot_be_reached_delays_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = resolved(tmp_path, uri="http://user:word@127.0.0.1:9")
    tracker = Tracker(tmp_path / "queue", settings)
    started = time.monotonic()
    tracker.begin({"uri": settings.uri}, {"uri": settings.uri})
    for step in range(1000):
        tracker.metrics({"loss": 1.0}, step)
    assert time.monotonic() - started < 5
    while len(caplog.records) < 1:
        assert time.monotonic() - started < PATIENCE
        time.sleep(0.05)
    assert not tracker.flush(3.0)
    tracker.close(0.5)
    assert tracker.pending == 1001
    failures = [record.getMessage() for record in caplog.records if "fails" in record.getMessage()]
    assert len(failures) == 1
    assert "http://***@127.0.0.1:9" in failures[0]
    written = [path.read_text() for path in (tmp_path / "queue").glob("*.json*")]
    assert not any("word" in text for text in [caplog.text, repr(settings), *written])


def test_a_lower_delivery_may_hang_while_the_next_process_writes(tmp_path: Path) -> None:
    queue = tmp_path / "queue"
    first = Tracker(queue, resolved(tmp_path, uri="http://127.0.0.1:9"))
    with pytest.raises(RuntimeError, match="another process"):
        Tracker(queue, resolved(tmp_path, uri="http://127.0.0.1:9"))
    first.close(0)
    second = Tracker(queue, resolved(tmp_path, uri="http://127.0.0.1:9"))
    second.close(0)


def test_what_the_server_refuses_is_set_aside_and_the_rest_arrives(
    storage: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with open_tracker(storage) as tracker:
        tracker.begin({}, {})
        tracker.metrics({"a": 1}, 1)
        tracker.metrics({"a": 2}, 2, timestamp=-5)  # MLflow takes no time before 1970
        tracker.metrics({"a": 3}, 3)
        run = delivered_run(tracker, storage)
    assert history(storage, run, "a") == [(1, 1), (3, 3)]
    (rejected,) = (storage / "queue" / "rejected.jsonl").read_text().splitlines()
    assert json.loads(rejected)["event"]["values"] == {"a": 2}
    assert "refused an event" in caplog.text


def test_what_is_not_finite_is_stored_as_nan(storage: Path) -> None:
    with open_tracker(storage) as tracker:
        tracker.begin({}, {})
        tracker.metrics({"nan": math.nan, "inf": math.inf, "-inf": -math.inf}, 1)
        run = delivered_run(tracker, storage)
    assert [math.isnan(value) for value in run.data.metrics.values()] == [True, True, True]


def test_names_and_values_that_mlflow_would_refuse_are_made_to_fit(storage: Path) -> None:
    with open_tracker(storage) as tracker:
        tracker.begin({"a(b)": "x" * 7000, "k" * 300: 1}, {"t": "y" * 9000})
        tracker.metrics({"val/AP/T-shirt (red)": 0.5, "val//AP/": 0.25, "../x": 1.0}, 1)
        run = delivered_run(tracker, storage)
    assert len(run.data.params["a_b_"]) == 6000
    assert run.data.params["k" * 250] == "1"
    assert len(run.data.tags["t"]) == 8000
    assert run.data.metrics == {"val/AP/T-shirt _red_": 0.5, "val/AP": 0.25, "_/x": 1.0}
    assert not (storage / "queue" / "rejected.jsonl").exists()


def test_a_child_run_names_its_parent(storage: Path) -> None:
    with Tracker(storage / "queue", resolved(storage, parent_run_id="0123456789abcdef")) as tracker:
        tracker.begin({}, {})
        assert delivered_run(tracker, storage).data.tags["mlflow.parentRunId"] == "0123456789abcdef"


def test_another_folder_with_the_same_key_continues_the_run(storage: Path) -> None:
    with Tracker(storage / "driver", resolved(storage)) as driver:
        driver.begin({"lr": 1}, {})
        driver.metrics({"loss": 1.0}, 1)
        assert driver.flush(PATIENCE)
    with Tracker(storage / "worker", resolved(storage, run_key=driver.run_key)) as worker:
        worker.metrics({"loss": 7.0}, 1)
        worker.metrics({"loss": 2.0}, 2)
        run = delivered_run(worker, storage)
    assert history(storage, run, "loss") == [(1, 1.0), (2, 2.0)]


def test_a_folder_of_another_run_is_refused(tmp_path: Path) -> None:
    settings = resolved(tmp_path, uri="http://127.0.0.1:9", run_key="one")
    Tracker(tmp_path / "queue", settings).close(0)
    with pytest.raises(ValueError, match="run_key one, not two"):
        Tracker(tmp_path / "queue", resolved(tmp_path, uri="http://127.0.0.1:9", run_key="two"))


# Settings


def test_the_default_store_is_a_database_in_the_storage() -> None:
    settings = TrackingSettings.resolve("some/place", experiment="dfine/coco", run_name="r")
    assert settings.uri == f"sqlite:///{Path.cwd()}/some/place/mlflow.db"
    assert settings.artifact_location == f"file://{Path.cwd()}/some/place/mlartifacts/dfine%2Fcoco"


def test_an_argument_goes_before_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://environment:5000")
    assert TrackingSettings.resolve("s3://b/x", experiment="e", run_name="r").uri == "http://environment:5000"
    named = TrackingSettings.resolve("s3://b/x", experiment="e", run_name="r", uri="http://argument:5000")
    assert named.uri == "http://argument:5000"
    assert named.artifact_location is None


def test_remote_storage_needs_a_server() -> None:
    with pytest.raises(ValueError, match=r"s3://b/x cannot hold.*MLFLOW_TRACKING_URI"):
        TrackingSettings.resolve("s3://b/x", experiment="e", run_name="r")


@pytest.mark.parametrize("uri", ["./mlruns", "file:///tmp/mlruns", "htp://x"])
def test_an_unusable_tracking_uri_is_refused(tmp_path: Path, uri: str) -> None:
    with pytest.raises(ValueError, match="name a server"):
        resolved(tmp_path, uri=uri)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://user:word@host:5000/path", "http://***@host:5000/path"),
        ("failed: https://u:p@ss@host/x and more", "failed: https://***@host/x and more"),
        ("postgresql://u:word@db/mlflow", "postgresql://***@db/mlflow"),
        ("http://token@host/x", "http://***@host/x"),
        ("http://host/x?at=a@b:c", "http://host/x?at=a@b:c"),
        ("mail me@home", "mail me@home"),
    ],
)
def test_passwords_are_not_shown(text: str, shown: str) -> None:
    assert redact(text) == shown


# Names


@given(st.text(max_size=300))
def test_every_name_becomes_one_that_mlflow_takes(name: str) -> None:
    from mlflow.utils.validation import _validate_metric_name, _validate_param_name

    key = mlflow_key(name)
    _validate_metric_name(key)
    _validate_param_name(key)
    assert mlflow_key(key) == key


def test_a_long_value_says_that_it_was_cut() -> None:
    assert mlflow_value("abcdef", 4) == "abc…"


def test_settings_are_flattened_to_dotted_keys() -> None:
    assert flatten({"a": {"b": {"c": 1}}, "d": [1, 2], "e": None}) == {"a.b.c": 1, "d": "[1, 2]", "e": None}


# The file of events


def test_a_torn_last_line_was_never_an_event(tmp_path: Path) -> None:
    path = tmp_path / "log"
    log = EventLog(path, 0)
    log.append({"n": 1})
    log.append({"n": 2})
    log.close()
    with path.open("ab") as file:
        file.write(b'{"n": 3, "text": "' + b"x" * 200_000)  # longer than what is looked at in one go
    log = EventLog(path, 0)
    assert log.pending == 2
    log.append({"n": 4})
    assert [event["n"] for event, _ in log.read(10)] == [1, 2, 4]
    log.close()


OPERATIONS = st.one_of(
    st.tuples(st.just("append"), st.text(max_size=5)),
    st.tuples(st.just("read"), st.integers(1, 3)),
    st.tuples(st.just("reopen"), st.binary(max_size=8)),  # behind a line that the bytes are the torn rest of
)


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(OPERATIONS, max_size=12))
def test_a_log_reads_back_what_was_written_wherever_it_was_cut_and_reopened(
    tmp_path: Path, operations: list[tuple[str, Any]]
) -> None:
    path = tmp_path / "log"
    path.unlink(missing_ok=True)
    log, written, taken, offset = EventLog(path, 0), [], [], 0
    for kind, value in operations:
        if kind == "append":
            log.append({"text": value})
            written.append({"text": value})
        elif kind == "read":
            for event, offset in log.read(value):  # noqa: B007  # of the last one
                taken.append(event)
            log.passed(len(taken) - (len(written) - log.pending), offset)
        else:
            log.close()
            with path.open("ab") as file:
                file.write(value.replace(b"\n", b""))
            log = EventLog(path, offset)
        assert log.pending == len(written) - len(taken)
    rest = [event for event, _ in log.read(100)]
    log.close()
    assert taken + rest == written


def test_the_node_is_measured() -> None:
    system_metrics()
    metrics = system_metrics()
    assert 0 <= metrics["system/cpu_utilization_percentage"] <= 100
    assert 0 < metrics["system/system_memory_usage_percentage"] < 100
    # An independent look at the same number.
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
    assert metrics["system/process_memory_usage_megabytes"] == pytest.approx(resident, rel=0.1)
