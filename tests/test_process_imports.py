"""Packages that each kind of process does without: an import costs every process of that kind its CPU time."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DRAWING = ("matplotlib", "jinja2")
LARGE = ("scipy", "mlflow", "transformers", "onnxruntime", "ray.tune", "ray.serve", *DRAWING)
# Modules that a process of this kind imports, and packages that must not come along.
PROCESSES = {
    "map task": (
        ("pipeline.data.stream.tasks",),
        (*LARGE, "torch", "ray.train", "ray.data", "pandas"),
    ),
    "task of prepare": (
        ("pipeline.data.prepare.shard_writer", "pipeline.data.prepare.image_files"),
        (*LARGE, "torch", "ray.train", "ray.data", "pandas"),
    ),
    "progress board": (("pipeline.training.heartbeat",), (*LARGE, "torch", "ray.train", "ray.data", "pandas")),
    "driver": (("pipeline.training.launch",), (*LARGE, "ray", "pandas")),
    "training in one process": (
        ("pipeline.training.in_process", "pipeline.training.loop"),
        (*LARGE, "torchvision", "ray", "pandas"),
    ),
    "training worker": (("pipeline.training.worker", "pipeline.training.loop"), (*LARGE, "torchvision")),
    "coordinator of the stream": (("pipeline.data.stream.groups",), (*LARGE, "ray.train", "ray.data")),
    "prediction": (("pipeline.predict.predict",), (*LARGE, "torch._dynamo", "torchvision", "ray", "pandas")),
    "worker of a prediction": (("pipeline.predict.partition",), (*LARGE, "torch._dynamo", "torchvision")),
    "decoder of the server": (("pipeline.serve.decoding",), (*LARGE, "torch", "ray")),
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


@pytest.mark.parametrize("kind", PROCESSES)
def test_a_process_imports_what_it_uses(kind: str) -> None:
    assert found(*PROCESSES[kind]) == []


def test_an_import_is_seen() -> None:
    assert found(("dfine_core.model.detector", "scipy.optimize"), ("torch", "scipy", "ray")) == ["torch", "scipy"]
