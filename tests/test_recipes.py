"""Recipes: published values for the keys that an experiment leaves out, and nothing for those that it gives."""

from typing import Any

import pytest

from pipeline.config import ConfigError, Experiment
from pipeline.config_files import check, dump, flatten
from pipeline.recipes import DEIM, DEIM_BY_VARIANT

COCO_IMAGES = 118_287


def experiment(**content: Any) -> Experiment:
    return check(Experiment, {"data": {"train": "a"}, "schedule": {"epochs": 58}, **content}, source="test")


@pytest.mark.parametrize(
    ("variant", "lr", "backbone_lr", "decay", "floor"),
    [
        ("n", 8e-4, 4e-4, 1e-4, 1.0),
        ("s", 4e-4, 2e-4, 1e-4, 0.5),
        ("m", 4e-4, 4e-5, 1e-4, 0.5),
        ("l", 5e-4, 2.5e-5, 1.25e-4, 0.5),
        ("x", 5e-4, 5e-6, 1.25e-4, 0.5),
    ],
)
def test_deim_has_its_published_values(variant: str, lr: float, backbone_lr: float, decay: float, floor: float) -> None:
    resolved = experiment(recipe="deim", model={"variant": variant})
    optimizer = resolved.optimizer
    assert (optimizer.lr, optimizer.backbone_lr, optimizer.weight_decay) == (lr, backbone_lr, decay)
    assert (resolved.schedule.shape, resolved.schedule.min_lr_ratio) == ("flat_cosine", floor)
    assert (resolved.schedule.warmup_power, optimizer.param_groups) == (2, "deim")
    config = resolved.model.config(80, resolved.loss)
    assert (config.activation, config.freeze_at, config.freeze_norm) == ("silu", -1, False)
    assert (config.loss.classification, config.loss.mal_gamma, config.loss.mal_alpha) == ("mal", 1.5, None)
    assert (resolved.augment.mosaic_probability, resolved.augment.mixup_probability) == (0.5, 0.5)


def test_every_value_of_the_recipe_is_in_the_resolved_experiment_and_gives_way_to_the_users() -> None:
    variant = "l"
    table = flatten({**{s: dict(v) for s, v in DEIM.items()}})
    for section, values in DEIM_BY_VARIANT[variant].items():
        table |= flatten({section: values})
    assert len(table) >= 10
    plain = flatten(dump(experiment(model={"variant": variant})))
    resolved = flatten(dump(experiment(recipe="deim", model={"variant": variant})))
    assert {key: resolved[key] for key in table} == table
    changed = {key for key in resolved if resolved[key] != plain[key]}
    assert changed == {*table, "recipe", "model.activation"}

    for key in table:  # the value of the other recipe, given by the user
        section, name = key.split(".")
        given = {"model": {"variant": variant}} | {section: {name: _other(plain[key], key)}}
        if section == "model":
            given["model"]["variant"] = variant
        if section == "schedule":
            given["schedule"]["epochs"] = 58
        assert (
            flatten(dump(experiment(recipe="deim", **given)))[key]
            == flatten({"given": _other(plain[key], key)})["given"]
        )


def _other(plain: Any, key: str) -> Any:
    """The value without the recipe; another one where that follows from the variant or the length."""
    others: dict[str, Any] = {
        "optimizer.lr": 3e-4,
        "optimizer.backbone_lr": 3e-5,
        "optimizer.weight_decay": 0.5,
        "schedule.shape": "constant",
        "schedule.stages": [0.1, 0.5, 0.9],
    }
    return others.get(key, plain)


def test_a_resolved_experiment_resolves_to_itself() -> None:
    once = experiment(recipe="deim", model={"variant": "m"})
    assert check(Experiment, dump(once), source="again") == once


def test_the_activation_is_left_to_initial_weights() -> None:
    assert experiment(recipe="deim").model.activation == "silu"
    assert experiment().model.activation == "relu"
    assert experiment(recipe="deim", init="weights.pth").model.activation is None
    assert experiment(recipe="deim", init="weights.pth", model={"activation": "silu"}).model.activation == "silu"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"recipe": "detr"}, "recipe: .*'dfine' or 'deim'"),
        ({"recipe": "deim", "model": {"variant": "z"}}, "model.variant"),
        ({"recipe": "deim", "model": "s"}, "model: "),
        ({"recipe": "deim", "loss": {"zzz": 1}}, "loss: unknown key 'zzz'"),
        ({"recipe": ["deim"]}, "recipe: "),
    ],
)
def test_wrong_values_beside_a_recipe_are_named(content: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        experiment(**content)
