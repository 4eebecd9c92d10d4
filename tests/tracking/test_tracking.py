"""The outbox and its upload into a database, without a server. `test_tracking_server.py` has the server."""

import io
import json
import math
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from mlflow import MlflowClient
from mlflow.entities import Run

from pipeline.config_files import flatten
from pipeline.tracking.mlflow_writer import MlflowWriter
from pipeline.tracking.outbox import DATABASE, Outbox
from pipeline.tracking.settings import TrackingSettings
from pipeline.tracking.tracker import DatasetInput, Tracker

ROOT = Path(__file__).parents[2]
PATIENCE = 60.0  # seconds

# MLflow's database layer uses options that SQLAlchemy 2.1 has deprecated; this project does not call SQLAlchemy.
pytestmark = pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SADeprecationWarning")

# A training in another process, which logs until it is killed.
TRAINING = """
import sys, time
from pathlib import Path
from pipeline.tracking.settings import TrackingSettings
from pipeline.tracking.tracker import Tracker

storage, first, count = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
tracker = Tracker(storage / "outbox", TrackingSettings.resolve(storage, experiment="e", run_name="r"))
tracker.begin({"lr": 0.1}, {})
for step in range(first, first + count):
    tracker.metrics({f"train/loss_{i}": step + i / 100 for i in range(8)}, step, timestamp=1e9 + step)
print("logged", flush=True)
time.sleep(600)
"""


@pytest.fixture(autouse=True)
def _no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture
def storage(tmp_path: Path, empty_database: Path) -> Path:
    shutil.copyfile(empty_database, tmp_path / "mlflow.db")
    return tmp_path


def resolved(storage: Path, **settings: str) -> TrackingSettings:
    return TrackingSettings.resolve(storage, experiment="e", run_name="r", **settings)


def open_tracker(storage: Path) -> Tracker:
    return Tracker(storage / "outbox", resolved(storage))


def uploaded_run(tracker: Tracker, storage: Path) -> Run:
    """The only run, once everything is uploaded."""
    assert tracker.flush(PATIENCE)
    client = MlflowClient(resolved(storage).uri)
    experiment = client.get_experiment_by_name("e")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    return run


def history(storage: Path, run: Run, key: str) -> list[tuple[int, float]]:
    """(step, value) of every stored row."""
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
        run = uploaded_run(tracker, storage)
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


def test_every_kind_of_artifact_arrives_whole_and_leaves_the_outbox(storage: Path) -> None:
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
        run = uploaded_run(tracker, storage)
    client = MlflowClient(resolved(storage).uri)

    def content(path: str) -> str:
        return Path(client.download_artifacts(run.info.run_id, path)).read_text()

    assert content("reports/report.txt") == "before"
    assert content("plots/a.txt") == "a"
    assert content("note.txt") == "secret at http://***@host/"
    assert [info.path for info in client.list_artifacts(run.info.run_id, "curves")] == ["curves/pr.png"]
    table = pd.read_json(io.StringIO(content("tables/per_class.json")), orient="split")  # as MLflow reads it
    assert table["name"].tolist() == ["cat", "dog"]
    assert table["AP"].iloc[0] == 0.5
    assert math.isnan(table["AP"].iloc[1])
    images = [info.path for info in client.list_artifacts(run.info.run_id, "images")]
    assert [path.startswith("images/val~pred+step+7+timestamp+") for path in images] == [True, True]
    assert sorted(path.partition("Z")[0].rpartition(".")[2] for path in images) == ["png", "webp"]
    assert run.data.tags["mlflow.loggedImages"] == "True"
    assert json.loads(run.data.tags["mlflow.loggedArtifacts"]) == [{"path": "tables/per_class.json", "type": "table"}]
    assert list((storage / "outbox" / "files").iterdir()) == []


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
        run = uploaded_run(tracker, storage)
    assert history(storage, run, "loss") == [(s, s) for s in range(10)] + [(s, -s) for s in range(10, 15)]
    assert history(storage, run, "val/AP") == [(8, 0.5)]
    assert run.data.params == {"lr": "0.1"}


