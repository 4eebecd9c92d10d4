"""Stages of the augmentation from the length of a run."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config import ConfigError, Experiment
from pipeline.config_files import check
from pipeline.data.augment.settings import AugmentSettings
from pipeline.data.augment.stages import Stages
from pipeline.training.schedule import Schedule, derive

IMAGES = 640
DENSE = {"mosaic_probability": 0.5, "mixup_probability": 0.5}


def derived(*, images: int = IMAGES, augment: dict[str, Any] | None = None, **schedule: Any) -> Schedule:
    content = {
        "data": {"train": "a"},
        "model": {"variant": "s"},
        "schedule": schedule,
        "augment": DENSE if augment is None else augment,
    }
    return derive(check(Experiment, content, source="test"), images=images, workers=1)


@pytest.mark.parametrize(
    ("epochs", "clean", "stages"),
    [  # the published ones of n, s, m, l and x, and of x from Objects365
        (160, 12, (4, 78, 148)),
        (132, 12, (4, 64, 120)),
        (102, 12, (4, 49, 90)),
        (58, 8, (4, 29, 50)),
        (24, 4, (2, 12, 20)),
    ],
)
def test_the_published_stages_follow_from_the_length(epochs: int, clean: int, stages: tuple[int, ...]) -> None:
    schedule = derived(epochs=epochs, no_aug_epochs=clean, stages="deim")
    assert schedule.stages == stages
    assert (schedule.strong_epochs, schedule.stage_two_step) == (stages[2], stages[2] * 20)
    assert (
        f"none before epoch {stages[0]}, dense before epoch {stages[1]}, ordinary before epoch {stages[2]}"
        in "\n".join(schedule.lines(evaluates=True))
    )


def test_without_stages_everything_happens_in_all_but_the_clean_epochs() -> None:
    assert derived(epochs=20, no_aug_epochs=2).stages == (0, 18, 18)
    assert derived(epochs=20, no_aug_epochs=0).stages == (0, 20, None)
    assert not any("dense" in line for line in derived(epochs=20).lines(evaluates=True))


def test_stages_are_epochs_or_shares_of_them() -> None:
    assert derived(epochs=50, stages=[2, 12, 40]).stages == (2, 12, 40)
    assert derived(epochs=50, stages=[0.04, 0.5, 0.8]).stages == (2, 25, 40)
    assert derived(epochs=50, stages=[0, 0.5, 1.0]).stages == (0, 25, None)
    assert derived(steps=100, stages=[1, 2, 4]).stage_two_step == 80
    assert derived(epochs=4, stages=[1, 1, 1]).stages == (1, 1, 1)


@pytest.mark.parametrize(
    ("schedule", "said"),
    [
        ({"epochs": 9, "stages": [4, 2, 8]}, r"stages \[4, 2, 8\] must ascend"),
        ({"epochs": 9, "stages": [1, 2, 8], "no_aug_epochs": 1}, "give either no_aug_epochs"),
        ({"epochs": 9, "stages": [1, 2, 12]}, r"must lie in the 9 epochs of the run; shares such as"),
        ({"epochs": 9, "stages": [0.5, 2]}, "stages"),
        ({"epochs": 9, "stages": "dense"}, "stages"),
    ],
)
def test_stages_that_do_not_fit_are_refused(schedule: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        derived(**schedule)


@given(epochs=st.integers(1, 300), data=st.data())
def test_derived_stages_lie_in_order_within_any_run(epochs: int, data: st.DataObject) -> None:
    clean = data.draw(st.integers(0, epochs))
    stages = derived(epochs=epochs, no_aug_epochs=clean, stages="deim").stages
    end = epochs - clean
    assert 0 <= stages.dense <= stages.ordinary <= end
    assert stages.clean == (end if clean else None)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"epochs": 1, "no_aug_epochs": 1, "stages": "deim"}, "left out: mosaic and mixup, as 1 epoch leave"),
        ({"epochs": 9, "images": 3, "global_batch_size": 2}, "left out: mosaics of four images, as there are only 3"),
        ({"epochs": 9, "micro_batch_size": 1}, "left out: mixup, as a micro-batch has one image"),
    ],
)
def test_a_run_too_small_for_a_part_says_so(changes: dict[str, Any], said: str) -> None:
    assert said in "\n".join(derived(**changes).lines(evaluates=False))


def test_an_ordinary_run_leaves_nothing_out() -> None:
    assert derived(epochs=20, stages="deim").notes == ()
    assert derived(epochs=1, augment={}, micro_batch_size=1).notes == ()


def test_each_stage_has_its_operations() -> None:
    everything = AugmentSettings(mosaic_probability=0.5, mixup_probability=0.5, copy_paste_probability=0.5)
    stages = Stages(dense=1, ordinary=2, clean=3)
    assert stages.settings_of(0, everything) == stages.settings_of(3, everything) == everything.clean()
    assert stages.settings_of(1, everything) is everything
    ordinary = stages.settings_of(2, everything)
    assert ordinary == AugmentSettings(copy_paste_probability=0.5)
    assert Stages(0, 9, None).settings_of(99, everything) == ordinary


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("mixup_weight", "it is called mixup_ratio"),
        ("mosaic_centre", "its map is given by mosaic_rotation"),
        ("copy_paste_object_probability", "copy_paste_objects"),
        ("copy_paste_max_covered", "leave it out"),
    ],
)
def test_former_keys_are_refused_with_what_takes_their_place(key: str, said: str) -> None:
    with pytest.raises(ConfigError, match=f"augment: unknown key '{key}'; .*{said}"):
        derived(epochs=2, augment={key: 0.5})
