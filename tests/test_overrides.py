"""Values that a command line changes, and relative paths in a submitted job."""

import importlib
import os
from typing import Any

import pytest

from pipeline import config_files
from pipeline.config import ConfigError
from pipeline.config_files import parse_overrides
from pipeline.ray_job import absolute_location
from tests.support.commands import JOB, ROOT


def test_all_set_options_count_in_their_order() -> None:
    assert list(parse_overrides(["b=1", "a.c=x", "a.d=[1, 2]"]).items()) == [("b", 1), ("a.c", "x"), ("a.d", [1, 2])]
    with pytest.raises(ConfigError, match=r"--set a: given twice"):
        parse_overrides(["a=1", "b=1", "a=1"])


@pytest.mark.parametrize("command", ["fit", "train", "tune", "pretrain_finetune"])
def test_set_options_extend_each_other(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module(f"jobs.{command}")
    taken: list[list[str]] = []

    def note(texts: list[str]) -> dict[str, Any]:
        taken.append(texts)
        raise ConfigError("enough")

    monkeypatch.setattr(config_files, "parse_overrides", note)
    with pytest.raises(SystemExit, match="enough"):
        module.main([str(ROOT / "configs" / "demo.yaml"), "--set", "a=1", "b=2", "--set", "c=3"])
    assert taken == [["a=1", "b=2", "c=3"]]


@pytest.mark.parametrize("location", ["/data/train", "s3://bucket/train", "file:///data", "runs:/1", "models:/a@b"])
def test_a_job_takes_locations_that_do_not_depend_on_the_working_directory(
    location: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(*next(iter(JOB.items())))
    assert absolute_location(location) == location


def test_relative_locations_are_refused_in_a_job_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(next(iter(JOB)), raising=False)
    assert absolute_location("runs") == f"{os.getcwd()}/runs"
    monkeypatch.setenv(*next(iter(JOB.items())))
    with pytest.raises(ValueError, match=r"'\./runs/' is relative.*\$PWD/runs in the shell"):
        absolute_location("./runs/")