def test_a_run_that_continues_is_running_again(storage: Path) -> None:
    with open_tracker(storage) as tracker:
        tracker.begin({}, {})
        tracker.finish("FAILED")
        assert uploaded_run(tracker, storage).info.status == "FAILED"
    with open_tracker(storage) as tracker:
        tracker.begin({}, {})
        assert uploaded_run(tracker, storage).info.status == "RUNNING"


@pytest.mark.parametrize("lost", ["deletions", "deletions and the id"])
def test_an_upload_that_was_not_noted_is_repeated_without_a_trace(storage: Path, lost: str) -> None:
    kept = storage / "kept.db"
    with open_tracker(storage) as tracker:
        tracker.begin({"lr": 0.1}, {}, [DatasetInput("d", "1", "/d", "training")])
        for step in range(120):
            tracker.metrics({"loss": step, "odd": math.nan}, step)
        tracker.finish("FINISHED")
        shutil.copyfile(storage / "outbox" / DATABASE, kept)
        before = uploaded_run(tracker, storage)
    shutil.copyfile(kept, storage / "outbox" / DATABASE)
    with open_tracker(storage) as again:
        if lost == "deletions":
            Outbox(storage / "outbox", None).note_run_id(before.info.run_id)
        assert again.pending == 122
        again.metrics({"loss": 120}, 120)
        after = uploaded_run(again, storage)
        assert again.rejected == []
    assert after.info.run_id == before.info.run_id
    assert history(storage, after, "loss") == [(step, step) for step in range(121)]
    assert len(history(storage, after, "odd")) == 120
    assert len(after.inputs.dataset_inputs) == 1


def test_a_request_whose_response_was_lost_stores_nothing_twice(storage: Path) -> None:
    with open_tracker(storage) as tracker:
        tracker.begin({}, {})
        run = uploaded_run(tracker, storage)
    content_of = Outbox(storage / "outbox", None).content_of
    writers = [
        MlflowWriter(resolved(storage), run_key=tracker.run_key, started_at=0, content_of=content_of) for _ in range(2)
    ]
    event = {"kind": "metrics", "step": 1, "time": 5, "values": {"a": 1.0, "b": math.nan}}
    for writer in writers:
        writer.open_run(run.info.run_id)
        assert writer.read_last_steps() == {}  # read before the first of the two requests takes effect
    for writer in writers:
        writer.send([event])
    assert history(storage, run, "a") == [(1, 1.0)]
    assert len(history(storage, run, "b")) == 1


def test_a_training_killed_while_it_uploads_loses_and_doubles_nothing(storage: Path) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", TRAINING, str(storage), "0", "600"], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == "logged\n"
        outbox = Outbox(storage / "outbox", None)
        deadline = time.monotonic() + PATIENCE
        while outbox.pending().events > 500:
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
        run = uploaded_run(tracker, storage)
    for i in range(8):
        rows = history(storage, run, f"train/loss_{i}")
        assert rows == [(step, step + i / 100) for step in range(650)]


def test_a_server_that_cannot_be_reached_delays_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = resolved(tmp_path, uri="http://user:word@127.0.0.1:9")
    tracker = Tracker(tmp_path / "outbox", settings)
    started = time.monotonic()
    tracker.begin({"uri": settings.uri}, {"uri": settings.uri})
    for step in range(200):
        tracker.metrics({"loss": 1.0}, step)
    assert time.monotonic() - started < 30  # MLflow alone would try for longer
    while len(caplog.records) < 1:
        assert time.monotonic() - started < PATIENCE
        time.sleep(0.05)
    assert not tracker.flush(3.0)
    tracker.close(0.5)
    assert tracker.pending == 201
    failures = [record.getMessage() for record in caplog.records if "fails" in record.getMessage()]
    assert len(failures) == 1
    assert "http://***@127.0.0.1:9" in failures[0]
    written = (tmp_path / "outbox" / DATABASE).read_bytes()
    assert b"http://***@127.0.0.1:9" in written
    assert b"user:word" not in written
    assert not any("word" in text for text in [caplog.text, repr(settings)])


