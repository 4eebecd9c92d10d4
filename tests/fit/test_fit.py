"""A whole fit: from a folder that a tool exported to a detector, a page and an ONNX file; and the same command again."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from dfine_core import load
from pipeline.config import ConfigError
from pipeline.config_files import load_experiment
from pipeline.data.shards.manifest import load_shards
from pipeline.data.sources.synthetic import CLASSES
from pipeline.fit.choices import Choice
from pipeline.fit.fit import FitRequest, plan_fit, round_of, run_fit
from pipeline.fit.plan import available_weights, experiment_yaml
from pipeline.fit.prepared import FitError, find_splits
from pipeline.fit.source_record import digest, read_record, read_source
from pipeline.storage import StorageError
from tests.support.exported_layouts import LAYOUTS, WITHOUT_SPLITS, drawn_splits
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
    LAYOUTS["YOLO"](request.folder, drawn_splits(train=6, val=3))
    train = write_shards(request.out / "shards" / "train", synthetic_records(16, longest_side=64))
    val = write_shards(request.out / "shards" / "val", synthetic_records(6, longest_side=64, seed=1))
    start = {"folder": str(request.folder), "given": SMALL, "split": None}
    (request.out / "fit.json").write_text(json.dumps(start))
    choices = [Choice("optimizer.lr", 0.0008, "because"), Choice("init", None, "none is there")]
    request.experiment_file.write_text(experiment_yaml(str(request.out), train, val, choices, SMALL))
    record = read_source(find_splits(request.folder, None).sources)
    record = record.model_copy(update={"experiment_digest": digest(request.experiment_file.read_bytes())})
    request.source_file.write_text(record.model_dump_json())
    return request


def changed_round(request: FitRequest) -> FitRequest:
    """The round that the same command goes on with."""
    return round_of(request, find_splits(request.folder, request.split))[0]


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
    assert plan_fit(planned) == (planned, load_experiment(planned.experiment_file))
    assert f"going on with {planned.experiment_file}" in capsys.readouterr().out
    with pytest.raises(FitError, match=r"other values \(given .*dfine train .*fit\.yaml --name NAME"):
        plan_fit(replace(planned, given=SMALL | {"schedule.epochs": 3}))
    with pytest.raises(FitError, match="split None"):
        plan_fit(replace(planned, split="val=0.1"))


def test_values_may_change_until_the_experiment_is_written(planned: FitRequest) -> None:
    planned.experiment_file.unlink()
    shutil.rmtree(planned.folder)
    with pytest.raises(ValueError, match="no such folder"):
        plan_fit(replace(planned, split="val=0.1"))
    assert json.loads((planned.out / "fit.json").read_text())["split"] == "val=0.1"


def test_files_with_another_time_and_the_same_content_are_no_change(planned: FitRequest) -> None:
    for file in planned.folder.rglob("*.*"):
        os.utime(file, (1e9, 1e9))
    (planned.folder / "notes.txt").write_text("for me")
    assert changed_round(planned) == planned
    known = read_record(planned.source_file)
    assert known is not None
    assert {facts.changed_at_ns for facts in known.splits["train"].images.values() if facts} == {10**18}
    assert known.experiment_digest == digest(planned.experiment_file.read_bytes())


def test_changed_data_are_prepared_again_in_place_before_the_training(
    planned: FitRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(planned.folder / "images/val/1.jpg", planned.folder / "images/train/99.jpg")
    (planned.folder / "images/val/2.jpg").unlink()
    assert changed_round(planned) == planned
    lines = capsys.readouterr().out.splitlines()
    assert "  train: 1 image added (99.jpg), other annotations" in lines
    assert "  val: 1 image removed (2.jpg), other annotations" in lines
    assert not planned.experiment_file.exists()
    assert not (planned.out / "shards").exists()
    # The new record holds: the next call has nothing to start over.
    assert changed_round(planned) == planned
    assert "has changed" not in capsys.readouterr().out


def test_a_training_of_the_data_as_they_were_stays_and_a_new_round_begins_beside_it(
    planned: FitRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    Path(planned.run).mkdir()
    experiment = planned.experiment_file.read_bytes()
    labels = planned.folder / "labels/train/1.txt"
    labels.write_text(labels.read_text() + "\n0 0.5 0.5 0.2 0.2")
    second = changed_round(planned)
    assert second.run == str(planned.out / "round-2" / "training")
    said = capsys.readouterr().out
    assert "  train: other annotations\n" in said
    assert f"a new training begins in {planned.out}/round-2; {planned.out} stays as it is" in said
    assert planned.experiment_file.read_bytes() == experiment
    assert (planned.out / "shards" / "train" / "manifest.json").exists()

    # Nothing was trained there yet: the next change replaces the second round, and one after its training begins a third.
    image = planned.folder / "images/val/1.jpg"
    image.write_bytes(image.read_bytes() + b"more")
    assert changed_round(planned) == second
    assert "  val: 1 image changed (1.jpg)\n" in capsys.readouterr().out
    Path(second.run).mkdir()
    labels.unlink()
    assert changed_round(planned).round == 3


def test_an_experiment_that_the_user_has_changed_is_not_replaced(planned: FitRequest) -> None:
    planned.experiment_file.write_text(planned.experiment_file.read_text() + "\n# mine")
    (planned.folder / "images/train/1.jpg").unlink()
    assert changed_round(planned).round == 2
    assert planned.experiment_file.read_text().endswith("# mine")


def test_a_missing_record_is_reported_and_a_damaged_one_refused(
    planned: FitRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    planned.source_file.write_text('{"splits": 1}')
    with pytest.raises(StorageError, match=r"source\.json: damaged: splits: .*delete it"):
        changed_round(planned)
    planned.source_file.unlink()
    assert changed_round(planned) == planned
    assert "source.json is missing: data that have changed since then are not noticed" in capsys.readouterr().out
    assert read_record(planned.source_file) is not None


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
    _, experiment = plan_fit(planned)
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


@pytest.mark.slow  # Ray
@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_every_layout_reaches_the_plan_without_a_word_about_its_format(layout: str, tmp_path: Path) -> None:
    splits = drawn_splits(train=20) if layout in WITHOUT_SPLITS else drawn_splits(train=16, val=6, test=2)
    LAYOUTS[layout](tmp_path / "mine", splits)
    request, experiment = plan_fit(FitRequest(folder=tmp_path / "mine", out=tmp_path / "out", given=SMALL))
    assert experiment == load_experiment(request.experiment_file)
    assert experiment.data.val is not None
    parts = [load_shards(uri).manifest for uri in (experiment.data.train, experiment.data.val)]
    assert sum(part.images for part in parts) == sum(len(splits[name]) for name in splits if name != "test")
    assert {category.name for part in parts for category in part.categories} <= set(CLASSES)
    assert all(part.boxes > 0 for part in parts)
    assert (tmp_path / "out" / "doctor.html").exists()


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

    # More images: the same command plans a round of its own, and the first one stays.
    LAYOUTS[layout](tmp_path / "mine", drawn_splits(**{split: count + 4 for split, count in counts.items()}))
    done = subprocess.run(
        [*command, "--dry-run"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "train: 4 images added" in done.stdout
    images = [load_shards(str(out / part / "shards" / "train")).manifest.images for part in (".", "round-2")]
    assert images[1] > images[0]
    assert (out / "round-2" / "fit.yaml").is_file()
