"""A real tracking server that starts late, dies during an upload, and comes back."""

import io
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
from mlflow import MlflowClient
from PIL import Image
from safetensors.torch import save_file

from dfine_core import Detector, ModelConfig
from pipeline.tracking.model import log_detector
from pipeline.tracking.settings import TrackingSettings
from pipeline.tracking.tracker import Tracker
from tests.support.mlflow_server import Server

# MLflow's database layer uses options that SQLAlchemy 2.1 has deprecated; this project does not call SQLAlchemy.
pytestmark = pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SADeprecationWarning")
PATIENCE = 90.0  # seconds


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path)
    yield server
    server.kill()


def log_tiny_detector(tracker: Tracker, folder: Path) -> None:
    config = ModelConfig.variant("n", num_classes=2, input_size=(64, 64), num_queries=20)
    weights = {key: tensor.clone() for key, tensor in Detector(config).state_dict().items()}
    save_file(weights, folder / "weights.safetensors")
    example = io.BytesIO()
    Image.new("RGB", (8, 8)).save(example, "PNG")
    log_detector(
        tracker,
        config=config,
        weights=folder / "weights.safetensors",
        categories=("cat", "dog"),
        metrics={"val/AP": 0.5},
        example=example.getvalue(),
        step=7,
        registered_model_name="dfine",
        alias="champion",
    )


@pytest.mark.slow  # two starts of a server
def test_a_server_that_dies_and_comes_back_has_everything_once_and_in_order(
    server: Server,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = TrackingSettings.resolve(tmp_path, experiment="e", run_name="r", uri=server.uri)
    tracker = Tracker(tmp_path / "outbox", settings)
    slowest = 0.0
    steps = 0

    def train(seconds: float) -> None:
        nonlocal slowest, steps
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            before = time.monotonic()
            tracker.metrics({"train/loss": steps, "train/loss_vfl": -steps}, steps)
            slowest = max(slowest, time.monotonic() - before)
            steps += 1
            time.sleep(0.002)

    tracker.begin({"lr": 0.1}, {"variant": "n"})
    train(3)  # no server yet
    assert tracker.run_id is None
    server.start()
    train(1)
    assert tracker.wait_for_run_id(PATIENCE) is not None
    tracker.artifact(b"before", "before.txt")
    train(2)
    while tracker.pending == 0:
        train(0.01)
    server.kill()
    tracker.artifact(b"while it was dead", "dead.txt")
    log_tiny_detector(tracker, tmp_path)
    train(3)
    assert tracker.pending > 0
    server.start()
    while steps <= 1000:  # each waits for the disk, which others may use
        train(1)
    tracker.finish("FINISHED")
    assert tracker.flush(PATIENCE)
    tracker.close()
    assert capfd.readouterr().out == "", "MLflow prints addresses, which may hold passwords"

    client = MlflowClient(server.uri)
    experiment = client.get_experiment_by_name("e")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params == {"lr": "0.1"}
    for key, sign in (("train/loss", 1), ("train/loss_vfl", -1)):
        rows = client.get_metric_history(run.info.run_id, key)
        assert [(row.step, row.value) for row in rows] == [(step, sign * step) for step in range(steps)]
        times = [row.timestamp for row in rows]
        assert times == sorted(times)
    assert [info.path for info in client.list_artifacts(run.info.run_id)] == ["before.txt", "dead.txt"]
    version = client.get_model_version_by_alias("dfine", "champion")
    assert (str(version.version), version.run_id) == ("1", run.info.run_id)
    with warnings.catch_warnings():  # on import, MLflow warns about type hints of its own
        warnings.simplefilter("ignore")
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
        model = mlflow.pyfunc.load_model("models:/dfine@champion")
    (logged,) = client.search_logged_models([run.info.experiment_id])
    assert (logged.name, logged.model_id) == ("detector", model.metadata.model_id)
    assert model.metadata.run_id == run.info.run_id
    (output,) = model.predict(pd.DataFrame({"image": [np.zeros((9, 9, 3), np.uint8)]}), params={"threshold": 0.0})
    assert len(output["boxes"]) == 40
    assert steps > 1000
    assert slowest < 1, "the training waited for the server"
    messages = [record.getMessage() for record in caplog.records if record.name.startswith("pipeline.tracking")]
    assert [("fails" in message, "works again" in message) for message in messages] == [
        *((True, False), (False, True)),  # at the start
        *((True, False), (False, True)),  # in the middle
    ]
