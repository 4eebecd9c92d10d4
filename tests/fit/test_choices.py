"""Choices of a fit: each follows from the data and the machine, and gives way to the user's own value."""

from dataclasses import replace
from typing import Any

import pytest

from dfine_core import ModelConfig
from pipeline.config import Experiment
from pipeline.config_files import check, with_values
from pipeline.data.doctor.examine import DoctorReport, SplitReport
from pipeline.data.doctor.row_checks import SIDE_EDGES
from pipeline.fit.choices import CPU_HOURS, Choice, WeightsChoice, choose, table
from pipeline.fit.machine import DataFacts, Machine, data_facts, this_machine
from pipeline.fit.values import frame

CPU = Machine(gpu=None, gpus=0, gpu_gib=0, cores=4, memory_gib=16)
GPU = Machine(gpu="A100", gpus=1, gpu_gib=40, cores=16, memory_gib=64)
FEW = DataFacts(images=200, val_images=50, classes=3, boxes_per_image=5, most_boxes=20, small_side=40)


def chosen(
    facts: DataFacts = FEW,
    machine: Machine = GPU,
    given: dict[str, Any] | None = None,
    *,
    weights: str | None = "published",
    seconds: float = 0.01,
) -> dict[str, Choice]:
    choices = choose(
        facts,
        machine,
        given or {},
        weights=lambda variant: WeightsChoice(weights and f"{weights}-{variant}", "reason"),
        seconds_per_image=lambda config: seconds,
    )
    assert all(choice.reason for choice in choices)
    return {choice.key: choice for choice in choices}


@pytest.mark.parametrize(
    ("facts", "machine", "key", "value"),
    [
        (FEW, CPU, "model.variant", "n"),
        (FEW, replace(GPU, gpu_gib=4), "model.variant", "n"),
        (FEW, GPU, "model.variant", "s"),
        (replace(FEW, images=20_000), GPU, "model.variant", "m"),
        (replace(FEW, images=20_000), replace(GPU, gpu_gib=8), "model.variant", "s"),
        (FEW, GPU, "model.input_size", [640, 640]),
        (FEW, CPU, "model.input_size", [320, 320]),  # 40 px at 640 are 20 at 320
        (replace(FEW, small_side=16), CPU, "model.input_size", [512, 512]),
        (replace(FEW, small_side=3), CPU, "model.input_size", [640, 640]),
        (FEW, GPU, "model.num_queries", 300),
        (replace(FEW, most_boxes=500), GPU, "model.num_queries", 600),
        (FEW, GPU, "schedule.global_batch_size", 8),
        (replace(FEW, images=5), GPU, "schedule.global_batch_size", 5),
        (replace(FEW, images=4000), GPU, "schedule.global_batch_size", 16),
        (FEW, GPU, "schedule.epochs", 36),  # 900 steps of 8 images
        (replace(FEW, images=4000), GPU, "schedule.epochs", 10),
        (FEW, GPU, "evaluation.every_epochs", 3),
        (FEW, GPU, "optimizer.lr", 4e-4),
        (replace(FEW, images=4000), GPU, "optimizer.lr", 8e-4),
    ],
)
def test_a_value_follows_from_data_and_machine(facts: DataFacts, machine: Machine, key: str, value: object) -> None:
    assert chosen(facts, machine)[key].value == value


def test_without_weights_the_training_is_longer_and_its_backbone_learns_as_fast() -> None:
    scratch = chosen(weights=None)
    assert scratch["init"].value is None
    assert scratch["schedule.epochs"].value == 100
    assert scratch["optimizer.backbone_lr"].value == scratch["optimizer.lr"].value
    warm = chosen()
    assert warm["init"].value == "published-s"
    assert warm["optimizer.backbone_lr"].value == warm["optimizer.lr"].value / 2


def test_on_a_cpu_the_training_fits_into_its_hours_and_the_table_says_what_would_be_better() -> None:
    choice = chosen(machine=CPU, weights=None, seconds=1.0)["schedule.epochs"]
    assert choice.value * FEW.images * 1.0 / 3600 <= CPU_HOURS < (choice.value + 1) * FEW.images * 1.0 / 3600
    assert "100 would be better and take 5.6 hours" in choice.reason
    assert chosen(machine=CPU, weights=None, seconds=0.01)["schedule.epochs"].value == 100


def test_given_values_are_kept_and_the_others_follow_from_them() -> None:
    given = {"model.variant": "n", "model.input_size": [160, 160], "schedule.global_batch_size": 4, "init": None}
    choices = chosen(given=given)
    for key, value in given.items():
        assert (choices[key].value, choices[key].reason) == (value, "as given")
    assert choices["model.num_queries"].value == 10 * 10 + 5 * 5  # N looks at strides 16 and 32
    assert choices["optimizer.base_batch_size"].value == 4
    ModelConfig.variant("n", num_classes=3, input_size=(160, 160), num_queries=125)
    assert not {"schedule.epochs", "evaluation.every_epochs"} & chosen(given={"schedule.steps": 7}).keys()


@pytest.mark.parametrize("machine", [CPU, GPU])
@pytest.mark.parametrize("images", [2, 200, 100_000])
def test_every_choice_is_a_valid_experiment(machine: Machine, images: int) -> None:
    choices = chosen(replace(FEW, images=images), machine)
    values = {choice.key: choice.value for choice in choices.values()} | {"init": None}
    experiment = check(Experiment, with_values(frame("/out", "/train", "/val"), values), source="test")
    assert experiment.model.variant == choices["model.variant"].value
    lines = table(list(choices.values())).splitlines()
    assert len(lines) == len(choices)
    assert all(choice.reason in line for choice, line in zip(choices.values(), lines, strict=True))


def test_the_small_side_is_one_that_nine_tenths_of_the_boxes_reach() -> None:
    sides = [0] * (len(SIDE_EDGES) - 1)
    sides[10], sides[20] = 10, 90
    part = {"images": 7, "categories": ("a", "b"), "statistics": None, "scaled_sides": tuple(sides)}
    split = SplitReport.model_construct(**part)
    facts = data_facts(DoctorReport.model_construct(decoded=True, splits=(split, split), findings=()))
    assert facts.small_side == SIDE_EDGES[20]
    assert (facts.images, facts.classes) == (7, 2)


def test_this_machine_has_cores_and_memory() -> None:
    machine = this_machine()
    assert machine.cores >= 1
    assert machine.memory_gib > 0
    assert ("no GPU" in str(machine)) == (machine.gpu is None)
