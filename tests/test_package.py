"""The distribution: its version, and that its types reach whoever installs it."""

import tomllib
from importlib import metadata
from pathlib import Path

import pytest

import dfine_core
from pipeline import provenance

ROOT = Path(__file__).parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


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


def test_every_package_is_marked_as_typed_and_the_mark_is_installed() -> None:
    packaging = PYPROJECT["tool"]["setuptools"]
    packages = [pattern.removesuffix("*") for pattern in packaging["packages"]["find"]["include"]]
    assert packages == ["dfine_core", "pipeline", "jobs"]
    for package in packages:
        assert (ROOT / package / "py.typed").is_file()
        assert "py.typed" in packaging["package-data"][package]