def test_a_server_that_hangs_keeps_nobody_from_going_on(storage: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as hanging:  # accepts connections and never responds
        uri = f"http://127.0.0.1:{hanging.getsockname()[1]}"
        first = Tracker(storage / "outbox", resolved(storage, uri=uri))
        first.begin({"lr": 0.1}, {})
        first.metrics({"loss": 1.0}, 1)
        connection, _ = hanging.accept()  # a request is under way
        started = time.monotonic()
        first.close(0.5)
        second = open_tracker(storage)  # the next process; its server works
        second.metrics({"loss": 2.0}, 2)
        assert time.monotonic() - started < 10
        assert not second.flush(0.5), "two processes upload at once"
        connection.close()
    run = uploaded_run(second, storage)
    second.close()
    assert history(storage, run, "loss") == [(1, 1.0), (2, 2.0)]


def test_events_that_the_server_refuses_are_set_aside_and_the_rest_arrives(
    storage: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with open_tracker(storage) as tracker:
        tracker.begin({}, {})
        tracker.metrics({"a": 1}, 1)
        tracker.metrics({"a": 2}, 2, timestamp=-5)  # MLflow refuses times before 1970
        tracker.metrics({"a": 3}, 3)
        run = uploaded_run(tracker, storage)
    assert history(storage, run, "a") == [(1, 1), (3, 3)]
    ((rejected, reason),) = tracker.rejected
    assert rejected["values"] == {"a": 2}
    assert "-5" in reason
    assert "refused an event" in caplog.text


def test_numbers_that_are_not_finite_are_stored_as_nan(storage: Path) -> None:
    with open_tracker(storage) as tracker:
        tracker.begin({}, {})
        tracker.metrics({"nan": math.nan, "inf": math.inf, "-inf": -math.inf}, 1)
        run = uploaded_run(tracker, storage)
    assert [math.isnan(value) for value in run.data.metrics.values()] == [True, True, True]


def test_names_and_values_that_mlflow_would_refuse_are_made_to_fit(storage: Path) -> None:
    with open_tracker(storage) as tracker:
        tracker.begin({"a(b)": "x" * 7000, "k" * 300: 1}, {"t": "y" * 9000})
        tracker.metrics({"val/AP/T-shirt (red)": 0.5, "val//AP/": 0.25, "../x": 1.0}, 1)
        run = uploaded_run(tracker, storage)
    assert len(run.data.params["a_b_"]) == 6000
    assert run.data.params["k" * 250] == "1"
    assert len(run.data.tags["t"]) == 8000
    assert run.data.metrics == {"val/AP/T-shirt _red_": 0.5, "val/AP": 0.25, "_/x": 1.0}
    assert tracker.rejected == []


def test_a_child_run_names_its_parent(storage: Path) -> None:
    with Tracker(storage / "outbox", resolved(storage, parent_run_id="0123456789abcdef")) as tracker:
        tracker.begin({}, {})
        assert uploaded_run(tracker, storage).data.tags["mlflow.parentRunId"] == "0123456789abcdef"


def test_another_folder_with_the_same_key_continues_the_run(storage: Path) -> None:
    with Tracker(storage / "driver", resolved(storage)) as driver:
        driver.begin({"lr": 1}, {})
        driver.metrics({"loss": 1.0}, 1)
        assert driver.flush(PATIENCE)
    with Tracker(storage / "worker", resolved(storage, run_key=driver.run_key)) as worker:
        worker.metrics({"loss": 7.0}, 1)
        worker.metrics({"loss": 2.0}, 2)
        run = uploaded_run(worker, storage)
    assert history(storage, run, "loss") == [(1, 1.0), (2, 2.0)]


def test_a_folder_of_another_run_is_refused(tmp_path: Path) -> None:
    settings = resolved(tmp_path, uri="http://127.0.0.1:9", run_key="one")
    Tracker(tmp_path / "outbox", settings).close(0)
    with pytest.raises(ValueError, match="run_key one, not two"):
        Tracker(tmp_path / "outbox", resolved(tmp_path, uri="http://127.0.0.1:9", run_key="two"))
