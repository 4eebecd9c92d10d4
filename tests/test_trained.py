"""After the training: detectors opened from where they lie, the evaluate and replay commands, a dry run."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from jobs import evaluate as evaluate_job
from jobs import replay as replay_job
from jobs import train as train_job
from pipeline.config import Cluster, ConfigError, dump
from pipeline.data.manifest import load_shards
from pipeline.tracking.settings import TrackingSettings
from pipeline.trained import open_trained
from pipeline.training import checkpoint
from pipeline.training.loop import Run, train
from pipeline.training.preview import estimated_bytes, preview
from tests.drawn_shards import drawn_records, write_shards
from tests.training_runs import ALONE, Heard, experiment, job, shard_folders

pytestmark = pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SADeprecationWarning")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trained")


@pytest.fixture(scope="module")
def data(folder: Path) -> dict[str, str]:
    return shard_folders(folder)


@pytest.fixture(scope="module")
def tracking(folder: Path, data: dict[str, str]) -> TrackingSettings:
    """Of a small run that was trained, evaluated and recorded."""
    settings = TrackingSettings.resolve(folder / "runs", experiment="tests", run_name="run")
    setting = experiment(
        folder,
        data,
        schedule={"steps": 4},
        evaluation={"every_steps": 2, "pictures": 1},
        tracking={"register_as": "shapes", "alias": "champion"},
    )
    train(job(setting, tracking=settings, tracking_folder=folder / "queue"), ALONE, Heard())
    return settings


def test_run_folder_checkpoint_mlflow_run_and_model_version_give_the_same_detector(
    tracking: TrackingSettings, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = str(folder / "runs" / "run")
    steps = checkpoint.steps_in(f"{run}/checkpoints")
    best = checkpoint.read_metadata(f"{run}/checkpoints/{checkpoint.folder_name(steps[-1])}").standing.best_step
    assert best is not None
    from_run = open_trained(run)
    assert from_run.origin.endswith(checkpoint.folder_name(best))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking.uri)
    (run_id,) = {m.source_run_id for m in _logged_models(tracking)}
    for source in (from_run.origin, f"runs:/{run_id}", "models:/shapes@champion", "models:/shapes/1"):
        other = open_trained(source)
        assert other.names == from_run.names
        assert other.detector.config == from_run.detector.config
        state = other.detector.state_dict()
        assert all(torch.equal(state[key], tensor) for key, tensor in from_run.detector.state_dict().items()), source


def _logged_models(tracking: TrackingSettings) -> list[object]:
    from mlflow import MlflowClient

    client = MlflowClient(tracking.uri)
    found = client.get_experiment_by_name("tests")
    assert found is not None
    return list(client.search_logged_models([found.experiment_id]))


def test_what_is_no_detector_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(ConfigError, match="no detector"):
        open_trained(str(tmp_path))
    with pytest.raises(ConfigError, match="set MLFLOW_TRACKING_URI"):
        open_trained("models:/none@champion")


def test_evaluating_other_classes_is_refused(tracking: TrackingSettings, folder: Path, tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "other", drawn_records(2))
    manifest = json.loads((tmp_path / "other" / "manifest.json").read_text())
    manifest["categories"][0]["name"] = "disc"
    (tmp_path / "other" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(SystemExit, match="only the data's: disc"):
        evaluate_job.main([str(folder / "runs" / "run"), shards.uri])


def test_a_kept_step_is_replayed_and_the_broken_image_and_module_named(
    data: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    setting = experiment(tmp_path, data)
    run = Run(job(setting), ALONE, Heard(), None)
    run._begin()
    with torch.no_grad():
        run.learner.detector.encoder.pan_blocks[0].cv1.conv.weight.fill_(torch.inf)
    batches = run._stream()
    run._one_step(batches)
    run._look_at_last()
    assert run.skipped == 1
    kept = f"{tmp_path}/runs/run/not_finite/{checkpoint.folder_name(0)}"
    replay_job.main([kept])
    said = capsys.readouterr().out
    assert "4 of 4 images are not finite" in said
    assert "first: output of encoder.pan_blocks.0" in said

    healthy = {
        key: torch.nan_to_num(tensor, posinf=0.01) for key, tensor in load_file(f"{kept}/model.safetensors").items()
    }
    save_file(healthy, f"{kept}/model.safetensors")
    replay_job.main([kept])
    assert "0 of 4 images are not finite" in capsys.readouterr().out


def test_replaying_another_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="not a step that a training kept"):
        replay_job.main([str(tmp_path)])


def test_a_dry_run_tells_the_whole_plan(
    data: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    setting = experiment(tmp_path, data, schedule={"steps": None, "epochs": 10, "clean_epochs": 2})
    text = preview(setting, Cluster(workers=2))
    for part in (
        "reg_max: 32",
        "24 images",
        "60 steps of 4 images",
        "from epoch 8, step 48",
        "2 worker(s), each with 1 micro-batch(es) of 2 images",
        "backbone ",
        "GiB weights",
    ):
        assert part in text, part
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(dump(setting)))
    train_job.main([str(tmp_path / "run.yaml"), "--dry-run"])
    assert "60 steps of 4 images" in capsys.readouterr().out


def test_the_estimated_memory_is_what_the_forward_pass_keeps(data: dict[str, str], tmp_path: Path) -> None:
    config = experiment(tmp_path, data).model.config(8, experiment(tmp_path, data).loss)
    state, small = estimated_bytes(config, micro_batch=2, boxes=3)
    assert state == pytest.approx(5 * 4 * 3.75e6, rel=0.05)  # weights, gradients, two moments, averaged weights
    _, twice = estimated_bytes(config, micro_batch=4, boxes=3)
    assert twice == pytest.approx(2 * small, rel=0.2)
    shards = load_shards(data["train"])
    assert shards.manifest.statistics.most_crowded.boxes > 0
