"""A training on several sets: checks and what is printed, the same run for any workers and after a kill, its records."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import yaml

from pipeline.config import Cluster, ConfigError
from pipeline.config_files import check, dump
from pipeline.data.shards.manifest import load_shards
from pipeline.data.sources.synthetic import CLASSES
from pipeline.data_settings import Data
from pipeline.labelling.suspects_report import trained_on
from pipeline.run_report.results import collect
from pipeline.training import checkpoint
from pipeline.training.chain import load_chain
from pipeline.training.dry_run import preview
from pipeline.training.loop import train
from pipeline.training.run_description import run_note, run_tags
from pipeline.training.run_dir import begin_or_continue
from tests.data.test_classes import renamed
from tests.support.synthetic_shards import synthetic_records, write_shards
from tests.support.teachers import teacher_boxes
from tests.support.training_runs import SteppedRun, alone, experiment, job
from tests.training.test_training_loop import run_and_kill, tensors_of


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Two sets that call one class differently, and validation images."""
    folder = tmp_path_factory.mktemp("shards")
    other = write_shards(folder / "other", synthetic_records(16, longest_side=64, seed=2))
    return {
        "own": write_shards(folder / "own", synthetic_records(8, longest_side=64)).uri,
        "other": renamed(other, ["Vehicle", *CLASSES[1:7], "zebra"]).uri,
        "val": write_shards(folder / "val", synthetic_records(6, longest_side=64, seed=1)).uri,
    }


@pytest.fixture(scope="module")
def mixed(places: dict[str, str]) -> dict[str, Any]:
    sets = [
        {"shards": places["own"], "weight": 2.5},
        {"shards": places["other"], "weight": 0.5, "classes": {"Vehicle": CLASSES[0]}},
    ]
    return {"train": sets, "val": places["val"], "repeat_factor_threshold": 0.2}


# Settings


@pytest.mark.parametrize("train", ["set", [{"shards": "set"}], [{"shards": "set", "weight": 1, "classes": {}}]])
def test_one_plain_set_is_its_path(train: Any) -> None:
    data = check(Data, {"train": train}, source="test")
    assert data.train == str(Path.cwd() / "set")
    assert [each.shards for each in data.train_sets] == [data.train]


def test_a_list_is_written_as_it_is_read() -> None:
    data = check(
        Data, {"train": [{"shards": "a"}, {"shards": "s3://b/c", "weight": 2, "classes": {"x": "y"}}]}, source="test"
    )
    assert dump(data)["train"] == [
        {"shards": str(Path.cwd() / "a"), "weight": 1.0, "classes": {}},
        {"shards": "s3://b/c", "weight": 2.0, "classes": {"x": "y"}},
    ]
    assert check(Data, dump(data), source="again") == data


