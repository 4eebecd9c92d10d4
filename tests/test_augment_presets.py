"""Presets of the augmentation: complete, filling in only what is left out, before the recipe."""

from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

from pipeline.augment_presets import presets
from pipeline.config import ConfigError, Experiment
from pipeline.config_files import check, dump, load_experiment
from pipeline.data.augment.settings import AugmentSettings

NAMES = get_args(get_args(get_type_hints(AugmentSettings)["preset"])[0])
CONTENT: dict[str, Any] = {"data": {"train": "shards/any"}, "schedule": {"epochs": 3}}


def augment(**sections: Any) -> AugmentSettings:
    return check(Experiment, CONTENT | sections, source="test").augment


def plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def test_the_file_has_the_presets_that_settings_name() -> None:
    assert NAMES == tuple(presets()) == ("aerial", "microscopy", "documents", "fixed_camera")


@pytest.mark.parametrize("name", NAMES)
def test_every_value_of_a_preset_is_taken_and_switches_something(name: str) -> None:
    found, released, deim = augment(augment={"preset": name}), augment(), augment(recipe="deim")
    for key, value in presets()[name].items():
        assert plain(getattr(found, key)) == value
        assert [plain(getattr(recipe, key)) for recipe in (released, deim)] != [value, value], key
    others = {key for key in vars(found) if getattr(found, key) != getattr(released, key)}
    assert others <= {"preset", *presets()[name]}


def test_given_keys_win_over_the_preset_and_the_preset_over_the_recipe() -> None:
    found = augment(augment={"preset": "microscopy", "hue": [0, 0.01]}, recipe="deim")
    assert found.hue == (0, 0.01)
    assert (found.mosaic_probability, found.mixup_probability) == (0, 0.5)
    assert augment(recipe="deim").mosaic_probability == 0.5
    assert found.vertical_flip_probability == 0.5


def test_no_preset_is_the_released_recipe() -> None:
    assert augment(augment={"preset": None}) == augment() == AugmentSettings()


def test_what_was_filled_in_is_recorded_and_read_again_as_it_is() -> None:
    experiment = check(Experiment, CONTENT | {"augment": {"preset": "aerial"}}, source="test")
    assert dump(experiment)["augment"]["iou_crop_scale"] == [0.5, 1.0]
    assert check(Experiment, dump(experiment), source="again") == experiment


def test_a_preset_is_given_on_the_command_line_and_an_unknown_one_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("data: {train: shards/any}\nschedule: {epochs: 3}\naugment: {flip_probability: 0.3}\n")
    found = load_experiment(file, {"augment.preset": "documents"}).augment
    assert (found.flip_probability, found.mosaic_rotation) == (0.3, 2)
    with pytest.raises(ConfigError, match="'aerial', 'microscopy', 'documents' or 'fixed_camera'"):
        load_experiment(file, {"augment.preset": "satellite"})
