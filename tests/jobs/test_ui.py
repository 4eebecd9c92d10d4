"""The pages of MLflow for one run."""

import json
import os
import re
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from pipeline.tracking.settings import TrackingSettings
from pipeline.tracking.tracker import Tracker
from pipeline.tracking.ui import run_address
from tests.support.processes import wait_until

pytestmark = pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SADeprecationWarning")

ROOT = Path(__file__).parents[2]


def test_the_address_asks_for_the_view_of_trainings() -> None:
    address = run_address("http://host:5000/", "3", "abc")
    assert address == "http://host:5000/#/experiments/3/runs/abc/model-metrics?workflowType=machine_learning"


def test_the_database_a_run_was_tracked_in_is_served_until_ctrl_c(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "elsewhere").mkdir()  # as `tracking.uri` of an experiment may name it
    database = f"sqlite:///{tmp_path}/elsewhere/all.db"
    settings = TrackingSettings.resolve(tmp_path, experiment="tests", run_name="run", run_key="key", uri=database)
    with Tracker(tmp_path / "run/tracking", settings) as tracker:
        tracker.begin({}, {})
        assert tracker.flush(60)
        run_id = tracker.run_id
    (tmp_path / "run/run.json").write_text(json.dumps({"experiment": {}, "data": {}, "tracking_key": "key"}))

    log = tmp_path / "log"
    command = [sys.executable, "-m", "jobs.ui", str(tmp_path / "run"), "--no-browser"]
    with log.open("w") as stream:
        process = subprocess.Popen(command, cwd=ROOT, env=dict(os.environ), stdout=stream, stderr=subprocess.STDOUT)
    wait_until(lambda: "Ctrl-C" in log.read_text() or process.poll() is not None, 90)
    address = re.search(r"(http://127\.0\.0\.1:\d+)/#/experiments/1/runs/(\w+)/", log.read_text())
    assert address, log.read_text()
    assert address[2] == run_id
    request = urllib.request.Request(
        f"{address[1]}/api/2.0/mlflow/runs/get?run_id={run_id}", headers={"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        assert json.load(answer)["run"]["info"]["run_name"] == "run"
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) == 0
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(address[1], timeout=5)
