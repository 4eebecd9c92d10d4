"""What `ray job submit --working-dir .` uploads from a clone in which README's commands were run: code and configs alone."""

import re
import shutil
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest
from ray._private.runtime_env.packaging import create_package
from ray._private.runtime_env.working_dir import upload_working_dir_if_needed

ROOT = Path(__file__).parent.parent
NEEDED = ("configs", "dfine_core", "jobs", "pipeline")
STAY_AT_HOME = ("benchmarks", "docs", "tests")
RUN_FILES = ("runs/mine/checkpoints/step-00000010/model.safetensors", "runs/mlflow.db", "mlruns/0/meta.yaml")
OUTPUT = re.compile(r"--(?:out|html|json)\s+([\w.][\w./-]*)(?![\w./:-])")  # relative, and no s3://


def git(folder: Path, *arguments: str) -> list[str]:
    done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stderr  # 1: `git check-ignore` found none
    return done.stdout.splitlines()


def outputs_of_documented_commands() -> list[str]:
    """Relative paths behind --out, --html and --json in the commands that are shown to a user."""
    shown = [ROOT / "README.md", ROOT / "Makefile", *(ROOT / "docs").rglob("*.md"), *(ROOT / "configs").rglob("*.yaml")]
    return sorted({path for file in shown for path in OUTPUT.findall(file.read_text())})


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of this tree that git has or would take, with everything beside them that documented commands write."""
    folder = tmp_path_factory.mktemp("clone")
    for name in git(ROOT, "ls-files", "--cached", "--others", "--exclude-standard"):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
    git(folder, "init", "--quiet")
    for path in written_files():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(b"data")
    return folder


def written_files() -> list[str]:
    outputs = [path if Path(path).suffix else f"{path}/part-00000.parquet" for path in outputs_of_documented_commands()]
    return [*outputs, *RUN_FILES, "report/index.html", ".venv/bin/python"]


@pytest.fixture(scope="module")
def uploaded(clone: Path, tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Names in the package that Ray's job client would send, made by Ray itself."""
    package = tmp_path_factory.mktemp("package") / "package.zip"

    def upload(working_dir: str, excludes: list[str], is_file: bool = False) -> None:
        create_package(working_dir, package, include_gitignore=True, excludes=excludes)

    environment: dict[str, Any] = {"working_dir": str(clone)}
    upload_working_dir_if_needed(environment, include_gitignore=True, upload_fn=upload)
    return {name for name in zipfile.ZipFile(package).namelist() if not name.endswith("/")}


def test_the_documented_commands_write_where_this_test_looks() -> None:
    folders = {path.split("/")[0] for path in outputs_of_documented_commands()}
    assert {"shards", "evaluation", "found", "found_val", "explained", "exported", "demo"} <= folders
    assert {"report.html", "speed.json"} <= folders


def test_a_job_uploads_all_code_and_configs(clone: Path, uploaded: set[str]) -> None:
    needed = {name for name in git(clone, "ls-files", "--others", "--exclude-standard") if name.startswith(NEEDED)}
    assert {
        "configs/chains/demo/pretrain.yaml",
        "pipeline/config.py",
        "dfine_core/checkpoints/class_names.json",
    } <= needed
    assert needed <= uploaded


def test_a_job_uploads_nothing_that_a_command_wrote(clone: Path, uploaded: set[str]) -> None:
    for path in written_files():
        assert (clone / path).exists()
    assert not uploaded & set(written_files())


def test_a_job_uploads_no_tests_documents_or_benchmarks(clone: Path, uploaded: set[str]) -> None:
    for folder in STAY_AT_HOME:
        assert any((clone / folder).rglob("*")), folder
    assert not [name for name in uploaded if name.startswith(STAY_AT_HOME)]


def test_git_ignores_what_commands_write_and_no_file_of_the_project(clone: Path) -> None:
    assert set(git(clone, "check-ignore", *written_files())) == set(written_files())
    assert not git(clone, "check-ignore", "configs/chains/demo", "configs/chains/demo/pretrain.yaml")
    assert not git(ROOT, "ls-files", "--cached", "--ignored", "--exclude-standard")


def test_a_link_to_shards_on_another_disk_is_ignored_too(tmp_path: Path) -> None:
    git(tmp_path, "init", "--quiet")
    shutil.copyfile(ROOT / ".gitignore", tmp_path / ".gitignore")
    (tmp_path / "shards").symlink_to(tmp_path.parent)
    assert git(tmp_path, "check-ignore", "shards") == ["shards"]
