"""The description of a run in MLflow: few parameters, data sets by name, a note."""

from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.config_files import dump, flatten
from pipeline.training.run_description import chosen_params, dataset_name, run_note, run_tags
from tests.support.training_runs import experiment, job, shard_folders


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return shard_folders(tmp_path_factory.mktemp("data"))


def test_parameters_are_those_that_people_compare(data: dict[str, str], tmp_path: Path) -> None:
    given = experiment(tmp_path, data, loss={"vfl": 2.0}, optimizer={"lr": 3e-4}, seed=7)
    params = chosen_params(job(given))
    assert len(params) < 35 < len(flatten(dump(given)))
    assert (params["seed"], params["loss.vfl"], params["loss.ddf"]) == (7, 2.0, 1.5)
    assert params["model.num_denoising"] == 10  # unlike its default
    assert "loss.bbox" not in params  # equal to its default
    assert not {"name", "storage", "data.train", "evaluation.num_images"} & params.keys()
    schedule = job(given).schedule
    assert params["optimizer.lr"] == schedule.optimizer.lr  # as derived from the batch
    assert params["schedule.steps"] == 6
    assert all(value is not None for value in params.values())


def test_the_note_names_model_data_command_and_result(data: dict[str, str], tmp_path: Path) -> None:
    begun = replace(job(experiment(tmp_path, data)), command="dfine train mine.yaml")
    note = run_note(begun)
    assert "D-FINE-N at 64 x 64: 1 epochs, 6 steps of 4 images, from random weights" in note
    assert "24 images" in note
    assert note.endswith("`dfine train mine.yaml`")
    assert run_note(begun, {"AP": 0.5, "AP50": 0.75, "AP75": 0.25}).startswith("**AP 0.500, AP50 0.750, AP75 0.250**")


def test_a_data_set_is_named_by_set_and_split(data: dict[str, str], tmp_path: Path) -> None:
    shards = job(experiment(tmp_path, data)).data.train.sets[0].shards
    split = shards.manifest.split
    names = {uri: dataset_name(replace(shards, uri=uri)) for uri in ("s3://b/x/coco", f"/data/coco/{split}/", "/coco")}
    assert set(names.values()) == {f"coco/{split}"}
    assert dataset_name(replace(shards, uri="/data/coco/manifest.json")) == f"coco/{split}"


def test_every_fact_has_one_tag(data: dict[str, str], tmp_path: Path) -> None:
    tags = run_tags(job(experiment(tmp_path, data)), {"run_id": "abc"})
    assert tags["parent.run_id"] == "abc"
    facts = [value for key, value in tags.items() if not key.startswith(("version.", "digest."))]
    assert len(facts) == len(set(facts))
