"""Training recipes: the values that an experiment takes for keys that its file leaves out.

D-FINE's recipe is the defaults of `config.py`. DEIM's trains the same network in fewer epochs: another classification loss, more
boxes per image in a window of epochs, twice the learning rate, and batch norms of the backbone that learn in all sizes. What
depends on the length of the run is in `pipeline/training/schedule.py`.

Sources: D-FINE, arXiv:2410.13842; DEIM, arXiv:2412.04234, and its released configurations.
"""

from collections.abc import Mapping
from typing import Any, Literal

Recipe = Literal["dfine", "deim"]

ACTIVATION = {"dfine": "relu", "deim": "silu"}  # without initial weights of a detector
WARMUP_STEPS = {"dfine": 500, "deim": 2000}  # at the published batch, and at most a tenth of the run

DEIM: dict[str, dict[str, Any]] = {
    "model": {"freeze_at": -1, "freeze_norm": False},
    "loss": {"classification": "mal"},
    "schedule": {"shape": "flat_cosine", "warmup_power": 2, "min_lr_ratio": 0.5, "stages": "deim"},
    "optimizer": {"param_groups": "deim"},
    "augment": {"mosaic_probability": 0.5, "mixup_probability": 0.5},
}
DEIM_BY_VARIANT: dict[str, dict[str, dict[str, Any]]] = {
    "n": {"schedule": {"min_lr_ratio": 1.0}, "optimizer": {"lr": 8e-4, "backbone_lr": 4e-4, "weight_decay": 1e-4}},
    "s": {"optimizer": {"lr": 4e-4, "backbone_lr": 2e-4, "weight_decay": 1e-4}},
    "m": {"optimizer": {"lr": 4e-4, "backbone_lr": 4e-5, "weight_decay": 1e-4}},
    "l": {"optimizer": {"lr": 5e-4, "backbone_lr": 2.5e-5, "weight_decay": 1.25e-4}},
    "x": {"optimizer": {"lr": 5e-4, "backbone_lr": 5e-6, "weight_decay": 1.25e-4}},
}


def with_recipe(experiment: Mapping[str, Any]) -> dict[str, Any]:
    """Copy plain values of an experiment, with the recipe's values for all keys that it leaves out.

    The activation is filled in where no initial weights decide it. Wrong values stay as they are, for the check that follows.
    """
    recipe = str(experiment.get("recipe", "dfine"))
    model = experiment.get("model") or {}
    variant = str(model.get("variant", "s")) if isinstance(model, Mapping) else ""
    filled = dict(experiment)
    if recipe == "deim" and variant in DEIM_BY_VARIANT:
        for values in (DEIM_BY_VARIANT[variant], DEIM):
            _fill(filled, values)
    if recipe in ACTIVATION and not experiment.get("init"):
        _fill(filled, {"model": {"activation": ACTIVATION[recipe]}})
    return filled


def _fill(experiment: dict[str, Any], values: Mapping[str, Mapping[str, Any]]) -> None:
    for section, keys in values.items():
        given = experiment.get(section)
        given = {} if given is None else given
        if isinstance(given, Mapping):
            missing = {key: value for key, value in keys.items() if given.get(key) is None}
            experiment[section] = {**given, **missing}
