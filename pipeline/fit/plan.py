"""The experiment of a fit, as the YAML file that `dfine train` takes, too."""

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.config import Experiment
from pipeline.config_files import as_yaml, check, with_values
from pipeline.data.shards.manifest import ShardSet
from pipeline.fit.choices import Choice, WeightsChoice
from pipeline.hub import PretrainedError
from pipeline.pretrained import fetch

RUN_NAME = "training"  # below the folder of the fit
PUBLISHED = {"n": "dfine-n-coco"}  # N has no Objects365 weights


def available_weights(variant: str) -> WeightsChoice:
    """Fetch the published weights of a variant; where they cannot be had, one sentence says so."""
    name = PUBLISHED.get(variant, f"dfine-{variant}-obj365")
    try:
        fetch(name)
    except PretrainedError as error:
        print(f"{error}; training starts from scratch", flush=True)
        return WeightsChoice(None, "from scratch: published weights cannot be had here")
    return WeightsChoice(name, "published weights make a small data set do")


def refuse_wrong_values(out: str, given: Mapping[str, Any]) -> None:
    """Check the user's values before anything slow.

    Raises:
        ConfigError: with every problem.
    """
    check(Experiment, with_values(_frame(out, out, out), _with_length(given)), source="dfine fit")


def experiment_yaml(
    out: str, train: ShardSet, val: ShardSet, choices: Sequence[Choice], given: Mapping[str, Any]
) -> str:
    """Text of the experiment file, with the reasons as comments."""
    values = {choice.key: choice.value for choice in choices if choice.value is not None}
    content = with_values(_frame(out, train.uri, val.uri), {**values, **given})
    check(Experiment, content, source="dfine fit")
    reasons = [f"#   {choice.key}: {choice.reason}" for choice in choices]
    head = [
        "# Written by dfine fit. Change what you like, and give the run another name:",
        "#     dfine train THIS --name NAME",
    ]
    return "\n".join([*head, *reasons, as_yaml(content)])


def _frame(out: str, train: str, val: str) -> dict[str, Any]:
    return {"name": RUN_NAME, "storage": out, "data": {"train": train, "val": val}}


def _with_length(given: Mapping[str, Any]) -> dict[str, Any]:
    """The values with a length, which is chosen later unless it is given."""
    has_length = {"schedule.steps", "schedule.epochs"} & given.keys()
    return dict(given) if has_length else {**given, "schedule.epochs": 1}
