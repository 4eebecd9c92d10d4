"""Experiment and cluster files: what is taken, and what is said about what is not."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.config import Cluster, ConfigError, Experiment
from pipeline.config_files import check, dump, flatten, load_cluster, load_experiment, parse_override

MINIMAL: dict[str, Any] = {"data": {"train": "somewhere"}, "schedule": {"epochs": 12}}


def written(folder: Path, content: Any) -> Path:
    path = folder / "mine.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return path


def test_every_problem_is_in_one_error_with_its_key_and_a_way_out(tmp_path: Path) -> None:
    wrong = {
        "data": {"train": "a", "vall": "b"},
        "model": {"variant": "s", "reg_max": 17, "encodr_dim": 3},
        "schedule": {"epochs": 3, "no_aug_epochs": 5},
        "loss": {"fggl": 2},
        "optimizer": {"lr": "abc"},
        "augmnt": 3,
    }
    with pytest.raises(ConfigError) as raised:
        load_experiment(written(tmp_path, wrong), {"numerics.compile": "maybe"})
    text = str(raised.value)
    for part in (
        "7 problems",
        "data: unknown key 'vall'; did you mean val?",
        "did you mean encoder_dim",
        "reg_max (17) must be an even number",
        "no_aug_epochs (5) must lie in 0..epochs (3)",
        "loss: unknown key 'fggl'; did you mean fgl?",
        "optimizer.lr: ",
        "it is 'abc'",
        "numerics.compile: ",
        "unknown key 'augmnt'; did you mean augment?",
    ):
        assert part in text, part


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("data: {train: a}\ndata: {train: b}\nschedule: {epochs: 1}", "data is given twice"),
        ("- a\n- b", "expected keys with values"),
        ("a: [1", "not readable as YAML"),
        ({**MINIMAL, "schedule": {"epochs": 1, "steps": 1}}, "either epochs or steps"),
        ({**MINIMAL, "schedule": {}}, "either epochs or steps"),
        ({**MINIMAL, "model": {"num_classes": 3}}, "num_classes comes from the data"),
        ({**MINIMAL, "name": "../outside"}, "becomes a folder"),
        ({**MINIMAL, "base_size_repeat": 3, "model": {"input_size": [320, 640]}}, "needs a square input_size"),
        ({**MINIMAL, "augment": {"flip_probability": 2}}, "flip_probability (2"),
        ({**MINIMAL, "augment": {"flip_prob": 1}}, "augment: unknown key 'flip_prob'; did you mean flip_probability"),
        ({**MINIMAL, "loss": {"zzz": 1}}, "loss: unknown key 'zzz'; known: vfl, bbox, giou, fgl"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path: Path, content: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said.replace("(", r"\(")):
        load_experiment(written(tmp_path, content))


@pytest.mark.parametrize(
    ("tracking", "said"),
    [
        ({"alias": "champion"}, "tracking: alias 'champion' belongs to a registered model"),
        *(
            ({"registered_model_name": name}, f"{name!r} cannot be the name of a registered model")
            for name in ("", " ", "a/b", "a:b", "it's", 'a"b', "a\\b", "a@b", "..", "x" * 257)
        ),
        *(
            ({"registered_model_name": "shapes", "alias": alias}, f"{alias!r} cannot be the alias of a model")
            for alias in ("", "best one", "v1", "V12", "latest", "Latest", "it's", "a/b", "x" * 256)
        ),
        *(({"experiment": name}, "cannot be the name of an MLflow experiment") for name in ("", "x" * 501)),
    ],
)
def test_names_that_mlflow_would_refuse_at_the_end_are_refused_before_the_start(
    tmp_path: Path, tracking: dict[str, str], said: str
) -> None:
    with pytest.raises(ConfigError) as raised:
        load_experiment(written(tmp_path, MINIMAL | {"tracking": tracking}))
    assert said in str(raised.value)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no such file"):
        load_experiment(tmp_path / "none.yaml")


def test_overrides_reach_any_depth_and_numbers_are_read_as_numbers(tmp_path: Path) -> None:
    overrides = dict(map(parse_override, ["optimizer.lr=1e-4", "model.variant=n", "loss.ddf=0.5", "name=other"]))
    experiment = load_experiment(written(tmp_path, MINIMAL), overrides)
    assert experiment.optimizer.lr == 1e-4
    assert experiment.loss.ddf == 0.5
    assert experiment.name == "other"
    config = experiment.model.config(5, experiment.loss)
    assert (config.encoder_dim, config.num_classes, config.loss.ddf) == (128, 5, 0.5)


@pytest.mark.parametrize(("text", "said"), [("epochs", "KEY=VALUE"), ("=3", "KEY=VALUE")])
def test_an_override_without_a_key_is_refused(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse_override(text)


def test_an_override_below_a_value_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="seed is a value"):
        load_experiment(written(tmp_path, {**MINIMAL, "seed": 1}), {"seed.low": 2})


def test_a_dumped_experiment_is_read_back_the_same(tmp_path: Path) -> None:
    experiment = load_experiment(written(tmp_path, {**MINIMAL, "model": {"variant": "l", "reg_max": 16}}))
    again = check(Experiment, yaml.safe_load(yaml.safe_dump(dump(experiment))), source="dump")
    assert again == experiment
    flat = flatten(dump(experiment))
    assert flat["model.reg_max"] == 16
    assert flat["model.num_layers"] == 6
    assert flat["loss.fgl"] == 0.15


def test_the_name_is_the_files(tmp_path: Path) -> None:
    assert load_experiment(written(tmp_path, MINIMAL)).name == "mine"


def test_a_cluster_has_defaults_and_refuses_nonsense(tmp_path: Path) -> None:
    assert load_cluster(None) == Cluster()
    assert load_cluster(written(tmp_path, {"workers": [2, 8]})).workers == (2, 8)
    with pytest.raises(ConfigError, match="least, most"):
        load_cluster(written(tmp_path, {"workers": [8, 2]}))


def test_every_shipped_experiment_and_cluster_is_valid() -> None:
    configs = Path(__file__).parent.parent / "configs"
    clusters = sorted((configs / "clusters").glob("*.yaml"))
    experiments = sorted(path for path in configs.rglob("d*_?*.yaml") if path.stem.split("_")[0] in ("dfine", "deim"))
    assert len(experiments) >= 34
    for path in experiments:
        experiment = load_experiment(path)
        assert path.stem.startswith(f"{experiment.recipe}_{experiment.model.variant}"), path
    for path in configs.glob("*.yaml"):
        assert f"configs/{path.name}" in path.read_text() or "make" in path.read_text(), "no command to run it"
        load_experiment(path)
    ours = [
        path for path in clusters if "apiVersion" not in path.read_text() and "cluster_name" not in path.read_text()
    ]
    assert len(ours) >= 3
    for path in ours:
        load_cluster(path)


def test_the_switch_for_compilation_has_words_now(tmp_path: Path) -> None:
    for given, found in ((False, "off"), ("off", "off"), ("step", "step")):
        assert load_experiment(written(tmp_path, MINIMAL), {"numerics.compile": given}).numerics.compile == found
    with pytest.raises(ConfigError, match=r"numerics\.compile: .*write step"):
        load_experiment(written(tmp_path, MINIMAL), {"numerics.compile": True})
