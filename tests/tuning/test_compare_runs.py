"""Differences between runs, from their folders and from MLflow."""

import base64
import io
import json
import math
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from PIL import Image

from jobs import compare as compare_job
from pipeline.config import ConfigError, Experiment
from pipeline.tracking.client import RunLookupError
from pipeline.tracking.run_facts import RunFacts, Runs
from pipeline.tracking.settings import TrackingSettings
from pipeline.tracking.tracker import Tracker
from pipeline.training import run_dir
from pipeline.training.context import resolve_data
from pipeline.training.run_log import RunLog
from pipeline.tuning.analysis.compare_runs import (
    compare,
    comparison_page,
    comparison_text,
    open_run,
    open_runs,
    read_folder,
)
from pipeline.tuning.analysis.paired_images import paired_images
from tests.support.training_runs import alone, experiment, job, shard_folders

pytestmark = pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SADeprecationWarning")

APS = {"first": 0.400, "second": 0.300, "third": 0.405}


def settings_of(storage: Path, name: str, parent: str | None = None) -> TrackingSettings:
    return TrackingSettings.resolve(storage, experiment="tests", run_name=name, parent_run_id=parent)


def record_run(setting: Experiment, ap: float, parent: str | None = None) -> str:
    """Write everything that a training leaves except checkpoints, and return the id of its MLflow run."""
    storage, name = Path(setting.storage), str(setting.name)
    run = str(storage / name)
    run_dir.begin_or_continue(run, setting, resolve_data(setting.data), tracking_key=f"key-{name}", allow_changes=False)
    numbers = {"AP": ap, "AP50": ap + 0.1, "AP_small": math.nan}
    result = {"step": 6, "best_step": 6, "numbers": numbers, "evaluated": {}}
    (storage / name / "result.json").write_text(json.dumps(result))
    tracking = TrackingSettings.resolve(
        storage, experiment="tests", run_name=name, parent_run_id=parent, run_key=f"key-{name}"
    )
    with Tracker(storage / name / "tracking", tracking) as tracker:
        RunLog(job(setting), alone(), tracker).begin({})
        tracker.metrics({"val/final/AP": ap, "val/final/AP50": ap + 0.1, "val/final/layers/iou_0": 0.5}, 6)
        tracker.finish("FINISHED")
        assert tracker.flush(60)
        assert tracker.run_id is not None
        return tracker.run_id


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Storage of several runs with one database."""
    folder = tmp_path_factory.mktemp("compared")
    server = os.environ.pop("MLFLOW_TRACKING_URI", None)
    data = shard_folders(folder)
    more = {**data, "train": shard_folders(folder / "more", images=30)["train"]}
    record_run(experiment(folder, data, name="first"), APS["first"])
    record_run(experiment(folder, more, name="second", loss={"ddf": 5.0}, checkpoints={"keep": 5}), APS["second"])
    record_run(experiment(folder, data, name="third", seed=1), APS["third"])
    sweep = MlflowClient(settings_of(folder / "runs", "sweep").uri)
    tests = sweep.get_experiment_by_name("tests")
    assert tests is not None
    parent = sweep.create_run(tests.experiment_id, run_name="sweep").info.run_id
    for seed, ap in enumerate((0.40, 0.41, 0.42)):
        record_run(experiment(folder, data, name=f"replicate-{seed}", seed=1000 + seed), ap, parent)
    record_run(experiment(folder, data, name="trial", loss={"ddf": 0.0}), 0.30, parent)
    if server is not None:
        os.environ["MLFLOW_TRACKING_URI"] = server
    return folder / "runs"


@pytest.fixture(autouse=True)
def _no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def opened(folder: Path, *names: str, noise: tuple[str, ...] = ()) -> Any:
    return compare(*open_runs(names, noise, tracking=None, storage_uri=str(folder)))


@pytest.mark.parametrize("by", ["folder", "name"])
def test_differences_are_the_same_from_folders_and_from_mlflow(folder: Path, by: str) -> None:
    names = [str(folder / name) if by == "folder" else name for name in ("first", "second")]
    comparison = opened(folder, *names)
    config = {difference.key: difference.values for difference in comparison.effective if difference.part == "config"}
    assert config["loss.ddf"] == ("1.5", "5.0")
    assert config.keys() == {"loss.ddf"}
    neutral = {difference.key for difference in comparison.differences if difference.neutral}
    assert neutral == {"name", "checkpoints.keep", "data.train"}
    (data,) = [
        difference for difference in comparison.differences if difference.part == "data" and difference.key == "train"
    ]
    assert len(set(data.values)) == 2
    ap = next(result for result in comparison.results if result.name == "AP")
    assert ap.values == (0.400, 0.300)
    assert ap.changes == (pytest.approx(-0.1),)
    assert [result.name for result in comparison.results] == ["AP", "AP50"]  # unknown metrics are left out


def test_a_folder_and_its_own_mlflow_run_do_not_differ(folder: Path) -> None:
    comparison = opened(folder, str(folder / "first"), "first")
    assert [difference for difference in comparison.differences if difference.part in ("config", "data")] == []
    assert comparison.results[0].changes == (0.0,)


def test_without_replicates_the_noise_is_unknown(folder: Path) -> None:
    comparison = opened(folder, "first", "third")
    assert {result.word(change) for result in comparison.results for change in result.changes} == {"noise unknown"}
    assert "seed: 0  |  1" in comparison_text(comparison)
    assert "noise unknown" in comparison_text(comparison)


def test_replicates_that_are_named_give_the_band(folder: Path) -> None:
    """Standard deviation 0.01 of three runs: t(2) = 4.303, and two single runs differ by up to 4.303 x 0.01 x sqrt 2."""
    replicates = tuple(f"replicate-{seed}" for seed in range(3))
    comparison = opened(folder, "first", "second", "third", noise=replicates)
    ap = comparison.results[0]
    assert ap.noise.band() == pytest.approx(0.06085, abs=1e-5)
    assert [ap.word(change) for change in ap.changes] == ["beyond noise", "within noise"]
    assert "0.3000 (-0.1000 ±0.0608, beyond noise)  |  0.4050 (+0.0050 ±0.0608, within noise)" in comparison_text(
        comparison
    )


def test_runs_of_a_sweep_bring_its_noise_with_them(folder: Path) -> None:
    comparison = opened(folder, "replicate-0", "trial")
    assert comparison.noise_from == "the runs of their sweep"
    assert (comparison.results[0].noise.df, comparison.results[0].noise.runs) == (
        2,
        3,
    )  # the other trial is no replicate


def test_runs_that_differ_in_more_than_their_seed_are_no_replicates(folder: Path) -> None:
    assert opened(folder, "first", "third", noise=("first", "second", "trial")).results[0].noise.df == 0


def test_a_missing_or_damaged_run_is_refused(folder: Path, tmp_path: Path) -> None:
    for name, message in (("none", "0 runs"), ("0" * 32, "not found"), ("o'clock", "give the id")):
        with pytest.raises(RunLookupError, match=message):
            opened(folder, "first", name)
    with pytest.raises(RunLookupError, match="there is no database"):
        opened(tmp_path, "first", "second")
    with pytest.raises(RunLookupError, match="name a server"):
        Runs("./mlruns", "runs")
    with pytest.raises(ConfigError, match="two runs or more"):
        opened(folder, "first")
    shutil.copytree(folder / "first", tmp_path / "broken", ignore=shutil.ignore_patterns("tracking"))
    (tmp_path / "broken" / "run.json").write_text("{")
    with pytest.raises(ConfigError, match="damaged"):
        read_folder(str(tmp_path / "broken"))


def test_an_unfinished_run_is_compared_by_its_newest_evaluation(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "first", tmp_path / "begun", ignore=shutil.ignore_patterns("tracking", "result.json"))
    text = comparison_text(opened(folder, str(folder / "second"), str(tmp_path / "begun")))
    assert "begun, not finished\n" in text
    assert "AP        0.3000  |  -" in text
    for step, ap in ((2, 0.1), (4, 0.25)):
        report = tmp_path / f"begun/evaluation/step-{step:08d}/report.json"
        report.parent.mkdir(parents=True)
        report.write_text(json.dumps({"numbers": {"AP": ap, "AP_small": None}}))
    text = comparison_text(opened(folder, str(folder / "second"), str(tmp_path / "begun")))
    assert "begun, not finished, evaluated at step 4\n" in text
    assert "AP        0.3000  |  0.2500 (-0.0500" in text


def test_an_unfinished_run_of_mlflow_is_compared_by_its_newest_evaluation(tmp_path: Path) -> None:
    setting = experiment(tmp_path, shard_folders(tmp_path), name="begun")
    with Tracker(tmp_path / "tracking", settings_of(tmp_path / "runs", "begun")) as tracker:
        RunLog(job(setting), alone(), tracker).begin({})
        for step, ap in ((2, 0.1), (4, 0.25)):
            tracker.metrics({"accuracy/AP": ap, "val/AR_100": 2 * ap}, step)
        assert tracker.flush(60)
    found = open_run("begun", None, str(tmp_path / "runs"))
    assert (found.results["AP"], found.results["AR_100"]) == (0.25, 0.5)
    assert found.params["loss.ddf"] == "1.5"


def test_the_page_pairs_the_images_that_both_runs_have(tmp_path: Path) -> None:
    runs = []
    for name, images in (("one", (3, 5, 7)), ("two", (5, 7, 9))):
        for folder in ("step-00000002", "final"):
            for image in images:
                path = tmp_path / name / "evaluation" / folder / f"images_{image}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (1600, 400), "red" if name == "one" else "blue").save(path)
        runs.append(RunFacts(name, {}, {"val": "abc"}, None, {}, {}, folder=str(tmp_path / name)))
    pairs = paired_images(runs)
    assert [pair.name for pair in pairs] == ["5", "7"]
    first, second = (Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) for uri in pairs[0].data)
    assert first.size == (1000, 250)
    assert (first.getpixel((9, 9)), second.getpixel((9, 9))) == ((254, 0, 0), (0, 0, 254))
    assert comparison_page(compare(runs)).count("<img ") == 4
    assert (
        paired_images([runs[0], replace(runs[1], data={"val": "other"})]) == []
    )  # other images under the same numbers
    assert paired_images([runs[0], replace(runs[1], folder="/nowhere")]) == []


def test_names_of_runs_are_escaped_in_the_page() -> None:
    runs = [RunFacts(f"<script>{n}", {"loss.ddf": f"{n}<b>"}, {}, None, {}, {"AP": 0.1}) for n in range(2)]
    page = comparison_page(compare(runs))
    assert "<script>0" not in page
    assert "0&lt;b&gt;" in page


def test_the_command_prints_writes_and_logs(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.html"
    runs = [str(folder / "first"), str(folder / "second")]
    compare_job.main([*runs, "--storage", str(folder), "--html", str(page), "--log"])
    output = capsys.readouterr().out
    assert "loss.ddf: 1.5  |  5.0" in output
    assert "logged as compare/second.html" in output
    for part in ("loss.ddf", "Runs compared", "-0.1000", "unknown"):
        assert part in page.read_text(), part
    run_id = Runs(None, str(folder)).find("first").run_id
    assert run_id is not None
    client = MlflowClient(settings_of(folder, "any").uri)
    assert [artifact.path for artifact in client.list_artifacts(run_id, "compare")] == ["compare/second.html"]
    with pytest.raises(SystemExit, match="0 runs"):
        compare_job.main(["first", "none", "--storage", str(folder)])
