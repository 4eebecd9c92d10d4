"""Sweep files: accepted and rejected content, and the trials that follow from it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config import Cluster, ConfigError, Experiment
from pipeline.config_files import check, dump, flatten, with_values
from pipeline.tuning.driver import sweep_for_trials
from pipeline.tuning.load import load_sweep
from pipeline.tuning.locations import with_absolute_paths
from pipeline.tuning.resources import place_trials
from pipeline.tuning.space import Domain, distribution, grid_points, is_active, random_point, suggest_point
from pipeline.tuning.sweep import (
    Sweep,
    confirm_trials,
    default_point,
    experiment_of,
    replicate_trials,
    rungs,
    search_trials,
    value_at,
)
from tests.support.simulated_sweeps import loaded, written

CONFIGS = Path(__file__).parents[2] / "configs"
CONDITIONAL = {
    "loss.ddf": {"uniform": [0, 5], "when": {"model.regression": "fdr"}},  # written before the key of its condition
    "model.regression": {"choice": ["fdr", "direct"]},
    "loss.ddf_temperature": {"choice": [2, 5], "when": {"model.regression": ["fdr"]}},
}


def test_every_problem_is_in_one_error_with_its_key_and_a_way_out(tmp_path: Path) -> None:
    space = {
        "model.reg_mx": {"choice": [8, 16]},
        "model.reg_max": {"choice": [8, 17, 64]},
        "lernrate": {"uniform": [0, 1]},
        "loss.ddf": {"uniform": [-1, 5]},
        "loss.fgl": {"choice": [1], "when": {"loss.dff": 1}},
        "schedule.global_batch_size": {"choice": [8, 1]},
        "model.variant": {"grid": ["n", "s"]},
    }
    path = written(tmp_path, space=space, workers_per_trial=2, scheduler={"grace": 9}, cluster="none.yaml")
    with pytest.raises(ConfigError) as raised:
        load_sweep(path)
    text = str(raised.value)
    for part in (
        "10 problems",
        "none.yaml: there is no such file",
        "space.model.reg_mx: model: unknown key 'reg_mx'; did you mean reg_max",
        "space.model.reg_max: 17 is invalid: model: reg_max (17) must be an even number",
        "space.lernrate: unknown key 'lernrate'",
        "space.loss.ddf: -1 is invalid: loss: ddf (-1.0) must not be negative",
        "space.loss.fgl.when: loss.dff is not searched",
        "1 is invalid: schedule.global_batch_size (1) is too small for 2 workers",
        "grid needs searcher.kind grid; use choice with optuna",
        "scheduler.grace (9) leaves nothing to stop: a trial has 9 evaluations",
    ):
        assert part in text, f"{part}\n{text}"


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        ({"trials": None}, "give trials or hours"),
        ({"space": {}}, "name at least one key"),
        ({"together": 2}, "unknown key 'together'; it is called max_concurrent_trials"),
        ({"spcae": {}}, "unknown key 'spcae'; did you mean space"),
        ({"metric": "mAP"}, "'mAP' is not measured: choose from AP, AP50"),
        ({"metric": "latency"}, "known only at the end of a trial"),
        ({"metric": "edges/width_error"}, "is better when it is lower: add mode: min"),
        ({"searcher": {"kind": "random", "objectives": ["AP", "latency"]}}, "two objectives need searcher.kind optuna"),
        ({"searcher": {"objectives": ["AP50", "latency"]}}, "give the metric (AP)"),
        ({"searcher": {"kind": "grid"}, "space": {"loss.ddf": {"uniform": [0, 1]}}}, "grid needs a list of values"),
        ({"gpus_per_worker": 1.5}, "only whole GPUs can be assigned"),
        ({"cpus_per_worker": 0, "gpus_per_worker": 0}, "a worker needs at least one of them"),
        ({"name": "a b"}, "becomes a folder"),
        ({"base": {"seed": 1}}, "the loader fills it in"),
        ({"experiment": "none.yaml"}, "there is no such file"),
        ({"set": {"model.reg_max": 7}}, "experiment: model: reg_max (7) must be an even number"),
        ({"set": {"data.val": None}}, "data.val is missing"),
        ({"set": {"init": "a.pth"}}, "set.init: the sweep sets it"),
        ({"init": "a.pth", "space": {"init": {"choice": [None]}}}, "init is given for all trials, and searched"),
        ({"space": {"init": {"choice": ["dfine-q-coco"]}}}, 'space.init: "dfine-q-coco" is invalid: init: '),
        ({"space": {"seed": {"choice": [1, 2]}}}, "space.seed: the sweep sets it"),
        ({"space": {"loss.ddf": {"choice": []}}}, "the list is empty"),
        ({"space": {"loss.ddf": {"choice": [1, 2, 1.0]}}}, "1 is listed twice"),
        ({"space": {"loss.ddf": {}}}, "give one of choice, grid"),
        ({"space": {"loss.ddf": {"choice": [1], "uniform": [0, 1]}}}, "not choice and uniform"),
        ({"space": {"loss.ddf": {"uniform": [1, 0]}}}, "must be below the second"),
        ({"space": {"loss.ddf": {"loguniform": [0, 1]}}}, "must be above zero"),
        ({"space": {"model.reg_max": {"integer": [8, 33, 2]}}}, "miss 33; the last one is 32"),
        ({"space": {"loss.ddf": {"choice": [1], "when": {"loss.fgl": 3}}, "loss.fgl": {"choice": [1]}}}, "never 3"),
        (
            {
                "space": {
                    k: {"choice": [1], "when": {o: 1}} for k, o in (("loss.ddf", "loss.fgl"), ("loss.fgl", "loss.ddf"))
                }
            },
            "circular conditions: loss.ddf, loss.fgl",
        ),
        (
            {
                "space": {
                    "model.num_queries": {"choice": [50, 300]},
                    "model.input_size": {"choice": [[128, 128], [512, 512]]},
                }
            },
            "fewer than num_queries",
        ),
    ],
)
def test_an_invalid_sweep_is_refused_with_a_way_out(tmp_path: Path, sweep: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        load_sweep(written(tmp_path, **sweep))
    assert message in str(raised.value)


def test_values_that_are_valid_alone_but_not_together_are_refused(tmp_path: Path) -> None:
    space = {
        "schedule.global_batch_size": {"choice": [8, 12]},
        "schedule.micro_batch_size": {"choice": [2, 8]},
    }
    with pytest.raises(
        ConfigError, match=r"invalid together .schedule.global_batch_size=12, schedule.micro_batch_size=8"
    ):
        load_sweep(written(tmp_path, space=space, searcher={"kind": "grid"}))


def test_overrides_reach_the_sweep_and_through_it_the_experiment(tmp_path: Path) -> None:
    overrides = {"trials": 3, "searcher.kind": "random", "schedule.steps": 600, "data.val": "elsewhere"}
    sweep = load_sweep(written(tmp_path), overrides)
    assert (sweep.trials, sweep.searcher.kind, sweep.name) == (3, "random", "sweep")
    assert sweep.base["schedule"]["steps"] == 600
    assert sweep.base["data"]["val"] == "elsewhere"


def test_an_override_with_an_old_key_of_the_sweep_is_refused_with_the_new_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown key 'together'; it is called max_concurrent_trials"):
        load_sweep(written(tmp_path), {"together": 4})


def test_a_stored_sweep_is_read_back_unchanged(tmp_path: Path) -> None:
    sweep = loaded(tmp_path, space=CONDITIONAL)
    assert check(Sweep, json.loads(json.dumps(dump(sweep))), source="kept") == sweep


def test_a_trial_is_the_experiment_with_set_point_seed_and_init_in_this_order(tmp_path: Path) -> None:
    sweep = loaded(tmp_path, set={"loss.ddf": 0.25, "optimizer.lr": 1e-4}, init="pretrained.pth")
    experiment = check(Experiment, experiment_of(sweep, {"loss.ddf": 5, "model.reg_max": 16}, seed=7), source="trial")
    assert (experiment.loss.ddf, experiment.optimizer.lr, experiment.seed) == (5, 1e-4, 7)
    assert experiment.init == str(Path.cwd() / "pretrained.pth")
    assert experiment.model.config(3, experiment.loss).reg_max == 16
    assert sweep.base["loss"] == {"ddf": 0.25}  # untouched by the trial


def test_initial_weights_can_be_searched_and_their_paths_are_absolute(tmp_path: Path) -> None:
    sweep = loaded(tmp_path, space={"init": {"choice": [None, "backbone.safetensors", "dfine-s-coco"]}})
    here = str(Path.cwd() / "backbone.safetensors")
    assert sweep.space["init"].values == (None, here, "dfine-s-coco")
    assert check(Experiment, experiment_of(sweep, {"init": here}, seed=0), source="trial").init == here
    assert check(Experiment, experiment_of(sweep, {"init": None}, seed=0), source="trial").init is None
    assert default_point(sweep) == {"init": None}


LOCATIONS = (
    *("data.train", "data.val", "storage", "init"),
    *("teacher.features.model", "teacher.detector.weights", "teacher.boxes.folder"),
)


def test_every_path_of_an_experiment_is_absolute_in_its_trials_whether_set_or_searched(tmp_path: Path) -> None:
    boxes = {"boxes": {"folder": "boxes"}}
    space = {
        "data.train": {"choice": ["here", "s3://bucket/there", "/absolute"]},
        "teacher": {"choice": [{}, boxes, {"detector": {"weights": "dfine-l-coco"}}], "when": {"data.train": "here"}},
    }
    sweep = loaded(tmp_path, space=space, set={"teacher.features.model": "vision"})
    here, found = str(Path.cwd() / "here"), str(Path.cwd() / "boxes")
    assert sweep.space["data.train"].values == (here, "s3://bucket/there", "/absolute")
    assert sweep.space["teacher"].when == {"data.train": here}
    detector = {"detector": {"weights": "dfine-l-coco"}}
    assert sweep.space["teacher"].values == ({}, {"boxes": {"folder": found}}, detector)
    base = sweep_for_trials(sweep, str(tmp_path / "runs"), "sqlite:///unused.db").base
    assert value_at(base, "teacher.features.model") == str(Path.cwd() / "vision")
    assert value_at(base, "data.val") == str(Path.cwd() / "val")


def test_several_sets_of_a_training_are_carried_and_searched(tmp_path: Path) -> None:
    several = [{"shards": "a"}, {"shards": "s3://b/c", "weight": 2, "classes": {"car": "vehicle"}}]
    found = [{**several[0], "shards": str(Path.cwd() / "a")}, several[1]]
    base = sweep_for_trials(loaded(tmp_path, set={"data.train": several}), str(tmp_path), "sqlite:///unused.db").base
    assert value_at(base, "data.train") == found
    searched = loaded(tmp_path, space={"data.train": {"choice": ["a", several]}})
    assert searched.space["data.train"].values == (str(Path.cwd() / "a"), found)
    data = check(Experiment, experiment_of(searched, {"data.train": found}, seed=0), source="trial").data
    assert [(each.shards, each.weight) for each in data.train_sets] == [(str(Path.cwd() / "a"), 1), ("s3://b/c", 2)]
    with pytest.raises(ConfigError, match=r"data.train: set 1: weight: Input should be greater than 0"):
        loaded(tmp_path, space={"data.train": {"choice": [[{"shards": "a", "weight": 0}]]}})


def test_the_keys_that_are_made_absolute_are_those_that_an_experiment_makes_absolute() -> None:
    for key in LOCATIONS:
        assert value_at(with_absolute_paths(with_values({}, {key: "near"})), key) == str(Path.cwd() / "near"), key
    content = {
        "storage": "a",
        "init": "b",
        "data": {"train": "c", "val": "d"},
        "schedule": {"steps": 9},
        "teacher": {"features": {"model": "e"}, "detector": {"weights": "f"}, "boxes": {"folder": "g"}},
    }
    checked = flatten(dump(check(Experiment, content, source="test")))
    found = [key for key, value in checked.items() if isinstance(value, str) and value.startswith(str(Path.cwd()))]
    assert sorted(found) == sorted(LOCATIONS)
    wrong = {"data": "text", "teacher": {"boxes": 3}, "init": 7, "unknown": {"folder": "x"}, "seed": "near"}
    assert with_absolute_paths(wrong) == wrong


def test_a_section_without_anything_is_the_default_when_the_experiment_has_none(tmp_path: Path) -> None:
    boxes = {"boxes": {"folder": "/boxes"}}
    space = {"teacher": {"grid": [boxes, {}]}, "recipe": {"grid": ["dfine", "deim"]}}
    sweep = loaded(tmp_path, space=space, searcher={"kind": "grid"})
    assert default_point(sweep) == {"teacher": {}, "recipe": "dfine"}
    assert default_point(sweep) in grid_points(sweep.space)
    sweep = loaded(tmp_path, space=space, searcher={"kind": "grid"}, set={"teacher": boxes})
    assert default_point(sweep) == {"teacher": boxes, "recipe": "dfine"}


def test_the_default_point_is_the_experiment_as_it_is(tmp_path: Path) -> None:
    space = {
        "optimizer.lr": {"loguniform": [1e-5, 1e-2]},
        "model.reg_max": {"choice": [8, 16]},
        "schedule.warmup_steps": {"choice": [10, 20]},
    }
    sweep = loaded(tmp_path, space=space)
    default = default_point(sweep)
    assert default == {"optimizer.lr": 8e-4, "model.reg_max": 32, "schedule.warmup_steps": None}  # D-FINE-N's recipe
    own = check(Experiment, sweep.base, source="own")
    again = check(Experiment, experiment_of(sweep, default, seed=0), source="default")
    assert again.optimizer.config("n", 1) == own.optimizer.config("n", 1)
    assert again.model == own.model
    assert again.schedule == own.schedule


def test_trial_ids_are_the_same_in_every_start_and_differ_by_point_seed_and_phase(tmp_path: Path) -> None:
    sweep = loaded(tmp_path, replicates=3, seeds_per_point=2, confirm={"seeds": 2})
    point = {"model.reg_max": 16, "loss.ddf": 1.5}
    trials = [
        *search_trials(sweep, point),
        *replicate_trials(sweep),
        *confirm_trials(sweep, [point, {"model.reg_max": 8, "loss.ddf": 5}]),
    ]
    assert len({trial.id for trial in trials}) == len(trials) == 2 + 3 + 4
    assert len({trial.seed for trial in trials}) == 2 + 3 + 2  # confirmed points share their seeds; phases do not
    later = loaded(tmp_path, set={"seed": 5})
    assert {trial.seed for trial in replicate_trials(later)} == {1005, 1006, 1007}
    swapped = {"loss.ddf": 1.5, "model.reg_max": 16.0}
    assert [t.id for t in search_trials(sweep, swapped)] == [t.id for t in search_trials(sweep, point)]


def test_rungs_are_the_schedulers(tmp_path: Path) -> None:
    assert rungs(loaded(tmp_path, scheduler={"kind": "asha", "grace": 1, "reduction": 3}), 27) == (1, 3, 9)
    assert rungs(loaded(tmp_path, scheduler={"kind": "none"}), 27) == ()
    assert rungs(loaded(tmp_path, scheduler={"kind": "median", "grace": 2}), 5) == (2, 3, 4)


def conditional() -> dict[str, Domain]:
    return {key: Domain(**domain) for key, domain in CONDITIONAL.items()}


def test_optuna_samples_conditional_points_that_its_own_study_accepts() -> None:
    space = conditional()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=0, n_startup_trials=5))
    points = []
    for _ in range(20):
        trial = study.ask()
        point = suggest_point(space, trial)
        points.append(point)
        study.tell(trial, -abs(point.get("loss.ddf", 9) - 1))
        assert trial.params.keys() == point.keys()
        assert trial.distributions == {key: distribution(space[key]) for key in point}
    directs = [point for point in points if point["model.regression"] == "direct"]
    assert directs
    assert all(point.keys() == {"model.regression"} for point in directs)
    assert all(point.keys() == space.keys() for point in points if point not in directs)
    assert abs(study.best_params["loss.ddf"] - 1) < 1


def test_lists_and_booleans_come_back_from_optuna_unchanged() -> None:
    sizes = Domain(choice=[[128, 128], [256, 256]])
    switches = Domain(choice=[True, 1, None])
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    points = [suggest_point({"size": sizes, "switch": switches}, study.ask()) for _ in range(30)]
    assert {json.dumps(point["size"]) for point in points} == {"[128, 128]", "[256, 256]"}
    assert {json.dumps(point["switch"]) for point in points} == {"true", "1", "null"}


def test_a_grid_tries_every_combination_that_is_active_once() -> None:
    space = {
        "b": Domain(grid=[1, 2], when={"a": ["x", "y"]}),
        "a": Domain(grid=["x", "y", "z"]),
    }
    assert grid_points(space) == [
        {"a": "x", "b": 1},
        {"a": "x", "b": 2},
        {"a": "y", "b": 1},
        {"a": "y", "b": 2},
        {"a": "z"},
    ]


@given(seed=st.integers(0, 10_000))
@settings(max_examples=60, deadline=None)
def test_sampled_values_are_candidates_and_present_exactly_where_active(seed: int) -> None:
    space = {
        **conditional(),
        "q": Domain(quniform=[0.1, 0.7, 0.2]),
        "i": Domain(integer=[8, 64, 2]),
        "l": Domain(loguniform=[1e-5, 1e-1]),
    }
    point = random_point(space, seed)
    assert point == random_point(space, seed)
    for key, domain in space.items():
        assert (key in point) == is_active(domain, point)
        assert key not in point or domain.allows(point[key])
    assert point["i"] % 2 == 0
    assert (point["q"] - 0.1) / 0.2 == pytest.approx(round((point["q"] - 0.1) / 0.2))


def test_sampling_covers_both_ends_of_a_range_and_halves_a_logarithmic_one_at_its_geometric_mean() -> None:
    space = {"i": Domain(integer=[1, 3]), "l": Domain(loguniform=[1e-4, 1e-2])}
    points = [random_point(space, seed) for seed in range(400)]
    assert {point["i"] for point in points} == {1, 2, 3}
    assert np.mean([point["l"] < 1e-3 for point in points]) == pytest.approx(0.5, abs=0.1)


def test_exponents_without_a_decimal_point_are_numbers() -> None:
    domain = Domain(**yaml.safe_load("choice: [1e-4, 2E+3, '5', fdr]"))
    assert domain.values == (1e-4, 2000.0, "5", "fdr")


# Placement

LAPTOP = {"CPU": 2.0, "memory": 4.0 * 2**30}
GPU_NODE = {"CPU": 32.0, "GPU": 4.0, "memory": 64.0 * 2**30}
DRIVER = {"CPU": 0.01, "memory": 1.0 * 2**30}


def placement(sweep: Sweep, nodes: list[dict[str, float]], cluster: Cluster | None = None) -> Any:
    total = {name: sum(node.get(name, 0) for node in nodes) for name in ("CPU", "GPU")}
    return place_trials(sweep, cluster or Cluster(), total, nodes, driver=DRIVER, decoding_cpus=1.0)


def test_two_trials_share_a_laptop_and_more_are_reduced_with_a_message(tmp_path: Path) -> None:
    asked = loaded(tmp_path, cpus_per_worker=0.4, max_concurrent_trials=2)
    assert (placement(asked, [LAPTOP]).max_concurrent_trials, placement(asked, [LAPTOP]).message) == (2, None)
    more = placement(asked.model_copy(update={"max_concurrent_trials": 6}), [LAPTOP])
    assert more.max_concurrent_trials == 2
    assert "2 trials at once instead of 6" in more.message
    assert "1 CPU is reserved for decoding" in more.message


def test_a_trial_that_never_fits_is_refused_with_the_resources_of_the_cluster(tmp_path: Path) -> None:
    wide = loaded(tmp_path, cpus_per_worker=1.5)
    with pytest.raises(
        ConfigError, match=r"no trial would ever start.*1.5 CPU.*the cluster has 2 CPU, 4 GiB on 1 node"
    ):
        placement(wide, [LAPTOP])
    with pytest.raises(ConfigError, match="no trial would ever start"):
        placement(loaded(tmp_path, gpus_per_worker=1), [LAPTOP])
    assert placement(wide, [LAPTOP], Cluster(autoscaling=True)).max_concurrent_trials == 1


def test_a_worker_needs_one_node_so_remainders_of_several_do_not_add_up(tmp_path: Path) -> None:
    sweep = loaded(tmp_path, gpus_per_worker=3, trials=100)
    assert (
        placement(sweep, [GPU_NODE, GPU_NODE]).max_concurrent_trials == 2
    )  # 8 GPUs, but one of each node is left over
    halves = loaded(
        tmp_path, gpus_per_worker=0.5, workers_per_trial=2, set={"schedule.global_batch_size": 8}, trials=100
    )
    assert placement(halves, [GPU_NODE] * 4).max_concurrent_trials == 16
    assert placement(halves.model_copy(update={"trials": 5}), [GPU_NODE] * 4).max_concurrent_trials == 5


def test_drivers_of_trials_need_memory(tmp_path: Path) -> None:
    small = {**GPU_NODE, "memory": 2.5 * 2**30}
    sweep = loaded(tmp_path, gpus_per_worker=0.5, trials=100, max_concurrent_trials=16)
    assert placement(sweep, [small, small]).max_concurrent_trials == 4
    assert "0.01 CPU with 1 GiB for its driver" in placement(sweep, [small, small]).message


# What is shipped


def test_every_shipped_sweep_is_valid_and_its_header_has_command_hardware_and_cost() -> None:
    paths = sorted((CONFIGS / "sweeps").glob("*.yaml"))
    assert {path.stem for path in paths} >= {"fdr_golsd", "learning_rate", "small_data"}
    for path in paths:
        sweep = load_sweep(path)
        assert max(sweep.replicates, sweep.seeds_per_point) >= 2, "the noise would stay unknown"
        comment = path.read_text().split("experiment:")[0]
        for part in (f"dfine tune configs/sweeps/{path.name}", "Hardware:", "Cost:"):
            assert part in comment, (path, part)


def test_the_sweep_of_fdr_and_go_lsd_looks_at_all_their_settings() -> None:
    space = load_sweep(CONFIGS / "sweeps" / "fdr_golsd.yaml").space
    assert set(space) == {
        *("model.reg_max", "model.reg_scale", "model.up", "model.numerics"),
        *("loss.ddf", "loss.fgl", "loss.ddf_temperature"),
    }
    bins = {random_point({"bins": space["model.reg_max"]}, seed)["bins"] for seed in range(500)}
    assert bins == set(range(8, 65, 2))
