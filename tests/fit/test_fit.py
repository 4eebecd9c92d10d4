"""A whole fit: from a folder that a tool exported to a detector, a page and an ONNX file; and the same command again."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from dfine_core import load
from pipeline.config import ConfigError
from pipeline.config_files import load_experiment
from pipeline.fit.choices import Choice
from pipeline.fit.fit import FitRequest, plan_fit, run_fit
from pipeline.fit.plan import available_weights, experiment_yaml
from pipeline.fit.prepared import FitError
from tests.support.exported_layouts import LAYOUTS, drawn_splits
from tests.support.synthetic_shards import synthetic_records, write_shards

pytestmark = pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SADeprecationWarning")

ROOT = Path(__file__).parents[2]
# Tracing and training take time by the layer.
SMALL = {
    "model.variant": "n",
    "model.input_size": [64, 64],
    "model.num_queries": 20,
    "model.num_layers": 1,
    "model.depth": 0.34,
    "schedule.epochs": 2,
    "schedule.global_batch_size": 8,
    "evaluation.num_images": 0,
    "tracking.every_steps": 1,
    "init": None,
}


@pytest.fixture
def planned(tmp_path: Path) -> FitRequest:
    """A fit whose data are prepared and whose experiment is written."""
    request = FitRequest(folder=tmp_path / "data", out=tmp_path / "out", given=SMALL)
    train = write_shards(request.out / "shards" / "train", synthetic_records(16, longest_side=64))
    val = write_shards(request.out / "shards" / "val", synthetic_records(6, longest_side=64, seed=1))
    start = {"folder": str(request.folder), "given": SMALL, "split": None}
    (request.out / "fit.json").write_text(json.dumps(start))
    choices = [Choice("optimizer.lr", 0.0008, "because"), Choice("init", None, "none is there")]
    request.experiment_file.write_text(experiment_yaml(str(request.out), train, val, choices, SMALL))
    return request


def test_the_experiment_file_has_the_values_and_their_reasons_and_is_one_of_dfine_train(planned: FitRequest) -> None:
    text = planned.experiment_file.read_text()
    assert "#   optimizer.lr: because\n" in text
    experiment = load_experiment(planned.experiment_file)
    assert experiment.optimizer.lr == 0.0008
    assert experiment.init is None
    assert experiment.storage == str(planned.out)
    assert yaml.safe_load(text)["model"] == {"variant": "n", "input_size": [64, 64], "num_queries": 20} | {
        "num_layers": 1,
        "depth": 0.34,
    }


def test_a_fit_goes_on_with_its_experiment_and_refuses_other_values(
    planned: FitRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan_fit(planned) == load_experiment(planned.experiment_file)
    assert f"going on with {planned.experiment_file}" in capsys.readouterr().out
    with pytest.raises(FitError, match=r"other values \(given .*dfine train .*fit\.yaml --name NAME"):
        plan_fit(replace(planned, given=SMALL | {"schedule.epochs": 3}))
    with pytest.raises(FitError, match="split None"):
        plan_fit(replace(planned, split="val=0.1"))


def test_values_may_change_until_the_experiment_is_written(planned: FitRequest) -> None:
    planned.experiment_file.unlink()
    with pytest.raises(ValueError, match="no such folder"):
        plan_fit(replace(planned, split="val=0.1"))
    assert json.loads((planned.out / "fit.json").read_text())["split"] == "val=0.1"


def test_a_folder_of_somebody_else_is_left_alone(planned: FitRequest, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("")
    with pytest.raises(ConfigError, match=r"holds other files \(notes\.txt\)"):
        plan_fit(replace(planned, out=tmp_path / "mine"))


def test_without_a_connection_one_sentence_says_that_training_starts_from_scratch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert available_weights("s").name is None
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("dfine-s-obj365: offline mode is on")
    assert line.endswith("training starts from scratch")


@pytest.mark.slow  # a training and an export
def test_a_planned_fit_trains_exports_and_ends_with_the_page_and_the_next_commands(
    planned: FitRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    experiment = plan_fit(planned)
    assert run_fit(planned, experiment)
    said = capsys.readouterr().out
    assert said.rstrip().splitlines()[-3:] == [
        f"  dfine serve {planned.run}",
        f"  dfine predict {planned.run} PHOTOS --out found",
        f"  dfine train {planned.experiment_file} --name longer --set schedule.epochs=N",
    ]
    # The thresholds of the last evaluation are those of the detector and of the exported file.
    detector = load(planned.run, "cpu")
    assert detector.thresholds is not None
    report = json.loads((planned.out / "exported" / "export.json").read_text())
    assert report["thresholds"] == detector.thresholds.to_plain()
    assert report["formats"]["onnx"]["accepted"]
    page = (planned.out / "report.html").read_text()
    assert "losses and rates are missing" not in page  # its curves come from the run's tracking database

    # The same command again trains and exports nothing, and ends the same way.
    written = (planned.out / "exported" / "detector.onnx").stat().st_mtime_ns
    assert run_fit(planned, experiment)
    again = capsys.readouterr().out
    assert "the training is finished" in again
    assert "exported before" in again
    assert (planned.out / "exported" / "detector.onnx").stat().st_mtime_ns == written
    assert again.rstrip().splitlines()[-5:] == said.rstrip().splitlines()[-5:]


@pytest.mark.slow  # Ray, a training and an export
@pytest.mark.parametrize("layout", ["Roboflow COCO", "Label Studio YOLO"])
def test_a_strangers_folder_becomes_a_detector_by_one_command(layout: str, tmp_path: Path) -> None:
    counts = {"train": 20} if layout.startswith("Label") else {"train": 16, "val": 6}
    LAYOUTS[layout](tmp_path / "mine", drawn_splits(**counts))
    values = [f"{key}={json.dumps(value)}" for key, value in SMALL.items() if key != "init"]
    command = [sys.executable, "-m", "jobs", "fit", "mine", "--init", "none", "--set", *values]
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stderr.startswith(f"python -m jobs fit {tmp_path}/mine: ") or "looking at the data" in done.stderr
    assert "model.input_size" in done.stdout
    assert "0 errors" in done.stdout
    out = tmp_path / "runs" / "mine"
    assert load(out / "training", "cpu").thresholds is not None
    for name in ("report.html", "doctor.html", "fit.yaml", "exported/detector.onnx"):
        assert (out / name).is_file(), name
