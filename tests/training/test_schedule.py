"""What follows from the length of a run."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config import ConfigError, Experiment
from pipeline.config_files import check, load_experiment
from pipeline.training.schedule import derive, left_out, recipe_stages, shared_micro_batch
from tests.support import recorded

CONFIGS = Path(__file__).parents[2] / "configs"
COCO, OBJECTS365 = 118_287, 1_817_287  # images


def experiment(**schedule: int) -> Experiment:
    return check(Experiment, {"data": {"train": "a"}, "model": {"variant": "s"}, "schedule": schedule}, source="test")


@pytest.mark.parametrize(
    ("file", "images", "epochs", "stage_two", "batch", "lr", "backbone_lr", "decay", "warmup", "ema_warmup"),
    [  # the published table of recipes
        ("coco/dfine_n.yaml", COCO, 160, 148, 128, 8e-4, 4e-4, 1e-4, 500, 1000),
        ("coco/dfine_s.yaml", COCO, 132, 120, 32, 2e-4, 1e-4, 1e-4, 500, 1000),
        ("coco/dfine_m.yaml", COCO, 132, 120, 32, 2e-4, 2e-5, 1e-4, 500, 1000),
        ("coco/dfine_l.yaml", COCO, 80, 72, 32, 2.5e-4, 1.25e-5, 1.25e-4, 500, 1000),
        ("coco/dfine_x.yaml", COCO, 80, 72, 32, 2.5e-4, 2.5e-6, 1.25e-4, 500, 1000),
        ("objects365/dfine_n.yaml", OBJECTS365, 48, None, 128, 8e-4, 4e-4, 1e-4, 500, 1000),
        ("objects365/dfine_s.yaml", OBJECTS365, 36, None, 32, 2.5e-4, 1.25e-4, 1.25e-4, 500, 1000),
        ("objects365/dfine_m.yaml", OBJECTS365, 36, None, 32, 2.5e-4, 2.5e-5, 1.25e-4, 500, 1000),
        ("objects365/dfine_l.yaml", OBJECTS365, 24, None, 32, 2.5e-4, 1.25e-5, 1.25e-4, 500, 1000),
        ("objects365/dfine_x.yaml", OBJECTS365, 24, None, 32, 2.5e-4, 2.5e-6, 1.25e-4, 500, 1000),
        ("objects365_to_coco/dfine_n.yaml", COCO, 64, 56, 128, 8e-4, 4e-4, 1e-4, 0, 0),
        ("objects365_to_coco/dfine_s.yaml", COCO, 64, 56, 32, 2.5e-4, 1.25e-4, 1.25e-4, 0, 0),
        ("objects365_to_coco/dfine_m.yaml", COCO, 56, 48, 32, 2.5e-4, 2.5e-5, 1.25e-4, 0, 0),
        ("objects365_to_coco/dfine_l.yaml", COCO, 36, 30, 32, 2.5e-4, 1.25e-5, 1.25e-4, 0, 0),
        ("objects365_to_coco/dfine_x.yaml", COCO, 36, 30, 32, 2.5e-4, 2.5e-6, 1.25e-4, 0, 0),
        ("custom/dfine_n.yaml", COCO, 220, 200, 128, 8e-4, 4e-4, 1e-4, 500, 1000),
        ("custom/dfine_s.yaml", COCO, 220, 200, 64, 4e-4, 2e-4, 1e-4, 500, 1000),
        ("custom/dfine_m.yaml", COCO, 132, 120, 32, 2.5e-4, 2.5e-5, 1.25e-4, 500, 1000),
        ("custom/dfine_l.yaml", COCO, 80, 72, 32, 2.5e-4, 1.25e-5, 1.25e-4, 500, 1000),
        ("custom/dfine_x.yaml", COCO, 80, 72, 32, 2.5e-4, 2.5e-6, 1.25e-4, 500, 1000),
    ],
)
def test_the_recipes_are_the_published_ones(
    file: str,
    images: int,
    epochs: int,
    stage_two: int | None,
    batch: int,
    lr: float,
    backbone_lr: float,
    decay: float,
    warmup: int,
    ema_warmup: int,
) -> None:
    recipe = load_experiment(CONFIGS / file)
    schedule = derive(recipe, images=images, workers=4)
    assert (schedule.epochs, schedule.strong_epochs, schedule.global_batch_size) == (epochs, stage_two, batch)
    optimizer = schedule.optimizer
    assert (optimizer.lr, optimizer.backbone_lr, optimizer.weight_decay) == pytest.approx((lr, backbone_lr, decay))
    assert (schedule.warmup_steps, schedule.ema_warmup_steps) == (warmup, ema_warmup)
    expected_decay = 0.9998 if file in ("coco/dfine_x.yaml", "custom/dfine_x.yaml") else 0.9999
    assert schedule.ema_decay == pytest.approx(expected_decay, abs=1e-9)
    repeat = {"n": 0, "s": 20, "m": 6, "l": 4, "x": 3}[recipe.model.variant]
    if file == "objects365_to_coco/dfine_s.yaml":
        repeat = 10
    assert recipe.base_size_repeat == repeat


def test_rates_and_warm_ups_follow_the_batch() -> None:
    usual = derive(experiment(epochs=100), images=100_000, workers=1)
    twice = derive(experiment(epochs=100, global_batch_size=64), images=100_000, workers=1)
    assert twice.optimizer.lr == pytest.approx(2 * usual.optimizer.lr)
    assert twice.optimizer.backbone_lr == pytest.approx(2 * usual.optimizer.backbone_lr)
    assert (twice.warmup_steps, twice.ema_warmup_steps) == (250, 500)
    assert 1 - twice.ema_decay == pytest.approx(2 * (1 - usual.ema_decay))


def test_the_average_can_follow_a_run_of_a_few_hundred_steps() -> None:
    schedule = derive(experiment(epochs=20, global_batch_size=8), images=200, workers=1)
    assert schedule.steps == 500
    kept = 1.0
    for update in range(1, schedule.steps + 1):
        rising = 1 - 2.718281828 ** (-update / schedule.ema_warmup_steps) if schedule.ema_warmup_steps else 1
        kept *= schedule.ema_decay * rising
    assert kept < 1e-3  # of the random start is left in the end
    assert schedule.ema_decay > 0.9  # and it still averages


@given(images=st.integers(1, 5000), epochs=st.integers(1, 50), batch=st.integers(1, 64), workers=st.integers(1, 8))
def test_a_schedule_is_whole_or_refused_with_a_batch_that_works(
    images: int, epochs: int, batch: int, workers: int
) -> None:
    setting = experiment(epochs=epochs, global_batch_size=batch)
    if batch < workers or batch > images:
        with pytest.raises(ConfigError, match=r"too small|or fewer"):
            derive(setting, images=images, workers=workers)
        return
    schedule = derive(setting, images=images, workers=workers)
    shares = [schedule.micro_batches_of(rank, workers) for rank in range(workers)]
    assert sum(shares) * schedule.micro_batch_size == batch
    assert 1 <= min(shares) <= max(shares) <= min(shares) + 1
    assert batch % workers or set(shares) == {1}
    assert schedule.steps == epochs * (images // batch)
    assert 0 <= schedule.warmup_steps <= schedule.steps // 10
    assert 0 <= schedule.ema_decay < 1
    assert schedule.stage_two_step is None or 0 < schedule.stage_two_step < schedule.steps


@pytest.mark.parametrize(
    ("batch", "micro", "workers", "said"),
    [
        (
            2,
            None,
            4,
            "too small for 4 workers: each needs an image in every step; take 4 or more, or at most 2 workers",
        ),
        (32, 5, 2, "nearest that do are 4 and 8"),
        (32, 16, 3, "makes 2 micro-batch.* fewer than the 3 workers: take 8 or less"),
    ],
)
def test_a_batch_that_cannot_be_shared_is_refused_with_one_that_can(
    batch: int, micro: int | None, workers: int, said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        shared_micro_batch(batch, micro, workers)


@pytest.mark.parametrize(("workers", "expected"), [(1, 32), (4, 8), (5, 4), (7, 4), (8, 4), (9, 2), (32, 1)])
def test_any_number_of_workers_shares_the_published_batch(workers: int, expected: int) -> None:
    assert shared_micro_batch(32, None, workers) == expected


@pytest.mark.parametrize(("rule", "factor"), [("linear", 16.0), ("sqrt", 4.0), ("none", 1.0)])
def test_a_larger_batch_scales_the_rates_by_the_chosen_rule(rule: str, factor: float) -> None:
    def rates(batch: int) -> tuple[float, float]:
        setting = experiment(epochs=4, global_batch_size=batch)
        setting = setting.model_copy(update={"optimizer": setting.optimizer.model_copy(update={"scale_lr": rule})})
        optimizer = derive(setting, images=5120, workers=4).optimizer
        return optimizer.lr, optimizer.backbone_lr

    assert rates(512) == pytest.approx(tuple(rate * factor for rate in rates(32)))


def test_an_epoch_without_a_step_is_refused() -> None:
    with pytest.raises(ConfigError, match="exceeds the 20 images"):
        derive(experiment(epochs=1), images=20, workers=2)


@pytest.mark.parametrize(
    ("variant", "epochs", "clean", "stages"),
    [  # published boundaries
        ("n", 160, 12, (4, 78, 148)),
        ("s", 132, 12, (4, 64, 120)),
        ("m", 102, 12, (4, 49, 90)),
        ("l", 58, 8, (4, 29, 50)),
        ("x", 58, 8, (4, 29, 50)),
        ("x from Objects365", 24, 4, (2, 12, 20)),
    ],
)
def test_the_stages_of_deim_are_the_published_ones(
    variant: str, epochs: int, clean: int, stages: tuple[int, int, int]
) -> None:
    assert recipe_stages(epochs, clean) == stages


@given(epochs=st.integers(1, 500), clean=st.integers(0, 500))
def test_the_stages_follow_each_other_in_any_run(epochs: int, clean: int) -> None:
    clean = min(clean, epochs)
    dense, ordinary, last = recipe_stages(epochs, clean)
    assert 0 <= dense <= ordinary <= last == epochs - clean
    assert dense <= 4
    assert last == 0 or ordinary > dense  # the point of the recipe is left out last
    assert bool(left_out(epochs, clean)) == (0 in (dense, ordinary - dense, last - ordinary))


@pytest.mark.parametrize(
    ("file", "epochs", "stages", "batch", "lr", "backbone_lr", "decay", "floor", "flat", "warmup", "repeat"),
    [
        ("coco/deim_n.yaml", 160, (4, 78, 148), 128, 8e-4, 4e-4, 1e-4, 1.0, 78, 2000, 0),
        ("coco/deim_s.yaml", 132, (4, 64, 120), 32, 4e-4, 2e-4, 1e-4, 0.5, 64, 2000, 20),
        ("coco/deim_m.yaml", 102, (4, 49, 90), 32, 4e-4, 4e-5, 1e-4, 0.5, 49, 2000, 6),
        ("coco/deim_l.yaml", 58, (4, 29, 50), 32, 5e-4, 2.5e-5, 1.25e-4, 0.5, 29, 2000, 4),
        ("coco/deim_x.yaml", 58, (4, 29, 50), 32, 5e-4, 5e-6, 1.25e-4, 0.5, 29, 2000, 3),
        ("objects365_to_coco/deim_x.yaml", 24, (2, 12, 20), 32, 2.5e-4, 2.5e-6, 1.25e-4, 1.0, 12, 0, 3),
    ],
)
def test_the_recipes_of_deim_are_the_published_ones(
    file: str,
    epochs: int,
    stages: tuple[int, int, int],
    batch: int,
    lr: float,
    backbone_lr: float,
    decay: float,
    floor: float,
    flat: int,
    warmup: int,
    repeat: int,
) -> None:
    recipe = load_experiment(CONFIGS / "deim" / file)
    schedule = derive(recipe, images=COCO, workers=4)
    assert (schedule.epochs, schedule.strong_epochs, schedule.global_batch_size) == (epochs, stages[2], batch)
    assert recipe_stages(epochs, epochs - stages[2]) == stages
    optimizer = schedule.optimizer
    assert (optimizer.lr, optimizer.backbone_lr, optimizer.weight_decay) == pytest.approx((lr, backbone_lr, decay))
    assert (schedule.min_lr_ratio, schedule.warmup_steps, recipe.base_size_repeat) == (floor, warmup, repeat)
    assert schedule.flat_steps == flat * schedule.steps_per_epoch
    assert schedule.ema_decay == pytest.approx(0.9999, abs=1e-9)
    assert schedule.notes == ()


def test_a_short_run_says_which_stages_of_deim_it_lacks() -> None:
    assert left_out(58, 8) == []
    assert left_out(8, 1) == [
        "recipe deim: a run of 8 epochs is too short for: first epochs without strong augmentation"
    ]
    (line,) = left_out(1, None)
    assert line.startswith("recipe deim: a run of 1 epoch is too short for: first epochs")
    assert line.endswith("; ordinary epochs after these; last epochs without strong augmentation")


def test_deim_on_coco_has_the_recorded_schedule() -> None:
    values = {"recipe": "deim", "data": {"train": "a"}, "model": {"variant": "l"}}
    recipe = check(Experiment, values | {"schedule": {"epochs": 58, "no_aug_epochs": 8}}, source="test")
    schedule = derive(recipe, images=COCO, workers=4)
    recording = recorded.deim_rates("l")
    rates = [schedule.learning_rate_factor(i) * schedule.optimizer.lr for i in recording["iterations"][1:]]
    assert rates == pytest.approx([rates[2] for rates in recording["rates"][1:]], rel=1e-12)
    assert schedule.steps == recording["total_iterations"]
    rate = (
        "warm-up over 2000 steps (power 2), then constant until step 107184, then a cosine to 0.5 of it at step 184800"
    )
    assert any(rate in line for line in schedule.lines(evaluates=True))


def test_the_warm_up_of_deim_is_scaled_to_the_set() -> None:
    values = {"recipe": "deim", "data": {"train": "a"}, "schedule": {"epochs": 50, "global_batch_size": 8}}
    short = derive(check(Experiment, values, source="test"), images=400, workers=1)
    assert (short.steps, short.warmup_steps) == (2500, 250)
    values["schedule"] = {"epochs": 100, "global_batch_size": 64}
    assert derive(check(Experiment, values, source="test"), images=COCO, workers=1).warmup_steps == 1000
    values["schedule"] = {"epochs": 100, "warmup_steps": 0}
    none = derive(check(Experiment, values, source="test"), images=COCO, workers=1)
    assert (none.warmup_steps, none.learning_rate_factor(0)) == (0, 1.0)


@pytest.mark.parametrize(
    ("given", "factors"),
    [  # of steps 0, 50, 60, 80 and 100 of 100, with 10 of warm-up
        ({}, [0.1, 1, 1, 1, 1]),
        ({"shape": "constant", "min_lr_ratio": 0.1}, [0.1, 1, 1, 1, 1]),
        ({"min_lr_ratio": 0.1}, [0.1, 0.628142, 0.471858, 0.205280, 0.1]),
        ({"shape": "cosine", "min_lr_ratio": 0.1}, [0.1, 0.628142, 0.471858, 0.205280, 0.1]),
        ({"shape": "flat_cosine", "min_lr_ratio": 0.2, "flat_epochs": 0.5}, [0.1, 1, 0.882843, 0.317157, 0.2]),
        ({"shape": "flat_cosine", "min_lr_ratio": 0.2, "flat_epochs": 5}, [0.1, 1, 0.882843, 0.317157, 0.2]),
    ],
)
def test_the_rate_has_the_shape_that_is_asked_for(given: dict[str, Any], factors: list[float]) -> None:
    content = {"data": {"train": "a"}, "schedule": {"epochs": 10, "no_aug_epochs": 1, "warmup_steps": 10, **given}}
    schedule = derive(check(Experiment, content, source="test"), images=320, workers=1)
    assert schedule.steps == 100
    assert [schedule.learning_rate_factor(step) for step in (0, 50, 60, 80, 100)] == pytest.approx(factors, abs=1e-6)
