"""The distribution: its version, the files in its wheel, and the core installed alone, without any extra."""

import json
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from safetensors.torch import save_file

import dfine_core
from pipeline import provenance

ROOT = Path(__file__).parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGES = ("dfine_core", "pipeline", "jobs")
UV = Path(sys.executable).with_name("uv")
BUILD = "import setuptools.build_meta as backend, sys; backend.build_wheel(sys.argv[1])"
CORE_ALONE = """
import json, sys
import numpy as np
import torch
import dfine_core
from dfine_core import Detector, ModelConfig, load

torch.set_num_threads(1)
image = np.load("image.npy")
(found,) = load("detector", "cpu")(image, threshold=0.0)
missing = []
for name in ("ray", "mlflow", "pydantic", "yaml", "pyarrow", "cv2"):
    try:
        __import__(name)
    except ModuleNotFoundError as error:
        missing.append(error.name)
output = Detector(ModelConfig.variant("n", num_classes=2, input_size=(64, 64), num_queries=10)).eval()(torch.rand(1, 3, 64, 64))
print(json.dumps({
    "home": dfine_core.__file__, "version": dfine_core.__version__, "missing": missing,
    "scores": found.scores.tolist(), "boxes": found.boxes.tolist(), "queries": output.logits.shape[1],
}))
"""


def test_the_version_is_that_of_the_project() -> None:
    assert PYPROJECT["project"]["name"] == dfine_core.DISTRIBUTION
    assert dfine_core.__version__ == metadata.version("ray-dfine") == PYPROJECT["project"]["version"]


