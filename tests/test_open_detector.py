"""Use of a trained run: opening its detector, the evaluate, replay and lineage commands, a dry run."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from dfine_core import Detector, ModelConfig
from jobs import evaluate as evaluate_job
from jobs import lineage as lineage_job
from jobs import replay as replay_job
from jobs import train as train_job
from pipeline.config import Cluster, ConfigError
from pipeline.config_files import dump
from pipeline.data.shards.manifest import load_shards
from pipeline.data.shards.training_set import TrainingSet
from pipeline.data.sources.synthetic import CLASSES
from pipeline.open_detector import open_detector
from pipeline.tracking.client import connect, find_run
from pipeline.tracking.settings import TrackingSettings
from pipeline.training import checkpoint
from pipeline.training.budget import estimated_bytes, flops_per_image, kernels_per_micro_batch, launch_cost
from pipeline.training.context import ResolvedData
from pipeline.training.dry_run import preview
from pipeline.training.init_weights import load_initial, materialize_init
from pipeline.training.loop import train
from pipeline.training.run_dir import begin_or_continue
from pipeline.training.schedule import derive
from pipeline.training.start_checks import checkpoint_bytes
from pipeline.wording import plural
from tests.support.synthetic_shards import synthetic_records, write_shards
from tests.support.training_runs import SteppedRun, alone, experiment, job, shard_folders

pytestmark = pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SADeprecationWarning")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trained")


@pytest.fixture(scope="module")
def data(folder: Path) -> dict[str, str]:
    return shard_folders(folder)


@pytest.fixture(scope="module")
def tracking(folder: Path, data: dict[str, str]) -> TrackingSettings:
    """Tracking settings of a small run that was trained, evaluated and logged."""
    settings = TrackingSettings.resolve(folder / "runs", experiment="tests", run_name="run")
    setting = experiment(
        folder,
        data,
        schedule={"steps": 4},
        evaluation={"every_steps": 2, "num_images": 1},
        tracking={"registered_model_name": "shapes", "alias": "champion"},
    )
    train(job(setting, tracking=settings, outbox_folder=folder / "queue"), alone())
    return settings


def test_run_folder_checkpoint_mlflow_run_and_model_version_give_the_same_detector(
    tracking: TrackingSettings, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = str(folder / "runs" / "run")
    steps = checkpoint.steps_in(f"{run}/checkpoints")
    best = checkpoint.read_metadata(f"{run}/checkpoints/{checkpoint.step_folder(steps[-1])}").history.best_step
    assert best is not None
    from_run = open_detector(run)
    assert from_run.origin.endswith(checkpoint.step_folder(best))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking.uri)
    (run_id,) = {m.source_run_id for m in _logged_models(tracking)}
    for source in (from_run.origin, f"runs:/{run_id}", "models:/shapes@champion", "models:/shapes/1"):
        other = open_detector(source)
        assert other.names == from_run.names
        assert other.detector.config == from_run.detector.config
        state = other.detector.state_dict()
        assert all(torch.equal(state[key], tensor) for key, tensor in from_run.detector.state_dict().items()), source


def _logged_models(tracking: TrackingSettings) -> list[object]:
    from mlflow import MlflowClient

    client = MlflowClient(tracking.uri)
    own = client.get_experiment_by_name("tests")
    assert own is not None
    return list(client.search_logged_models([own.experiment_id]))


def test_a_folder_without_a_detector_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(ConfigError, match="no detector"):
        open_detector(str(tmp_path))
    with pytest.raises(ConfigError, match="set MLFLOW_TRACKING_URI"):
        open_detector("models:/none@champion")


@pytest.mark.usefixtures("tracking")
def test_evaluating_other_classes_is_refused(folder: Path, tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "other", synthetic_records(2))
    manifest = json.loads((tmp_path / "other" / "manifest.json").read_text())
    counts = manifest["statistics"]["class_counts"]
    manifest["categories"][counts.index(max(counts))]["name"] = "disc"  # a class with boxes
    (tmp_path / "other" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(SystemExit, match=r"here alone: disc \([1-9]\d* boxes\)"):
        evaluate_job.main([str(folder / "runs" / "run"), shards.uri])


def test_a_saved_step_is_replayed_and_the_broken_image_and_module_named(
    data: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    setting = experiment(tmp_path, data)
    run = SteppedRun.begin(job(setting))
    with torch.no_grad():
        run.state.detector.encoder.pan_blocks[0].cv1.conv.weight.fill_(torch.inf)
    run.step(run.stream())
    run.guard.check_previous(run.state)
    assert run.state.skipped_steps == 1
    step_folder = f"{tmp_path}/runs/run/non_finite/{checkpoint.step_folder(0)}"
    replay_job.main([step_folder])
    printed = capsys.readouterr().out
    assert "4 of 4 images are not finite" in printed
    assert "first: output of encoder.pan_blocks.0" in printed

    healthy = {
        key: torch.nan_to_num(tensor, posinf=0.01)
        for key, tensor in load_file(f"{step_folder}/model.safetensors").items()
    }
    save_file(healthy, f"{step_folder}/model.safetensors")
    replay_job.main([step_folder])
    assert "0 of 4 images are not finite" in capsys.readouterr().out


def test_replaying_another_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="not a kept step"):
        replay_job.main([str(tmp_path)])


def test_a_dry_run_prints_the_whole_plan(
    data: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    setting = experiment(tmp_path, data, schedule={"steps": None, "epochs": 10, "no_aug_epochs": 2})
    text = preview(setting, Cluster(workers=2))
    for part in (
        "reg_max: 32",
        "24 images",
        "60 steps of 4 images",
        "from epoch 8, step 48",
        "2 workers, 2 micro-batches of 2 images a step",
        "estimated for a step on GPUs: 2 images each in 1 micro-batch",
        "backbone ",
        "GiB weights",
    ):
        assert part in text, part
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(dump(setting)))
    train_job.main([str(tmp_path / "run.yaml"), "--dry-run"])
    assert "60 steps of 4 images" in capsys.readouterr().out


def test_a_dry_run_finds_all_that_would_fail_the_start_and_writes_nothing(
    data: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    weights = tmp_path / "weights.safetensors"
    save_file({"other.weight": torch.zeros(2)}, weights)
    storage = tmp_path / "no" / "folder"
    setting = experiment(tmp_path, data, init=str(weights), storage=str(storage), tracking={"uri": "/plain/folder"})
    with pytest.raises(ConfigError, match="the start would fail") as caught:
        preview(setting, Cluster(), measured=False)
    assert f"init: {weights}: " in f"{caught.value}"
    assert "tracking URI '/plain/folder'" in f"{caught.value}"
    assert not storage.parent.exists()

    (tmp_path / "file").write_text("no folder")
    under_file = experiment(tmp_path, data, storage=str(tmp_path / "file" / "runs"))
    with pytest.raises(ConfigError, match="cannot be written"):
        preview(under_file, Cluster(), measured=False)
    missing = experiment(tmp_path, data, init=str(tmp_path / "gone"))
    with pytest.raises(ConfigError, match=r"init: .*gone does not exist"):
        preview(missing, Cluster(), measured=False)


def test_a_dry_run_counts_the_disk_space_of_checkpoints(
    data: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = experiment(tmp_path, data).model.config(8, experiment(tmp_path, data).loss)
    parameters = sum(p.numel() for p in Detector(config).parameters())
    assert checkpoint_bytes(config, keep=2) == 5 * 16 * parameters  # two latest, two best, one being written
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10**6))
    with pytest.raises(ConfigError, match="has 1 MB left, the checkpoints take"):
        preview(experiment(tmp_path, data), Cluster(), measured=False)


def test_without_validation_data_there_are_no_evaluations(data: dict[str, str], tmp_path: Path) -> None:
    setting = experiment(tmp_path, {"train": data["train"]})
    assert "evaluations: none, as there is no data.val" in preview(setting, Cluster(), measured=False)


def test_the_estimated_memory_is_what_the_forward_pass_keeps(data: dict[str, str], tmp_path: Path) -> None:
    config = experiment(tmp_path, data).model.config(8, experiment(tmp_path, data).loss)
    state, small = estimated_bytes(config, micro_batch_size=2, boxes=3)
    assert state == pytest.approx(5 * 4 * 3.75e6, rel=0.05)  # weights, gradients, two moments, averaged weights
    _, twice = estimated_bytes(config, micro_batch_size=4, boxes=3)
    assert twice == pytest.approx(2 * small, rel=0.2)
    shards = load_shards(data["train"])
    assert shards.manifest.statistics.most_crowded.boxes > 0


def test_a_training_step_is_three_forward_passes_of_arithmetic() -> None:
    published = 7.17e9  # deployed network; training adds denoising queries and the heads of every layer
    assert 3 * published < flops_per_image(ModelConfig.variant("n", num_classes=80), boxes=7) < 3 * 1.15 * published


def test_a_step_launches_as_many_kernels_for_one_image_as_for_eight() -> None:
    config = ModelConfig.variant("s", num_classes=80)
    one, two, eight = (kernels_per_micro_batch(config, boxes=7, images=images) for images in (1, 2, 8))
    assert two == eight
    assert eight - one == pytest.approx(0, abs=40)  # some copies of a batch are views of one image
    with torch.device("meta"):
        layers = [m for m in Detector(config).modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)]
    assert one > 3 * len(layers)  # forward, and backward to inputs and weights


@pytest.mark.parametrize(("batch", "warned"), [(64, True), (64 * 32, False)])
def test_one_image_a_gpu_is_warned_about(data: dict[str, str], tmp_path: Path, batch: int, warned: bool) -> None:
    schedule = {"steps": 10, "global_batch_size": batch, "micro_batch_size": batch // 64}
    setting = experiment(tmp_path, data, schedule=schedule)
    config = ModelConfig.variant("s", num_classes=80)
    estimate, warning = launch_cost(config, derive(setting, images=118_287, workers=64), workers=64, boxes=7)
    assert estimate.startswith(f"estimated for a step on GPUs: {plural(batch // 64, 'image')} each in 1 micro-batch;")
    assert (warning is not None) == warned
    if warning is not None:
        images = int(warning.split("from ")[1].split()[0])
        assert f"schedule.global_batch_size: {64 * images}" in warning
        enough = experiment(
            tmp_path, data, schedule={"steps": 10, "global_batch_size": 64 * images, "micro_batch_size": images}
        )
        advised = derive(enough, images=118_287, workers=64)
        assert launch_cost(config, advised, workers=64, boxes=7)[1] is None  # the advice ends the warning


# Starting from another run


def test_a_run_begins_with_a_model_version_as_it_was_then(
    tracking: TrackingSettings, folder: Path, data: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    run = str(folder / "runs" / "begun")
    weights_uri = materialize_init("models:/shapes@champion", run, tracking.uri)
    assert weights_uri.startswith(run)
    assert materialize_init("models:/shapes@champion", run, "http://127.0.0.1:1/gone") == weights_uri
    setting = experiment(folder, data, model={"reg_max": 16}, init=weights_uri)
    detector = Detector(setting.model.config(len(CLASSES), setting.loss))
    origin = load_initial(detector, weights_uri, CLASSES)
    assert origin.parent["model_version"] == "shapes/1"
    assert any("reg_max" in line for line in origin.lines)
    backbone = open_detector(str(folder / "runs" / "run")).detector.backbone.state_dict()
    assert all(torch.equal(detector.backbone.state_dict()[key], tensor) for key, tensor in backbone.items())

    (Path(weights_uri) / "model.safetensors").write_bytes(
        (Path(weights_uri) / "model.safetensors").read_bytes()[:-1] + b"x"
    )
    with pytest.raises(ConfigError, match="damaged"):
        load_initial(detector, weights_uri, CLASSES)


@pytest.mark.parametrize("source", ["models:/none@champion", "runs:/0123456789abcdef0123456789abcdef"])
def test_a_source_that_mlflow_does_not_have_is_refused(source: str, tracking: TrackingSettings, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=source):
        materialize_init(source, str(tmp_path / "run"), tracking.uri)
    assert not (tmp_path / "run").exists()


def test_lineage_leads_from_a_run_to_its_parents_data_and_model(
    tracking: TrackingSettings, folder: Path, data: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    from_version = experiment(folder, data, name="child", schedule={"steps": 1})
    weights_uri = materialize_init("models:/shapes@champion", f"{from_version.storage}/child", tracking.uri)
    from_run = experiment(folder, data, name="grandchild", schedule={"steps": 1}, init=str(folder / "runs" / "child"))
    for setting in (from_version.model_copy(update={"init": weights_uri}), from_run):
        own = replace(tracking, run_name=setting.name or "", run_key=None)
        run = f"{setting.storage}/{setting.name}"
        shards = load_shards(data["train"])
        key = begin_or_continue(
            run,
            setting,
            ResolvedData(TrainingSet.alone(shards), None),
            tracking_key=setting.name or "",
            allow_changes=False,
        )
        own = replace(own, run_key=key.tracking_key)
        train(job(setting, tracking=own, outbox_folder=folder / f"queue-{setting.name}"), alone())
    lineage_job.main([str(folder / "runs" / "grandchild")])
    lines = capsys.readouterr().out.splitlines()
    digest = load_shards(data["train"]).manifest.digest[:12]
    assert lines[0].startswith("grandchild ")
    assert sum(digest in line for line in lines) == 3
    (child,) = (line for line in lines if "child  (" in line and "grand" not in line)
    (first,) = (line for line in lines if "run  (" in line)
    assert len(first) - len(first.lstrip(" │├└─")) > len(child) - len(child.lstrip(" │├└─"))
    assert any("began with shapes/1" in line for line in lines)
    assert any("model shapes/1" in line for line in lines)
    assert lines[-1].endswith("began from scratch")
    client = connect(tracking.uri)
    for name in ("child", "grandchild"):
        assert len(find_run(client, name).inputs.model_inputs) == 1
