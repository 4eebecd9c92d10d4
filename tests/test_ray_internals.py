"""Private modules of Ray: used in two files, with the version they were verified with."""

import importlib
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path

import pytest
import ray
import yaml
from ray._common.utils import env_bool
from ray._private import ray_constants
from ray.data import DataContext
from ray.data._internal.execution.backpressure_policy import BackpressurePolicy
from ray.data._internal.execution.interfaces import PhysicalOperator
from ray.train.v2._internal.execution import collective_impl, context

from pipeline.data.stream import backpressure
from pipeline.data.stream.backpressure import OutputBounds
from pipeline.ray_core_internals import LOOPBACK_VARIABLE
from tests.support.source_imports import imports

ROOT = Path(__file__).parent.parent
VERIFIED_WITH = "2.60"
INTERNALS = ("pipeline/ray_core_internals.py", "pipeline/ray_internals.py")
LOGGING = "pipeline/ray_data_logging.yaml"
PRIVATE_TEXT = re.compile(r"\bray(\.\w+)*\._[a-z]\w*")


def is_private(name: str) -> bool:
    package, *inner = name.split(".")
    return package == "ray" and any(part.startswith("_") for part in inner)


def private_uses(source: str) -> set[str]:
    """Private names of Ray that a module imports or spells out, in strings and attributes too."""
    imported = {name for name in imports(source) if is_private(name)}
    return imported | {match.group() for match in PRIVATE_TEXT.finditer(source)}


def files_with_private_uses(sources: Mapping[str, str]) -> set[str]:
    return {name for name, source in sources.items() if private_uses(source)}


def exists(name: str) -> bool:
    """Whether a full name is a module, or an attribute of one."""
    module, _, attribute = name.rpartition(".")
    try:
        return hasattr(importlib.import_module(module), attribute) or bool(importlib.import_module(name))
    except ImportError:
        return False


def names_in_use() -> list[str]:
    handlers = yaml.safe_load((ROOT / LOGGING).read_text())["handlers"].values()
    names = sorted({name for path in INTERNALS for name in imports((ROOT / path).read_text()) if is_private(name)})
    return [*names, *(handler["class"] for handler in handlers)]


def test_the_installed_ray_is_the_verified_one_and_the_only_one_that_can_be_installed() -> None:
    assert ray.__version__.startswith(f"{VERIFIED_WITH}.")
    assert all(f"verified with Ray {VERIFIED_WITH}." in (ROOT / path).read_text() for path in INTERNALS)
    assert re.search(rf'"ray\[[a-z,]+\]>={VERIFIED_WITH},<2\.61"', (ROOT / "pyproject.toml").read_text())


def test_there_are_private_names_to_check() -> None:
    assert len(names_in_use()) >= 10
    assert not exists("ray.data._internal.logging.no_such_name")
    assert not exists("ray._private.no_such_module.name")


@pytest.mark.parametrize("name", names_in_use())
def test_a_private_name_still_exists(name: str) -> None:
    assert exists(name)


def test_private_members_in_use_still_exist() -> None:
    assert "op_resource_reservation_enabled" in {field.name for field in fields(DataContext)}
    assert callable(BackpressurePolicy.can_add_input)
    assert callable(PhysicalOperator.estimate_object_store_usage)
    assert isinstance(PhysicalOperator.name, property)
    assert callable(PhysicalOperator.num_active_tasks)
    assert context.logger.name == context.__file__
    assert collective_impl.logger.name == collective_impl.__name__
    default = env_bool(LOOPBACK_VARIABLE, not ray_constants.IS_WINDOWS_OR_OSX)
    command = f"from ray._private import ray_constants; print(ray_constants.ENABLE_RAY_CLUSTER is {default})"
    # In a process of its own: here, a cluster may have been started, for which the constant was changed.
    assert (
        subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True).stdout == "True\n"
    )


def test_the_variable_that_bounds_request_bodies_is_still_read_by_ray_serve() -> None:
    read = (Path(ray.__file__).parent / "serve/_private/constants.py").read_text()  # importing it takes seconds
    set_by_us = (ROOT / "pipeline/serve/proxy.py").read_text()
    assert '"RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"' in read
    assert '"RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"' in set_by_us


def test_no_other_file_uses_private_modules_of_ray() -> None:
    paths = [path for package in ("pipeline", "jobs") for path in (ROOT / package).rglob("*") if path.is_file()]
    sources = {str(path.relative_to(ROOT)): path.read_text() for path in paths if path.suffix == ".py"}
    assert len(sources) > 100
    assert files_with_private_uses(sources) == set(INTERNALS)
    settings = {str(path.relative_to(ROOT)): path.read_text() for path in paths if path.suffix in (".yaml", ".toml")}
    assert {name for name, text in settings.items() if PRIVATE_TEXT.search(text)} == {LOGGING}


@pytest.mark.parametrize(
    "source",
    [
        "import ray._private.worker",
        "from ray import _private",
        "def f():\n    from ray.train.v2._internal.execution import context",
        "import_module('ray.serve._private.constants')",
        "x = ray._private.worker.global_worker",
        "HANDLER = 'ray._private.log.PlainRayHandler'",
    ],
)
def test_the_check_can_fail(source: str) -> None:
    assert files_with_private_uses({"pipeline/storage.py": source, "b.py": "import ray.data"}) == {
        "pipeline/storage.py"
    }


@pytest.mark.parametrize(
    ("module", "without"),
    [
        ("pipeline.ray_internals", {"torch", "ray.train"}),
        ("pipeline.ray_cluster", {"torch", "ray.train", "ray.data"}),
    ],
)
def test_a_module_loads_no_more_of_ray_than_it_needs(module: str, without: set[str]) -> None:
    code = f"import sys, {module}; assert not {without} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# The rule that the bounds of the stream give to Ray Data


def test_only_an_operator_that_has_reached_its_bound_is_held_back(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(backpressure.time, "sleep", pauses.append)
    rule = OutputBounds(["read", "decode"], {"decode": 100})

    def may_start(operator: str, stored_bytes: int, idle: bool = True) -> bool:
        return rule.may_start_task(operator, lambda: stored_bytes, lambda: idle)

    assert may_start("read", 10**9)
    assert may_start("decode", 99)
    assert not may_start("decode", 100, idle=False)
    assert pauses == []
    assert [may_start("decode", 100) for _ in range(9)] == [False] * 9
    assert pauses == [0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.25, 0.25, 0.25]
    assert may_start("decode", 0)
    assert not may_start("decode", 100)
    assert pauses[-1] == 0.005


def test_a_bound_for_an_operator_that_does_not_exist_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"there is no operator {'fused'} to bound, only \['read'\]"):
        OutputBounds(["read"], {"fused": 1})
