"""A setting that nothing reads is a lie: every field of every config model is read somewhere outside its schema."""

import ast
import dataclasses
import importlib
import pkgutil
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import pipeline
from dfine_core.config import LossConfig, ModelConfig, OptimizerConfig
from pipeline.config import Cluster
from pipeline.config_keys import Config
from pipeline.data.augment.settings import AugmentSettings
from pipeline.tuning.space import KINDS, Domain
from pipeline.tuning.sweep import Sweep

ROOT = Path(__file__).parent.parent
DATACLASSES = (LossConfig, ModelConfig, OptimizerConfig, AugmentSettings)
READ_BY_GETATTR = {Domain: set(KINDS)}  # `Domain.values` reads the one that is given


def subclasses(kind: type) -> Iterator[type]:
    for sub in kind.__subclasses__():
        yield sub
        yield from subclasses(sub)


def config_models() -> list[type]:
    for module in pkgutil.walk_packages(pipeline.__path__, "pipeline."):
        source = ROOT / Path(*module.name.split(".")).with_suffix(".py")
        if source.exists() and "(Config)" in source.read_text():
            importlib.import_module(module.name)
    return [kind for kind in subclasses(Config) if kind.__module__.startswith("pipeline.")]


def fields_of(kind: Any) -> list[str]:
    return [f.name for f in dataclasses.fields(kind)] if dataclasses.is_dataclass(kind) else list(kind.model_fields)


def attributes_read(sources: Iterable[str]) -> set[str]:
    return {
        node.attr
        for source in sources
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
    }


def sources() -> list[str]:
    files = [path for folder in ("dfine_core", "pipeline", "jobs") for path in (ROOT / folder).rglob("*.py")]
    others = [path for path in files if path.name not in ("config.py", "data_settings.py")]
    assert len(files) - len(others) == 3
    return [path.read_text() for path in others]


@cache
def read_in_the_project() -> set[str]:
    return attributes_read(sources())


def unread(kind: type, read: set[str]) -> list[str]:
    return [name for name in fields_of(kind) if name not in read | READ_BY_GETATTR.get(kind, set())]


def test_every_config_model_is_looked_at() -> None:
    names = {kind.__name__ for kind in config_models()}
    assert {
        "Experiment",
        "Cluster",
        "Data",
        "Tracking",
        "Sweep",
        "Searcher",
        "Chain",
        "ChainStage",
        "ServeSettings",
    } <= names
    assert "start_timeout_s" in fields_of(Cluster)
    assert "replicates" in fields_of(Sweep)
    assert "iou_crop_scale" in fields_of(AugmentSettings)


@pytest.mark.parametrize("kind", [*config_models(), *DATACLASSES], ids=lambda kind: kind.__name__)
def test_every_field_is_read_outside_config(kind: type) -> None:
    assert unread(kind, read_in_the_project()) == []


def test_a_field_that_nothing_reads_is_found() -> None:
    class Settings(Config):
        used: int = 1
        only_written: int = 2
        unused: int = 3

    read = attributes_read(["def f(settings):\n    settings.only_written = 4\n    return settings.used"])
    assert unread(Settings, read) == ["only_written", "unused"]
    without_launch = [source for source in sources() if "START_TIMEOUT" not in source]
    assert "start_timeout_s" in unread(Cluster, attributes_read(without_launch))
