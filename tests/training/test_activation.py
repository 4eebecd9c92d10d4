"""The activation of a run: as the initial weights were trained, as given, or as the recipe has it."""

from pathlib import Path
from typing import Any

import pytest
import torch

from dfine_core import Detector, ModelConfig, load
from dfine_core.checkpoints.folder import DESCRIPTION, WEIGHTS, make_description, tensors_to_bytes
from dfine_core.checkpoints.transformers_layout import to_transformers
from dfine_core.checkpoints.weights import load_weights
from pipeline.config import ConfigError, Experiment
from pipeline.config_files import check
from pipeline.data.sources.synthetic import CLASSES
from pipeline.training import loop, run_dir
from pipeline.training.activation import with_activation
from pipeline.training.context import resolve_data
from pipeline.training.launch import launch
from tests.support import training_runs
from tests.support.varied_detectors import varied_detector

NAMES = CLASSES[:3]
SMALL = ModelConfig.variant("n", num_classes=3, input_size=(64, 64), num_queries=20)


def folder_of(activation: str, folder: Path) -> str:
    """A folder that names its activation, as exports and copies of published weights are."""
    folder.mkdir()
    config = SMALL.with_(activation=activation)
    (folder / DESCRIPTION).write_bytes(make_description(config, NAMES, range(3)))
    (folder / WEIGHTS).write_bytes(tensors_to_bytes(varied_detector(config).state_dict()))
    return str(folder)


def bare_file(folder: Path) -> str:
    torch.save({"model": varied_detector(SMALL).state_dict()}, folder / "weights.pth")
    return str(folder / "weights.pth")


def settled(init: str, **content: Any) -> tuple[str | None, list[str]]:
    values = {"data": {"train": "a"}, "schedule": {"epochs": 1}, "init": init, **content}
    experiment, lines = with_activation(check(Experiment, values, source="test"))
    return experiment.model.activation, lines


@pytest.mark.parametrize(
    ("trained", "recipe", "line"),
    [
        ("relu", "dfine", None),
        ("silu", "deim", None),
        ("relu", "deim", "activation relu, as the initial weights were trained with it; recipe deim has silu"),
        ("silu", "dfine", "activation silu, as the initial weights were trained with it; recipe dfine has relu"),
    ],
)
def test_a_folder_that_names_its_activation_decides_it(
    trained: str, recipe: str, line: str | None, tmp_path: Path
) -> None:
    folder = folder_of(trained, tmp_path / "init")
    assert settled(folder, recipe=recipe) == (trained, [line] if line else [])


def test_a_given_activation_stays_and_a_misfit_is_noted(tmp_path: Path) -> None:
    folder = folder_of("relu", tmp_path / "init")
    assert settled(folder, recipe="deim", model={"activation": "relu"})[0] == "relu"
    activation, lines = settled(folder, recipe="deim", model={"activation": "silu"})
    assert activation == "silu"
    assert lines == ["the initial weights were trained with relu, and model.activation is silu: they fit badly"]


def test_a_file_of_weights_alone_needs_a_word_for_deim_and_is_taken_as_d_fine_otherwise(tmp_path: Path) -> None:
    file = bare_file(tmp_path)
    with pytest.raises(ConfigError, match=r"weights.pth holds weights alone.*set model.activation"):
        settled(file, recipe="deim")
    for given in ("relu", "silu"):
        activation, lines = settled(file, recipe="deim", model={"activation": given})
        assert activation == given
        assert lines == [f"{file} does not name the activation of its weights: taken as {given}"]
    activation, (line,) = settled(file)
    assert activation == "relu"
    assert line.endswith("for weights of DEIM set model.activation to silu")


def test_a_file_of_transformers_is_of_relu(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(tensors_to_bytes(to_transformers(varied_detector(SMALL).state_dict())))
    assert settled(str(path), recipe="deim")[0] == "relu"


@pytest.mark.parametrize(("recipe", "activation"), [("dfine", "relu"), ("deim", "silu")])
def test_a_backbone_leaves_the_choice_to_the_recipe(recipe: str, activation: str, tmp_path: Path) -> None:
    torch.save(varied_detector(SMALL).backbone.state_dict(), tmp_path / "backbone.pth")
    assert settled(str(tmp_path / "backbone.pth"), recipe=recipe) == (activation, [])
    assert settled("hgnetv2-b0", recipe=recipe) == (activation, [])
    assert settled("dfine-n-coco", recipe=recipe)[0] == "relu"


def test_a_checkpoint_of_deim_names_its_activation(tmp_path: Path) -> None:
    data = training_runs.shard_folders(tmp_path)
    first = training_runs.experiment(tmp_path, data, recipe="deim", schedule={"steps": 1})
    loop.train(training_runs.job(first), training_runs.alone())
    run = f"{first.storage}/{first.name}"
    activation, lines = settled(run, recipe="deim")
    assert (activation, lines) == ("silu", [])


@pytest.mark.slow  # MLflow's first start
def test_a_fine_tuning_by_deim_keeps_the_relu_of_its_initial_weights_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    data = training_runs.shard_folders(tmp_path)
    folder = folder_of("relu", tmp_path / "init")
    values = {"recipe": "deim", "init": folder, "schedule": {"steps": 1}}
    tuned = training_runs.experiment(tmp_path, data, **values)
    result = launch(tuned)
    assert "activation relu, as the initial weights were trained with it" in capsys.readouterr().out
    assert load(result.run, "cpu").config.activation == "relu"
    assert (Path(result.run) / "checkpoints" / "step-00000001" / "experiment.yaml").read_text().count(
        "activation: relu"
    ) == 1
    with pytest.raises(run_dir.RunFinishedError):  # the same settings still
        run_dir.begin_or_continue(result.run, tuned, resolve_data(tuned.data), tracking_key="", allow_changes=False)


def test_weights_with_frozen_norms_load_into_a_network_that_trains_them() -> None:
    settings = {"num_classes": 3, "input_size": (64, 64), "num_queries": 20}
    frozen = varied_detector(ModelConfig.variant("n", freeze_at=0, freeze_norm=True, **settings))
    trained = Detector(ModelConfig.variant("n", **settings))
    assert len(trained.state_dict()) > len(frozen.state_dict())
    load_weights(trained, frozen.state_dict())
    for key, value in frozen.state_dict().items():
        assert torch.equal(trained.state_dict()[key], value), key
    assert int(trained.backbone.stem.stem1.bn.num_batches_tracked) == 0
