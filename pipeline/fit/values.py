"""The user's values for a fit, checked before anything slow is imported."""

from collections.abc import Mapping
from typing import Any

from pipeline.config import Experiment
from pipeline.config_files import check, with_values

RUN_NAME = "training"  # below the folder of the fit


def frame(out: str, train: str, val: str) -> dict[str, Any]:
    """Values of every fit: where its data and its run are."""
    return {"name": RUN_NAME, "storage": out, "data": {"train": train, "val": val}}


def refuse_wrong_values(out: str, given: Mapping[str, Any]) -> None:
    """Check values of the experiment by dotted key; what is left to be chosen may be missing.

    Raises:
        ConfigError: with every problem.
    """
    left = {"model.num_queries": 1}  # any number that fits every input size
    if not {"schedule.steps", "schedule.epochs"} & given.keys():
        left["schedule.epochs"] = 1
    check(Experiment, with_values(frame(out, out, out), {**left, **given}), source="dfine fit")
