"""The choices that `dfine fit` makes: one value with its reason for each key of the experiment.

Every rule is a function of the data, of the machine and of the choices before it. A value that the user has given is taken as
it is, and the rules after it follow from it.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dfine_core import ModelConfig
from pipeline.fit.machine import REFERENCE_SIDE, DataFacts, Machine
from pipeline.wording import plural

# Sizes, from the smallest that a rule may choose to the one that published weights were trained at.
CPU_SIDES = (320, 416, 512, 640)
GPU_SIDE = 640
LEAST_BOX_SIDE = 12.0  # px in the network's input that nine tenths of the boxes should reach
LARGE_SET, LARGE_GPU_GIB, SMALL_GPU_GIB = 5000, 15.0, 5.0  # images, GiB
SMALL_BATCH, LARGE_BATCH, LARGE_BATCH_SET = 8, 16, 2000  # images
STEPS = {True: 900, False: 2500}  # optimizer steps of a short training, with published weights and from scratch
EPOCHS = {True: (10, 60), False: (30, 150)}  # least and most
CPU_HOURS = 2.0  # on a CPU no more epochs are chosen than fit in this time
EVALUATIONS = 10  # over the run
QUERIES = 300


@dataclass(frozen=True)
class Choice:
    """Value of one key, and why."""

    key: str
    value: Any
    reason: str


@dataclass(frozen=True)
class WeightsChoice:
    """Initial weights, or the reason why there are none."""

    name: str | None
    reason: str


def choose(
    facts: DataFacts,
    machine: Machine,
    given: Mapping[str, Any],
    *,
    weights: Callable[[str], WeightsChoice],
    seconds_per_image: Callable[[ModelConfig], float],
) -> list[Choice]:
    """Choose every value of the experiment that depends on data and machine.

    Args:
        given: values of the user by dotted key; they are taken as they are.
        weights: finds the initial weights of a variant.
        seconds_per_image: measures a training step of one image on this machine; asked on a CPU alone.
    """
    chosen: dict[str, Choice] = {}

    def take(key: str, rule: Callable[[], tuple[Any, str]]) -> Any:
        value, reason = (given[key], "as given") if key in given else rule()
        chosen[key] = Choice(key, value, reason)
        return value

    # 1. The detector, and what it starts from.
    variant = take("model.variant", lambda: _variant(facts, machine))
    side = take("model.input_size", lambda: _input_size(facts, machine))
    take("model.num_queries", lambda: _queries(facts, variant, side))
    found = WeightsChoice(given["init"], "as given") if "init" in given else weights(variant)
    chosen["init"] = Choice("init", found.name, found.reason)
    warm = found.name is not None

    # 2. Steps: their size, their number, their rates.
    batch = take("schedule.global_batch_size", lambda: _batch(facts))
    if "schedule.steps" not in given:
        queries = chosen["model.num_queries"].value
        config = ModelConfig.variant(
            variant, num_classes=facts.classes, input_size=(side[0], side[1]), num_queries=queries
        )
        epochs = take(
            "schedule.epochs", lambda: _epochs(facts, machine, batch, warm, lambda: seconds_per_image(config))
        )
        take("evaluation.every_epochs", lambda: (max(1, epochs // EVALUATIONS), f"about {EVALUATIONS} evaluations"))
    rate = 4e-4 if warm else 8e-4
    why = (
        "short trainings need twice the published rate"
        if warm
        else "from scratch the backbone learns as fast as the rest"
    )
    take("optimizer.lr", lambda: (rate * batch / SMALL_BATCH, why))
    take("optimizer.backbone_lr", lambda: ((rate / 2 if warm else rate) * batch / SMALL_BATCH, why))
    take("optimizer.base_batch_size", lambda: (batch, "the rates above are those of this batch"))
    take("schedule.min_lr_ratio", lambda: (0.05, "a cosine helps short trainings"))
    if machine.gpu is None:
        take("numerics.channels_last", lambda: (True, "faster on a CPU"))
    elif side[0] == side[1]:
        take("base_size_repeat", lambda: (20, "a little multi-scale training, as in the published recipe of S"))
    return list(chosen.values())


def table(choices: list[Choice]) -> str:
    """One line per choice: key, value, reason."""
    rows = [(choice.key, _shown(choice.value), choice.reason) for choice in choices]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    return "\n".join(f"  {key:{widths[0]}}  {value:{widths[1]}}  {reason}" for key, value, reason in rows)


def _shown(value: Any) -> str:
    if value is None:
        return "none"
    return f"{value:g}" if isinstance(value, float) else f"{value}"


def _variant(facts: DataFacts, machine: Machine) -> tuple[str, str]:
    if machine.gpu is None:
        return "n", "the smallest one: there is no GPU"
    if machine.gpu_gib < SMALL_GPU_GIB:
        return "n", f"the smallest one: the GPU has {machine.gpu_gib:.0f} GiB"
    if facts.images >= LARGE_SET and machine.gpu_gib >= LARGE_GPU_GIB:
        return "m", f"{facts.images:,} images are enough for it, and the GPU has {machine.gpu_gib:.0f} GiB"
    return "s", f"good for {plural(facts.images, 'image')}, and fast"


def _input_size(facts: DataFacts, machine: Machine) -> tuple[list[int], str]:
    if machine.gpu is not None:
        return [GPU_SIDE, GPU_SIDE], "the size of the published weights"
    sides = {side: facts.small_side * side / REFERENCE_SIDE for side in CPU_SIDES}
    side = next((side for side, small in sides.items() if small >= LEAST_BOX_SIDE), CPU_SIDES[-1])
    return [side, side], f"on a CPU as small as the boxes allow: nine in ten are {sides[side]:.0f} px or larger"


def _queries(facts: DataFacts, variant: str, side: Sequence[int]) -> tuple[int, str]:
    positions = _positions(variant, side)
    if positions < QUERIES:
        return positions, f"the input has {positions} positions"
    if facts.most_boxes > QUERIES:
        number = min(math.ceil(1.2 * facts.most_boxes / 100) * 100, positions)
        return number, f"one image has {facts.most_boxes} boxes"
    return QUERIES, f"as published; the fullest image has {plural(facts.most_boxes, 'box')}"


def _batch(facts: DataFacts) -> tuple[int, str]:
    if facts.images < SMALL_BATCH:
        return facts.images, "all images"
    if facts.images < LARGE_BATCH_SET:
        return SMALL_BATCH, f"{plural(facts.images, 'image')}: small batches give more steps"
    return LARGE_BATCH, f"{plural(facts.images, 'image')} give enough steps"


def _epochs(
    facts: DataFacts, machine: Machine, batch: int, warm: bool, seconds: Callable[[], float]
) -> tuple[int, str]:
    least, most = EPOCHS[warm]
    epochs = min(max(math.ceil(STEPS[warm] * batch / facts.images), least), most)
    start = "published weights" if warm else "from scratch"
    reason = f"{epochs * (facts.images // batch):,} steps, {start}"
    if machine.gpu is not None:
        return epochs, reason
    hours = epochs * facts.images * seconds() / 3600
    if hours <= CPU_HOURS:
        return epochs, f"{reason}; about {_duration(hours)} on {machine.cores} cores"
    fitting = max(1, math.floor(epochs * CPU_HOURS / hours))
    return fitting, (
        f"as many as fit in {_duration(fitting * hours / epochs)} on {machine.cores} cores; {epochs} would be better"
        f" and take {_duration(hours)}"
    )


def _duration(hours: float) -> str:
    return f"{hours:.1f} hours" if hours >= 1 else f"{max(1, round(60 * hours))} minutes"


def _positions(variant: str, side: Sequence[int]) -> int:
    """Positions in all feature maps, the most queries that can be chosen."""
    strides = ModelConfig.variant(variant, num_classes=1).strides
    return sum((side[0] // stride) * (side[1] // stride) for stride in strides)
