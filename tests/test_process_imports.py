"""Packages that each kind of process does without: an import costs every process of that kind its CPU time."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.imports import MODULES

ROOT = Path(__file__).parent.parent
DRAWING = ("matplotlib", "jinja2")
LARGE = ("scipy", "mlflow", "transformers", "onnxruntime", "ray.tune", "ray.serve", *DRAWING)
CLUSTER = ("ray.train", "ray.data", "pandas")
# Packages that must not come along with the modules of a process of this kind.
UNUSED = {
    "map task": (*LARGE, "torch", *CLUSTER),
    "task of prepare": (*LARGE, "torch", *CLUSTER),
    "progress board": (*LARGE, "torch", *CLUSTER),
    "driver": (*LARGE, "ray", "pandas"),
    "training in one process": (*LARGE, "torchvision", "ray", "pandas"),
    "training worker": (*LARGE, "torchvision"),
    "coordinator of the stream": (*LARGE, "ray.train", "ray.data"),
    "prediction": (*LARGE, "torch._dynamo", "torchvision", "ray", "pandas"),
    "worker of a prediction": (*LARGE, "torch._dynamo", "torchvision"),
    "decoder of the server": (*LARGE, "torch", "ray"),
}
FOUND = """
import importlib, json, sys
modules, packages = json.loads(sys.argv[1])
for module in modules:
    importlib.import_module(module)
print(json.dumps([name for name in packages if name in sys.modules]))
"""


def found(modules: tuple[str, ...], packages: tuple[str, ...]) -> list[str]:
    argument = json.dumps([modules, packages])
    done = subprocess.run(
        [sys.executable, "-c", FOUND, argument], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True
    )
    names: list[str] = json.loads(done.stdout)
    return names


@pytest.mark.parametrize("kind", MODULES)
def test_a_process_imports_what_it_uses(kind: str) -> None:
    assert found(MODULES[kind], UNUSED[kind]) == []


def test_an_import_is_seen() -> None:
    assert found(("dfine_core.model.detector", "scipy.optimize"), ("torch", "scipy", "ray")) == ["torch", "scipy"]