@pytest.mark.parametrize(
    ("data", "parts"),
    [
        ({"train": []}, ["train: give a shard set, or a list of 1 to 100"]),
        ({"train": {"shards": "a"}}, ["train: give a shard set, or a list of 1 to 100"]),
        ({"train": [{"shards": "a"}] * 2}, ["/a is listed twice: give it a larger weight"]),
        (
            {"train": [{"shards": "a", "wieght": 2}, {"weight": 0}, "c", {"shards": "b", "weight": 101}]},
            [
                "set 1: unknown key 'wieght'; did you mean weight",
                "set 2: shards: Field required",
                "set 2: weight: Input should be greater than 0 (it is 0)",
                "set 3: 'c' is no set: write {shards: FOLDER}",
                "set 4: weight: Input should be less than or equal to 100",
            ],
        ),
        ({"train": "a", "repeat_factor_threshold": 0}, ["repeat_factor_threshold: Input should be greater than 0"]),
        (
            {"train": "a", "repeat_factor_threshold": 2},
            ["repeat_factor_threshold: Input should be less than or equal to 1"],
        ),
    ],
)
def test_wrong_lists_are_refused_with_all_their_problems(data: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(ConfigError) as raised:
        check(Data, data, source="test")
    assert all(part in str(raised.value) for part in parts), raised.value


def test_a_dry_run_prints_sets_weights_images_and_classes(mixed: dict[str, Any], tmp_path: Path) -> None:
    text = preview(experiment(tmp_path, mixed, schedule={"epochs": 2, "steps": None}), Cluster(), measured=False)
    train = job(experiment(tmp_path, mixed)).data.train
    own, other = train.sets
    assert other.copies is None or other.images_in_pass >= 16
    assert f"2 sets, {train.images_in_epoch} images in an epoch" in text
    assert f"1. {own.shards.uri}: weight 2.5, 8 images" in text
    assert f"{train.images_in_epoch // 4} per epoch of {train.images_in_epoch} images" in text
    assert "WARNING: set 1" in text
    assert "does not annotate zebra" in text
    assert "repeat factors: " in text


def test_problems_of_all_sets_end_a_dry_run(mixed: dict[str, Any], places: dict[str, str], tmp_path: Path) -> None:
    wrong = {**mixed, "train": [{"shards": places["own"], "classes": {"cirlce": "x", "bat": "y"}}, mixed["train"][1]]}
    with pytest.raises(ValueError, match=r"(?s)cirlce.*did you mean circle.*bat"):
        preview(experiment(tmp_path, wrong), Cluster(), measured=False)


def test_boxes_of_a_teacher_need_one_set(mixed: dict[str, Any], places: dict[str, str], tmp_path: Path) -> None:
    boxes = teacher_boxes(places["own"], tmp_path / "teacher")
    with pytest.raises(ConfigError, match=r"teacher.boxes.folder: .*belong to one shard set, and data.train has 2"):
        job(experiment(tmp_path, mixed, teacher={"boxes": {"folder": boxes}}))
    one = {**mixed, "train": [{"shards": places["own"], "classes": {CLASSES[1]: "thing"}}], "val": None}
    taught = job(experiment(tmp_path, one, teacher={"boxes": {"folder": boxes}})).data
    assert taught.train.sets[0].shards.teacher_boxes == boxes
    assert taught.train.names[1] == "thing"


# The run


def test_a_killed_run_on_two_sets_goes_on_as_if_it_had_not_been(mixed: dict[str, Any], tmp_path: Path) -> None:
    """Ten steps of four over an epoch of fewer; killed in the second epoch."""
    data = {**mixed, "val": None}
    whole = experiment(tmp_path, data, name="whole", schedule={"steps": 10}, checkpoints={"every_steps": 4})
    assert job(whole).schedule.steps_per_epoch <= 9
    train(job(whole), alone())
    cut = whole.model_copy(update={"name": "cut"})
    run_and_kill(job(cut), after=9, written=8)
    train(job(cut), alone())
    expected, found = (tensors_of(f"{tmp_path}/runs/{name}/checkpoints", 10) for name in ("whole", "cut"))
    assert expected.keys() == found.keys()
    assert not [key for key, tensor in expected.items() if not torch.equal(tensor, found[key])]


@pytest.mark.slow
def test_what_a_run_leaves_behind_knows_both_sets(mixed: dict[str, Any], tmp_path: Path) -> None:
    setting = experiment(tmp_path, mixed, schedule={"steps": 2})
    assert set(train(job(setting), alone())["numbers"]) >= {"AP"}
    folder = f"{tmp_path}/runs/run/checkpoints/{checkpoint.step_folder(2)}"
    metadata = checkpoint.read_metadata(folder)
    assert [category.name for category in metadata.categories] == [*CLASSES, "zebra"]
    assert set(metadata.data) == {"train", "data.train.1", "data.train.2", "val"}
    sets = [load_shards(each["shards"]) for each in mixed["train"]]
    assert [trained_on(f"{folder}/ema.safetensors", each) for each in sets] == [True, True]
    assert not trained_on(f"{folder}/ema.safetensors", load_shards(mixed["val"]))
    assert collect(f"{tmp_path}/runs/run").train_boxes == job(setting).data.train.statistics.class_counts


def one_of_two(rank: int, folder: str, data: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    setting = experiment(Path(folder), data, schedule={"steps": 9, "micro_batch_size": 2})
    run = SteppedRun.begin(job(setting, workers=2), alone(rank=rank, world_size=2))
    torch.save({"losses": run.losses(9)}, f"{folder}/rank-{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_workers_equal_one_on_two_sets(mixed: dict[str, Any], tmp_path: Path) -> None:
    """Beyond the first epoch; one worker accumulates the two micro-batches of every step."""
    mp.spawn(one_of_two, args=(str(tmp_path), mixed), nprocs=2)
    first, second = (torch.load(tmp_path / f"rank-{rank}.pt", weights_only=True)["losses"] for rank in range(2))
    setting = experiment(tmp_path, mixed, name="alone", schedule={"steps": 9, "micro_batch_size": 2})
    run = SteppedRun.begin(job(setting))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    losses = run.losses(9)
    torch.set_num_threads(threads)
    assert first == second
    assert first == pytest.approx(losses, rel=1e-4)


# Records


def test_another_mixture_is_another_run(mixed: dict[str, Any], places: dict[str, str], tmp_path: Path) -> None:
    def begin(data: dict[str, Any], allow: bool = False) -> None:
        setting = experiment(tmp_path, data)
        begin_or_continue(str(tmp_path / "run"), setting, job(setting).data, tracking_key="key", allow_changes=allow)

    begin(mixed)
    begin(mixed)
    first, second = mixed["train"]
    with pytest.raises(ConfigError, match=r"data.train: sets as \[\(2.5, .* before, \[\(3.0, .* now"):
        begin({**mixed, "train": [{**first, "weight": 3}, second]})
    with pytest.raises(ConfigError, match=r"data.repeat_factor_threshold: 0.2 before, 0.3 now"):
        begin({**mixed, "repeat_factor_threshold": 0.3})
    with pytest.raises(ConfigError, match=r"data.train.1: other data, digest") as raised:
        begin({**mixed, "train": [{**first, "shards": places["val"]}, second]})
    assert "data.train.2" not in str(raised.value)
    begin({**mixed, "train": [{**first, "weight": 3}, second]}, allow=True)
    assert "data.train.2" in json.loads((tmp_path / "run" / "run.json").read_text())["data"]


def test_moved_sets_are_the_same_data(mixed: dict[str, Any], places: dict[str, str], tmp_path: Path) -> None:
    moved = write_shards(tmp_path / "moved", synthetic_records(8, longest_side=64)).uri
    first, second = mixed["train"]
    before = experiment(tmp_path, mixed)
    begin_or_continue(str(tmp_path / "run"), before, job(before).data, tracking_key="key", allow_changes=False)
    now = experiment(tmp_path, {**mixed, "train": [{**first, "shards": moved}, second]})
    begin_or_continue(str(tmp_path / "run"), now, job(now).data, tracking_key="key", allow_changes=False)


def test_mlflow_is_told_of_every_set(mixed: dict[str, Any], tmp_path: Path) -> None:
    begun = job(experiment(tmp_path, mixed))
    tags = run_tags(begun, {})
    assert {key for key in tags if key.startswith("digest.")} == {
        *("digest.train", "digest.data.train.1", "digest.data.train.2", "digest.val")
    }
    assert run_note(begun).count("Training: ") == 2


# Chains


def chain(folder: Path, data: dict[str, Any], **settings: Any) -> Iterator[Any]:
    content = {"data": data, "model": {"variant": "n"}, "schedule": {"epochs": 1}}
    (folder / "experiment.yaml").write_text(yaml.safe_dump(content))
    stages = [
        {"name": "a", "experiment": "experiment.yaml", "set": settings},
        {"name": "b", "experiment": "experiment.yaml"},
    ]
    (folder / "chain.yaml").write_text(yaml.safe_dump({"storage": str(folder / "runs"), "stages": stages}))
    return iter(load_chain(folder / "chain.yaml", {}, Cluster())[1])


def test_a_chain_hands_the_list_to_its_stages(mixed: dict[str, Any], places: dict[str, str], tmp_path: Path) -> None:
    first, second = chain(tmp_path, mixed, **{"data.train": places["own"]})
    assert first.experiment.data.train == places["own"]
    assert [each.weight for each in second.experiment.data.train_sets] == [2.5, 0.5]
    assert second.experiment.data.train_sets[1].classes == {"Vehicle": CLASSES[0]}