def test_a_source_tree_that_is_not_installed_has_an_unknown_version(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    assert dfine_core.__version__ == "unknown"


def test_a_checkpoint_records_the_projects_version() -> None:
    assert provenance.versions()["ray-dfine"] == PYPROJECT["project"]["version"]


# The wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this tree, built by the backend that pyproject.toml names, in a copy."""
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copyfile(ROOT / name, tree / name)
    for name in (*PACKAGES, "configs"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    assert PYPROJECT["build-system"]["build-backend"] == "setuptools.build_meta"
    subprocess.run([sys.executable, "-c", BUILD, str(out)], cwd=tree, check=True, capture_output=True, timeout=120)
    (path,) = out.glob("ray_dfine-*.whl")
    return path


def test_the_wheel_holds_every_file_of_the_packages_and_every_config(wheel: Path) -> None:
    inside = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    files = [path for package in PACKAGES for path in (ROOT / package).rglob("*") if path.is_file()]
    expected = {str(path.relative_to(ROOT)) for path in files if path.suffix != ".pyc"}
    recipes = {str(path.relative_to(ROOT)) for path in (ROOT / "configs").rglob("*.yaml")}
    assert len(recipes) > 30
    assert inside == expected | {f"jobs/{name}" for name in recipes}


def test_every_package_is_marked_as_typed_in_the_wheel(wheel: Path) -> None:
    inside = set(zipfile.ZipFile(wheel).namelist())
    tops = {name.split("/")[0] for name in inside if ".dist-info/" not in name}
    assert tops == set(PACKAGES)
    assert {f"{package}/py.typed" for package in tops} <= inside


def test_the_wheel_installs_the_command(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (name,) = [name for name in archive.namelist() if name.endswith("/entry_points.txt")]
    assert archive.read(name).decode().split() == ["[console_scripts]", "dfine", "=", "jobs.__main__:main"]


# The extras


def requirements(extra: str = "") -> set[str]:
    project = PYPROJECT["project"]
    texts = project["optional-dependencies"][extra] if extra else project["dependencies"]
    return {canonicalize_name(Requirement(text).name) for text in texts}


def test_the_core_needs_six_packages() -> None:
    assert requirements() == {"torch", "torchvision", "scipy", "numpy", "pillow", "safetensors"}


def test_extras_build_on_each_other() -> None:
    texts = PYPROJECT["project"]["optional-dependencies"]
    assert set(texts) == {"train", "serve", "export", "teachers", "dev"}
    assert "ray-dfine[train]" in texts["serve"]
    assert "ray-dfine[train]" in texts["export"]
    assert "ray-dfine[train]" in texts["teachers"]
    assert "ray-dfine[export,serve,teachers]" in texts["dev"]
    assert not requirements("train") & requirements()


def test_the_lock_has_every_requirement() -> None:
    locked = {line.split("==")[0] for line in (ROOT / "requirements.lock").read_text().splitlines() if "==" in line}
    needed = set().union(*(requirements(extra) for extra in ("", *PYPROJECT["project"]["optional-dependencies"])))
    assert len(needed) > 30
    assert needed - {"ray-dfine"} - locked == set()


# The core alone


def closure(names: set[str]) -> Iterator[metadata.Distribution]:
    """Distributions of this environment that some distributions need, extras left out."""
    waiting, seen = sorted(names), set(names)
    while waiting:
        distribution = metadata.distribution(waiting.pop())
        yield distribution
        for text in distribution.requires or ():
            requirement = Requirement(text)
            name = canonicalize_name(requirement.name)
            if name not in seen and (requirement.marker is None or requirement.marker.evaluate({"extra": ""})):
                seen.add(name)
                waiting.append(name)


@pytest.fixture(scope="module")
def core_alone(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Executables of a new environment with the wheel, and of this environment only what the core needs, as links."""
    folder = tmp_path_factory.mktemp("core")
    subprocess.run([UV, "venv", "--quiet", "--python", sys.executable, folder / "venv"], check=True, timeout=60)
    install = [UV, "pip", "install", "--quiet", "--offline", "--no-deps", "--python", folder / "venv/bin/python", wheel]
    subprocess.run(install, check=True, timeout=60)
    links = folder / "links"
    links.mkdir()
    for distribution in closure(requirements()):
        for top in {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}:
            if not (links / top).exists():
                (links / top).symlink_to(Path(str(distribution.locate_file(top))).resolve())
    (site,) = folder.glob("venv/lib/python*/site-packages")
    (site / "core.pth").write_text(f"{links}\n")
    return folder / "venv" / "bin"


@pytest.fixture
def anywhere(tmp_path: Path) -> Path:
    """A folder with a detector's folder, an image and an experiment."""
    torch.manual_seed(0)
    config = dfine_core.ModelConfig.variant("n", num_classes=2, input_size=(64, 64), num_queries=10)
    weights = {name: tensor.clone() for name, tensor in dfine_core.Detector(config).state_dict().items()}
    (tmp_path / "detector").mkdir()
    save_file(weights, tmp_path / "detector" / "model.safetensors")
    (tmp_path / "detector" / "detector.json").write_text(
        json.dumps({"config": asdict(config), "categories": ["a", "b"]})
    )
    np.save(tmp_path / "image.npy", np.random.default_rng(0).integers(0, 256, (48, 80, 3), dtype=np.uint8))
    (tmp_path / "mine.yaml").write_text("schedule: {steps: 2}\n")
    return tmp_path


def run(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    return subprocess.run(command, cwd=cwd, env=clean, capture_output=True, text=True, check=False, timeout=120)


def test_the_core_works_without_any_extra(core_alone: Path, anywhere: Path) -> None:
    done = run(core_alone / "python", "-c", CORE_ALONE, cwd=anywhere)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert Path(result["home"]).is_relative_to(core_alone.parent)
    assert result["version"] == PYPROJECT["project"]["version"]
    assert result["missing"] == ["ray", "mlflow", "pydantic", "yaml", "pyarrow", "cv2"]
    assert result["queries"] == 10
    # The same detections as here.
    (found,) = dfine_core.load(anywhere / "detector", "cpu")(np.load(anywhere / "image.npy"), threshold=0.0)
    assert result["scores"] == pytest.approx(found.scores.tolist(), abs=1e-5)
    assert np.allclose(result["boxes"], found.boxes.numpy(), atol=1e-2)


def test_the_command_helps_and_finds_recipes_without_any_extra(core_alone: Path, anywhere: Path) -> None:
    for words in (["--help"], ["train", "--help"], ["prepare", "coco", "--help"], ["serve", "--help"]):
        done = run(core_alone / "dfine", *words, cwd=anywhere)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.startswith("usage: dfine ")
    assert (
        run(core_alone / "dfine", "--version", cwd=anywhere).stdout == f"ray-dfine {PYPROJECT['project']['version']}\n"
    )
    wrong = run(core_alone / "dfine", "train", "coco/dfine_z.yaml", cwd=anywhere)
    assert "did you mean coco/dfine_" in wrong.stderr


@pytest.mark.parametrize(
    ("line", "extra"),
    [
        ("train mine.yaml", "train"),
        ("train coco/dfine_s.yaml --cluster clusters/one_node.yaml", "train"),
        ("tune sweeps/demo.yaml", "train"),
        ("pretrain-finetune chains/demo.yaml", "train"),
        ("prepare synthetic --images 2 --split a --out out", "train"),
        ("doctor detector", "train"),
        ("evaluate detector detector", "train"),
        ("predict detector image.npy --out out", "train"),
        ("benchmark detector", "train"),
        ("compare one other", "train"),
        ("lineage one", "train"),
        ("replay detector", "train"),
        ("serve detector", "serve"),
        ("export detector --to onnx --out out", "export"),
    ],
)
def test_a_command_without_its_extra_ends_with_the_one_to_install(
    line: str, extra: str, core_alone: Path, anywhere: Path
) -> None:
    done = run(core_alone / "dfine", *line.split(), cwd=anywhere)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert f'pip install "ray-dfine[{extra}]"' in done.stderr.splitlines()[-1]
