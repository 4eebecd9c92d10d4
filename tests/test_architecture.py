"""Where things may be used: imports point one way, and each foreign library enters through named files."""

import ast
import sys
from collections.abc import Collection, Iterator
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
# Files of the core that use more; the detector needs none of this.
ALSO = {"dfine_core/images.py": {"PIL"}}
BORROWED = {"dfine_core/inference.py": {"safetensors"}}  # imported when it is needed, inside a function
# Modules that run inside Ray Data tasks, or that such modules import: torch there would cost seconds per worker process.
WITHOUT_TORCH = (
    *("records", "manifest", "storage", "plan", "reader", "augment", "decode", "mixing", "tasks"),
    *("prepare", "shard_writer", "doctor_findings", "doctor_rows", "doctor_shard"),
)

# Where a foreign library may be used: files below `pipeline` and `jobs`, by the beginning of their path.
ENTRANCES = {
    "mlflow": ("pipeline/open_detector.py", "pipeline/tracking/"),
    "pycocotools": ("pipeline/evaluation/",),
    "hotcoco": ("pipeline/evaluation/",),
    "yaml": ("pipeline/config.py", "pipeline/training/", "pipeline/data/sources/"),
    "ray": (
        *("pipeline/ray_start.py", "pipeline/data/", "pipeline/training/"),
        *("pipeline/delivery/predict.py", "pipeline/delivery/serving.py"),
        *(
            "pipeline/tuning/trial.py",
            "pipeline/tuning/points.py",
            "pipeline/tuning/watcher.py",
            "pipeline/tuning/run.py",
        ),
    ),
    "fastapi": ("pipeline/delivery/serving.py",),
    "starlette": ("pipeline/delivery/",),
    "pynvml": ("pipeline/tracking/",),
    "optuna": ("pipeline/tuning/",),
    "onnx": ("pipeline/delivery/export.py",),
    "onnxruntime": (
        "pipeline/delivery/export.py",
        "pipeline/exported_files.py",
    ),
    "transformers": ("pipeline/delivery/huggingface.py",),
}


def imports(source: str) -> Iterator[str]:
    """Full names of everything a module imports, wherever in it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." if node.level else f"{node.module}"


def violations(package: str, source: str, borrowed: Collection[str] = (), also: Collection[str] = ()) -> list[str]:
    """What a module of `package` imports and should not; what it borrows must not be imported along with it."""
    allowed = OURS | CORE_MAY_IMPORT | sys.stdlib_module_names | set(borrowed) | set(also)
    found = []
    for name in imports(source):
        top = name.split(".")[0]
        upwards = top in OURS and top not in BELOW[package]
        foreign = package == "dfine_core" and top not in allowed
        if name == "." or upwards or foreign:
            found.append(name)
    return found + [name for name in imported_at_once(source) if name.split(".")[0] in borrowed]


def imported_at_once(source: str) -> list[str]:
    """Names that a module's own body imports: not those inside functions or for types only."""
    tree = ast.parse(source)
    waiting = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) or _is_for_types(node)]
    later = {id(inner) for node in waiting for inner in ast.walk(node)}
    return [
        name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom) and id(node) not in later
        for name in imports(ast.unparse(node))
    ]


def _is_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def modules(package: str) -> list[Path]:
    found = sorted((ROOT / package).rglob("*.py"))
    assert found, f"{package} has no modules"
    return found


@pytest.mark.parametrize("package", list(BELOW))
def test_imports_point_one_way(package: str) -> None:
    wrong = {
        name: bad
        for path in modules(package)
        if (bad := violations(package, path.read_text(), BORROWED.get(name := _name(path), ()), ALSO.get(name, ())))
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


def test_what_the_core_borrows_waits_until_it_is_needed() -> None:
    assert all((ROOT / name).exists() for name in (*BORROWED, *ALSO))
    assert violations("dfine_core", "import PIL.Image", {"PIL"})
    assert violations("dfine_core", "import PIL.Image")
    assert not violations("dfine_core", "import PIL.Image", also={"PIL"})
    assert not violations("dfine_core", "def f():\n    import PIL.Image", {"PIL"})
    assert violations("dfine_core", "def f():\n    import mlflow", {"PIL"})


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
