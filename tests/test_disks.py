"""Full and read-only disks: every command ends in one sentence with the path and the way out."""

import errno
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from jobs import evaluate, export, predict, train, tune, weights
from jobs.command import user_errors
from pipeline import storage
from pipeline.errors import os_error_text
from pipeline.export.source import ExportSource
from pipeline.export.writers import write_safetensors
from pipeline.tracking.outbox import Outbox
from tests.support.small_detectors import small_detector
from tests.support.synthetic_shards import synthetic_records, write_shards

FULL, READ_ONLY = "no space is left on its disk: free some", "its file system is read-only: choose another folder"


@contextmanager
def small_disk(folder: Path, options: str) -> Iterator[Path]:
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("only root mounts a disk")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.fixture(params=["full", "read-only"])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A disk of its own that cannot be written, and the sentence about it."""
    with small_disk(tmp_path / "disk", "size=64k" if request.param == "full" else "ro") as folder:
        if request.param == "full":
            (folder / "ballast").write_bytes(bytes(48 << 10))
        yield folder, FULL if request.param == "full" else READ_ONLY


def test_a_failed_write_names_its_file_and_leaves_nothing(disk: tuple[Path, str], tmp_path: Path) -> None:
    folder, sentence = disk
    before = sorted(path.name for path in folder.rglob("*"))
    with pytest.raises(OSError, match=folder.name) as raised, storage.open_atomic(tmp_path / "other"):
        storage.write_atomic(folder / "deep" / "file", bytes(1 << 20))
    assert os_error_text(raised.value).startswith(f"{folder}/deep")
    assert sentence in os_error_text(raised.value)
    assert sorted(path.name for path in folder.rglob("*") if path.is_file()) == before
    assert not (tmp_path / "other").exists()


def test_a_command_ends_with_the_sentence(disk: tuple[Path, str], capsys: pytest.CaptureFixture[str]) -> None:
    folder, sentence = disk
    with pytest.raises(SystemExit, match=f"{folder}/file: {sentence}"), user_errors():
        storage.write_atomic(folder / "file", bytes(1 << 20))


@pytest.mark.parametrize(
    ("code", "words"), [(errno.EDQUOT, "quota"), (errno.EACCES, "permission"), (errno.EPERM, "not permitted")]
)
def test_other_faults_have_sentences_too(code: int, words: str) -> None:
    text = os_error_text(OSError(code, os.strerror(code), "/data/out"))
    assert text.startswith("/data/out: ")
    assert words in text
    assert "choose another folder" in text


def test_a_name_that_is_too_long_is_said(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="the name is too long: choose a shorter one"), user_errors():
        storage.write_atomic(tmp_path / ("n" * 300), b"")


def test_a_disk_without_room_for_the_outbox_is_named(disk: tuple[Path, str]) -> None:
    folder, sentence = disk
    with pytest.raises(OSError, match=folder.name) as raised:
        Outbox(folder / "run", "key", {"setting": "x" * 200_000})
    assert sentence in os_error_text(raised.value)


INDEX = """
from pipeline.data.sources.index import AnnotationIndex, BoxEntry, temporary_files_named
with temporary_files_named():
    AnnotationIndex().add_boxes(BoxEntry(1, 1.5, 2.5, 3.5, 4.5, 0, 9.5, False, "long" * 2000) for n in range(6000))  # 48 MB
