"""Imports of commands: parsing, help and mistakes load neither PyTorch nor Ray, and the first line comes before them."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from jobs.__main__ import COMMANDS
from tests.support.synthetic_shards import synthetic_records, write_shards

ROOT = Path(__file__).parent.parent.parent
SLOW = ["torch", "torchvision", "ray", "mlflow", "cv2", "scipy", "matplotlib", "transformers", "onnxruntime"]
FILES = [*SLOW, "pyarrow", "numpy"]  # needed by no experiment file
EVERYTHING = [*FILES, "pydantic", "yaml"]
# Run a command line, and print how it ended and which of some packages it had imported.
ENDING = """
import json, sys
from jobs.__main__ import main
names, words = json.loads(sys.argv[1])
try:
    code = main(words)
except SystemExit as end:
    code = end.code
print("\\n" + json.dumps([str(code), [name for name in names if name in sys.modules]]))
"""
# Run a command line in which PyTorch and Ray cannot be imported.
FIRST_LINE = """
import json, sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name in ("torch", "ray"):
            print(f"importing {name}", file=sys.stderr, flush=True)
            sys.exit(3)
sys.meta_path.insert(0, Finder())
from jobs.__main__ import main
main(json.loads(sys.argv[1]))
"""


def run(code: str, argument: Any, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {
        name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI")
    }
    return subprocess.run(
        [sys.executable, "-c", code, json.dumps(argument)],
        cwd=folder,
        env=environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("user")
    for name in ("train", "val"):
        write_shards(folder / name, synthetic_records(4, longest_side=64))
    (folder / "run.yaml").write_text(
        json.dumps(
            {
                "data": {"train": "train", "val": "val"},
                "model": {"variant": "n", "input_size": [64, 64], "num_queries": 20, "num_denoising": 10},
                "schedule": {"steps": 2, "global_batch_size": 2},
            }
        )
    )
    (folder / "empty").mkdir()
    return folder


HELP = [("--help", EVERYTHING, "0"), ("--version", EVERYTHING, "0"), ("trian x.yaml", EVERYTHING, "2")]
HELP += [(f"{command} --help", EVERYTHING, "0") for command in COMMANDS]
FLAGS = [
    ("train", EVERYTHING, "2"),
    ("train run.yaml --dryrun", EVERYTHING, "2"),
    ("train nowhere.yaml", EVERYTHING, "2"),
    ("train run.yaml --profile 3", EVERYTHING, "2"),
    ("predict empty photos --out out --every 3", EVERYTHING, "2"),
    ("predict empty photos --out out --threshold 1.5", EVERYTHING, "2"),
    ("serve empty --batch-size 0", EVERYTHING, "2"),
    ("export empty --to tflite --out out", EVERYTHING, "2"),
    ("benchmark empty --precision int8", EVERYTHING, "2"),
    ("prepare nothing", EVERYTHING, "2"),
]
PATHS = [
    ("evaluate nowhere val", EVERYTHING, "nowhere does not exist: no detector"),
    ("predict nowhere photos --out out", EVERYTHING, "nowhere does not exist: no detector"),
    ("export nowhere --to onnx --out out", EVERYTHING, "nowhere does not exist: no detector"),
    ("benchmark nowhere", EVERYTHING, "nowhere does not exist: no detector"),
    ("serve nowhere", EVERYTHING, "nowhere does not exist: no detector"),
    ("replay nowhere", EVERYTHING, "nowhere does not exist: no saved step"),
    ("fit nowhere", EVERYTHING, "nowhere does not exist: no data set"),
    ("report nowhere", EVERYTHING, "nowhere does not exist: no run"),
    ("train run.yaml --set data.train=nowhere", SLOW, "nowhere/manifest.json"),
    ("evaluate empty nowhere", SLOW, "nowhere/manifest.json"),
    ("doctor nowhere", SLOW, "2"),
    ("predict empty nowhere --out out", ["torch", "ray", "mlflow"], "nowhere"),
    ("prepare coco nowhere --split train --out out", ["torch", "ray", "mlflow"], "instances_train.json"),
    ("lineage nowhere", SLOW, "MLFLOW_TRACKING_URI"),
]
KEYS = [
    ("train run.yaml --set optimzer.lr=1", FILES, "unknown key 'optimzer'"),
    ("train small_data.yaml --set schedule.epochs=many", FILES, "schedule.epochs"),
    ("train run.yaml --set seed=1 --set seed=2", FILES, "given twice"),
    ("fit empty --set optimzer.lr=1", FILES, "unknown key 'optimzer'"),
    ("pretrain-finetune chains/demo.yaml --set finetune.sed=1", SLOW, "unknown key 'sed'"),
    ("pretrain-finetune chains/demo.yaml --set other.seed=1", SLOW, "begin with a stage"),
    ("tune sweeps/demo.yaml --set trails=1", [name for name in SLOW if name != "scipy"], "trails"),
    ("tune sweeps/demo.yaml --set trials=-1", [name for name in SLOW if name != "scipy"], "trials"),
]


@pytest.mark.parametrize(
    ("line", "absent", "ending"),
    [*HELP, *FLAGS, *PATHS, *KEYS],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_command_that_ends_early_imports_nothing_slow(
    line: str, absent: list[str], ending: str, folder: Path
) -> None:
    done = run(ENDING, [absent, line.split()], folder)
    assert done.returncode == 0, done.stderr
    code, imported = json.loads(done.stdout.splitlines()[-1])
    assert imported == []
    assert ending == code or ending in code


def test_the_packages_are_seen_once_they_are_imported(folder: Path) -> None:
    done = run("import torch, ray, json, sys\n" + ENDING, [FILES, ["--version"]], folder)
    assert {"torch", "ray", "numpy"} <= set(json.loads(done.stdout.splitlines()[-1])[1])


@pytest.mark.parametrize(
    ("line", "first"),
    [
        ("train run.yaml", "dfine train run.yaml: starting …"),
        ("train run.yaml --dry-run", "dfine train run.yaml: planning …"),
        ("fit empty --out out", "dfine fit {folder}/empty: "),
        ("report empty", "dfine report {folder}/empty: "),
        ("evaluate empty val", "dfine evaluate {folder}/empty: "),
        ("predict empty train --out out", "dfine predict {folder}/empty: "),
        ("export empty --to onnx --out out", "dfine export {folder}/empty: "),
        ("serve empty", "dfine serve {folder}/empty: "),
        ("benchmark empty", "dfine benchmark {folder}/empty: "),
        ("replay empty", "dfine replay {folder}/empty: "),
        ("compare one other", "dfine compare one other: "),
        ("doctor train", "dfine doctor starting Ray …"),
        ("prepare synthetic --images 2 --split a --out out", "dfine prepare synthetic: "),
    ],
)
def test_the_first_line_comes_before_pytorch_and_ray(line: str, first: str, folder: Path) -> None:
    done = run(FIRST_LINE, line.split(), folder)
    assert done.returncode == 3, done.stderr
    lines = done.stderr.splitlines()
    assert lines[0].startswith(first.replace("{folder}", str(folder)))
    assert lines[-1].startswith("importing ")
    assert done.stdout == ""
