"""The experiment of a fit, as the YAML file that `dfine train` takes, too."""

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.config import Experiment
from pipeline.config_files import as_yaml, check, with_values
from pipeline.data.shards.manifest import ShardSet
from pipeline.fit.choices import Choice, WeightsChoice
from pipeline.fit.values import frame
from pipeline.hub import PretrainedError
from pipeline.pretrained import fetch

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


def experiment_yaml(
    out: str, train: ShardSet, val: ShardSet, choices: Sequence[Choice], given: Mapping[str, Any]
) -> str:
    """Text of the experiment file, with the reasons as comments."""
    values = {choice.key: choice.value for choice in choices if choice.value is not None}
    content = with_values(frame(out, train.uri, val.uri), {**values, **given})
    check(Experiment, content, source="dfine fit")
    reasons = [f"#   {choice.key}: {choice.reason}" for choice in choices]
    head = [
        "# Written by dfine fit. Change what you like, and give the run another name:",
        "#     dfine train THIS --name NAME",
    ]
    return "\n".join([*head, *reasons, as_yaml(content)])