"""


def test_a_full_disk_for_temporary_files_is_named(disk: tuple[Path, str]) -> None:
    folder, sentence = disk
    ended = subprocess.run(
        [sys.executable, "-c", INDEX],
        env=os.environ | {"SQLITE_TMPDIR": str(folder), "TMPDIR": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )
    message = (
        f"SourceError: {folder}: the index of the annotations cannot be written: database or disk is full; free space"
    )
    assert (message in ended.stderr) == (sentence == FULL), ended.stderr


@pytest.mark.slow
@pytest.mark.parametrize("command", ["predict", "export", "weights", "evaluate", "train", "tune"])
def test_every_command_ends_with_the_path_of_a_disk(disk: tuple[Path, str], tmp_path: Path, command: str) -> None:
    folder, sentence = disk
    records = synthetic_records(6, longest_side=64)
    write_shards(tmp_path / "shards", records)
    (tmp_path / "images").mkdir()
    for record in records:
        (tmp_path / "images" / record.file_name).write_bytes(record.image)
    write_safetensors(ExportSource(small_detector()), tmp_path / "detector")
    experiment = {
        "data": {"train": str(tmp_path / "shards"), "val": str(tmp_path / "shards")},
        "model": {"variant": "n", "input_size": [64, 64], "num_queries": 20, "num_denoising": 10},
        "schedule": {"steps": 2, "global_batch_size": 2, "no_aug_epochs": 0},
    }
    (tmp_path / "run.yaml").write_text(json.dumps(experiment))
    detector, out = str(tmp_path / "detector"), str(folder / "out")
    sweep = {"name": "sweep", "storage": out, "experiment": str(tmp_path / "run.yaml"), "searcher": {"kind": "grid"}}
    sweep |= {"space": {"loss.ddf": {"grid": [0.0]}}, "scheduler": {"kind": "none"}}
    (tmp_path / "sweep.yaml").write_text(json.dumps(sweep))
    run, arguments = {
        "predict": (predict.main, [detector, str(tmp_path / "images"), "--out", out, "--workers", "0"]),
        "export": (export.main, [detector, "--to", "safetensors", "--out", out]),
        "weights": (weights.main, ["convert", detector, "--to", "safetensors", "--out", out]),
        "evaluate": (evaluate.main, [detector, str(tmp_path / "shards"), "--out", out]),
        "train": (train.main, [str(tmp_path / "run.yaml"), "--set", f"storage={out}"]),
        "tune": (tune.main, [str(tmp_path / "sweep.yaml")]),
    }[command]
    with pytest.raises(SystemExit) as ended:
        run(arguments)
    assert str(ended.value).startswith(str(folder))
    assert sentence in str(ended.value)


@pytest.mark.slow
def test_a_disk_that_fills_under_two_workers_ends_them_and_the_run_goes_on_once_there_is_room(tmp_path: Path) -> None:
    write_shards(tmp_path / "shards", synthetic_records(8, longest_side=64))
    experiment = {
        "data": {"train": str(tmp_path / "shards"), "val": None},
        "model": {"variant": "n", "input_size": [64, 64], "num_queries": 20, "num_denoising": 10},
        "schedule": {"steps": 4, "global_batch_size": 4, "micro_batch_size": 2, "no_aug_epochs": 0},
        "checkpoints": {"every_steps": 1},
    }
    (tmp_path / "run.yaml").write_text(json.dumps(experiment))
    (tmp_path / "two.yaml").write_text(json.dumps({"workers": 2, "cpus_per_worker": 0.5, "max_failures": 0}))
    with small_disk(tmp_path / "disk", "size=90m") as folder:  # one checkpoint fits, two do not
        words = ["train", str(tmp_path / "run.yaml"), "--cluster", str(tmp_path / "two.yaml"), "--name", "run"]
        command = [sys.executable, "-m", "jobs", *words, "--set", f"storage={folder}"]
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        full = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
        assert full.returncode == 1
        # Ray's own processes may still print after it.
        sentences = [line for line in full.stderr.splitlines() if line.startswith(f"{folder}/run/checkpoints/")]
        assert len(sentences) == 1, full.stderr
        assert FULL in sentences[0]
        assert [path.name for path in (folder / "run" / "checkpoints").glob("step-*")] == ["step-00000001"]

        subprocess.run(["mount", "-o", "remount,size=600m", folder], check=True)
        roomy = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
        assert roomy.returncode == 0, roomy.stdout + roomy.stderr
        assert "continuing at step 1 from" in roomy.stdout + roomy.stderr
        assert (folder / "run" / "checkpoints" / "step-00000004" / "metadata.json").exists()
