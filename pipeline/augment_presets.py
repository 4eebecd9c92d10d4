"""Presets of the augmentation by the kind of images: values that `augment` takes for keys that an experiment leaves out.

`augment_presets.yaml` holds them, each value with its reason.
"""

from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import Any

from pipeline.text_files import load_yaml


@cache
def presets() -> dict[str, dict[str, Any]]:
    """Settings of every preset by its name."""
    table: dict[str, dict[str, Any]] = load_yaml(
        resources.files("pipeline").joinpath("augment_presets.yaml").read_text()
    )
    return table


def with_preset(experiment: Mapping[str, Any]) -> dict[str, Any]:
    """Copy plain values of an experiment, with the preset's values for all keys of `augment` that it leaves out.

    Wrong values stay as they are, for the check that follows.
    """
    augment = experiment.get("augment")
    name = augment.get("preset") if isinstance(augment, Mapping) else None
    if not isinstance(augment, Mapping) or not isinstance(name, str) or name not in presets():
        return dict(experiment)
    missing = {key: value for key, value in presets()[name].items() if augment.get(key) is None}
    return {**experiment, "augment": {**augment, **missing}}
