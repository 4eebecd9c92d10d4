"""Files under configs/: found by path, and by their name among the shipped ones."""

from pathlib import Path

import pytest

from jobs import recipes
from jobs.train import parser

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "name", ["coco/dfine_s.yaml", "configs/coco/dfine_s.yaml", "clusters/laptop.yaml", "demo.yaml"]
)
def test_a_shipped_file_is_found_from_any_folder(name: str, elsewhere: Path) -> None:
    assert recipes.find(name) == ROOT / "configs" / name.removeprefix("configs/")


def test_a_file_of_the_user_comes_first(elsewhere: Path) -> None:
    (elsewhere / "coco").mkdir()
    (elsewhere / "coco" / "dfine_s.yaml").write_text("")
    assert recipes.find("coco/dfine_s.yaml") == Path("coco/dfine_s.yaml")
    assert recipes.find(str(elsewhere / "coco")) == elsewhere / "coco"


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("coco/dfine_z.yaml", r"did you mean coco/dfine_\w.yaml or"),
        ("configs/smal_data.yaml", "did you mean small_data.yaml"),
        ("mime.yaml", "did you mean mine.yaml"),
        ("/nowhere/at/all.yml", "for example, coco/dfine_s.yaml"),
        ("../configs/coco/dfine_s.yaml", "there is no such file"),
    ],
)
def test_a_file_that_is_nowhere_ends_with_names_that_resemble_it(name: str, hint: str, elsewhere: Path) -> None:
    (elsewhere / "mine.yaml").write_text("")
    with pytest.raises(FileNotFoundError, match=hint) as error:
        recipes.find(name)
    assert str(error.value).startswith(f"{name}: there is no such file")


def test_experiments_and_cluster_files_are_both_found(elsewhere: Path) -> None:
    args = parser().parse_args(["coco/dfine_s.yaml", "--cluster", "clusters/one_node.yaml"])
    assert (args.experiment.is_file(), args.cluster.is_file()) == (True, True)


def test_an_installed_project_has_its_files_inside_the_package(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = elsewhere / "jobs" / "configs"
    (installed / "coco").mkdir(parents=True)
    (installed / "coco" / "dfine_s.yaml").write_text("")
    monkeypatch.setattr(recipes, "INSTALLED", installed)
    assert recipes.names() == ["coco/dfine_s.yaml"]
    assert recipes.find("coco/dfine_s.yaml") == installed / "coco" / "dfine_s.yaml"
