"""Where things may be used: imports point one way, and each foreign library enters through named files."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BELOW = {
    "dfine_core": {"dfine_core"},
    "pipeline": {"dfine_core", "pipeline"},
    "jobs": {"dfine_core", "pipeline", "jobs"},
}
OURS = set(BELOW)
CORE_MAY_IMPORT = {"torch", "torchvision", "scipy", "numpy"}  # besides the standard library
# Modules that run inside Ray Data tasks, or that such modules import: torch there would cost seconds per worker process.
WITHOUT_TORCH = (
    *("records", "manifest", "storage", "plan", "reader", "augment", "decode", "mixing", "tasks"),
    *("prepare", "shard_writer", "doctor_findings", "doctor_rows", "doctor_shard"),
)

# Where a foreign library may be used: files below `pipeline` and `jobs`, by the beginning of their path.
ENTRANCES = {
    "mlflow": ("pipeline/tracking/", "pipeline/trained.py"),
    "pycocotools": ("pipeline/evaluation/",),
    "hotcoco": ("pipeline/evaluation/",),
    "yaml": ("pipeline/config.py", "pipeline/training/", "pipeline/data/sources/"),
    "ray": ("pipeline/ray_start.py", "pipeline/data/", "pipeline/training/"),
    "pynvml": ("pipeline/tracking/",),
}


def imports(source: str) -> Iterator[str]:
    """Full names of everything a module imports, wherever in it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." if node.level else f"{node.module}"


def violations(package: str, source: str) -> list[str]:
    """What a module of `package` imports and should not."""
    found = []
    for name in imports(source):
        top = name.split(".")[0]
        upwards = top in OURS and top not in BELOW[package]
        foreign = package == "dfine_core" and top not in OURS | CORE_MAY_IMPORT | sys.stdlib_module_names
        if name == "." or upwards or foreign:
            found.append(name)
    return found


def modules(package: str) -> list[Path]:
    found = sorted((ROOT / package).rglob("*.py"))
    assert found, f"{package} has no modules"
    return found


@pytest.mark.parametrize("package", list(BELOW))
def test_imports_point_one_way(package: str) -> None:
    wrong = {
        str(path.relative_to(ROOT)): bad for path in modules(package) if (bad := violations(package, path.read_text()))
    }
    assert not wrong


@pytest.mark.parametrize(
    ("package", "source"),
    [
        ("dfine_core", "import ray"),
        ("dfine_core", "def f():\n    import mlflow.pytorch"),
        ("dfine_core", "from yaml import safe_load"),
        ("dfine_core", "import pydantic"),
        ("dfine_core", "import pyarrow.parquet as pq"),
        ("dfine_core", "from pycocotools.coco import COCO"),
        ("dfine_core", "from pipeline.data import plan"),
        ("dfine_core", "from . import boxes"),
        ("pipeline", "from jobs.train import main"),
    ],
)
def test_the_check_can_fail(package: str, source: str) -> None:
    assert violations(package, source)


def test_task_modules_do_not_import_torch() -> None:
    found = [path for path in modules("pipeline/data") if path.stem in WITHOUT_TORCH]
    assert len(found) == len(WITHOUT_TORCH)
    wrong = [path.name for path in found if "torch" in {name.split(".")[0] for name in imports(path.read_text())}]
    assert not wrong


@pytest.mark.parametrize("library", list(ENTRANCES))
def test_foreign_libraries_enter_through_named_files(library: str) -> None:
    users = [
        str(path.relative_to(ROOT))
        for package in ("pipeline", "jobs")
        for path in modules(package)
        if library in {name.split(".")[0] for name in imports(path.read_text())}
    ]
    assert users
    assert [path for path in users if not path.startswith(ENTRANCES[library])] == []
