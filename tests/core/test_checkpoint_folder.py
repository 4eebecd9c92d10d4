"""Checkpoint folders on a reader in memory: complete ones, the best one, and damaged ones."""

import hashlib
import json

import pytest

from dfine_core.checkpoints.folder import (
    FileReader,
    LoadError,
    best_checkpoint,
    complete_steps,
    read_detector,
    read_metadata,
    read_tensor_file,
    sealed_metadata,
    step_folder,
)


def reader(files: dict[str, bytes]) -> FileReader:
    """Reader of files in memory, as in an object store: a folder exists if anything lies below it."""

    def list_folder(folder: str) -> list[str]:
        if folder in files:
            raise NotADirectoryError(folder)
        below = [path.removeprefix(f"{folder}/") for path in files if path.startswith(f"{folder}/")]
        if not below:
            raise FileNotFoundError(folder)
        return sorted({path.split("/")[0] for path in below})

    def read(path: str) -> bytes:
        try:
            return files[path]
        except KeyError:
            raise FileNotFoundError(path) from None

    return FileReader(read=read, list_folder=list_folder)


def checkpoint(step: int, best_step: int | None = None) -> dict[str, bytes]:
    return {f"c/{step_folder(step)}/metadata.json": json.dumps({"history": {"best_step": best_step}}).encode()}


def test_only_folders_with_metadata_are_complete() -> None:
    files = checkpoint(20) | checkpoint(3) | {"c/step-00000030/ema.safetensors": b"", "c/step-00000040": b"a file"}
    files |= {"c/.step-00000050.partial/metadata.json": b"{}", "c/step-last/metadata.json": b"{}"}
    assert complete_steps("c", reader(files)) == [3, 20]
    assert complete_steps("nowhere", reader(files)) == []


def test_the_best_checkpoint_is_the_one_the_newest_names_or_the_newest() -> None:
    assert best_checkpoint("c", reader(checkpoint(3) | checkpoint(20, best_step=3))) == "c/step-00000003"
    assert best_checkpoint("c", reader(checkpoint(3, best_step=3) | checkpoint(20))) == "c/step-00000020"
    assert best_checkpoint("c", reader({"c/step-00000030/ema.safetensors": b""})) is None


@pytest.mark.parametrize("content", [b"{", b"\xff", b"[1]"])
def test_metadata_that_is_no_json_object_is_named(content: bytes) -> None:
    with pytest.raises(LoadError, match=r"f/metadata\.json: cannot be read"):
        read_metadata("f", reader({"f/metadata.json": content}))
    with pytest.raises(LoadError, match=r"f: not a checkpoint, it has no metadata\.json"):
        read_metadata("f", reader({"f/other": b""}))


def test_metadata_that_was_edited_or_moved_is_named() -> None:
    sealed = sealed_metadata({"step": 3, "rate": 1e-5, "run": "caf\u00e9"})
    assert read_metadata("c/step-00000003", reader({"c/step-00000003/metadata.json": sealed}))["rate"] == 1e-5
    edited = sealed.replace(b"1e-05", b"1e-04")
    assert edited != sealed
    with pytest.raises(LoadError, match=r"step-00000003/metadata\.json: is damaged: not what was written"):
        read_metadata("c/step-00000003", reader({"c/step-00000003/metadata.json": edited}))
    with pytest.raises(LoadError, match="it is of step 3, the folder of step 4"):
        read_metadata("c/step-00000004", reader({"c/step-00000004/metadata.json": sealed}))
    assert read_metadata("c/best", reader({"c/best/metadata.json": sealed}))["step"] == 3  # a copy under a name


def test_a_tensor_file_is_read_only_if_it_is_what_was_written() -> None:
    files = reader({"f/ema.safetensors": b"content"})
    assert read_tensor_file("f", "ema", hashlib.sha256(b"content").hexdigest(), files) == b"content"
    for digest in (hashlib.sha256(b"other").hexdigest(), None):
        with pytest.raises(LoadError, match=r"f/ema\.safetensors: is damaged"):
            read_tensor_file("f", "ema", digest, files)
    with pytest.raises(LoadError, match=r"f/model\.safetensors: is missing"):
        read_tensor_file("f", "model", None, files)


def test_a_missing_folder_a_file_and_an_empty_run_have_messages_of_their_own() -> None:
    files = reader({"model.onnx": b"", "run/run.json": b"{}", "run/checkpoints/step-00000001/ema.safetensors": b""})
    for source, message in (
        ("nowhere", "^nowhere does not exist$"),
        ("model.onnx", "^model.onnx: no detector, but a file; give the folder"),
        ("run", r"^run: no detector \(it holds checkpoints, run\.json\)\. Expected the folder"),
    ):
        with pytest.raises(LoadError, match=message):
            read_detector(source, files)


def test_the_folder_of_an_export_stands_for_its_exact_weights() -> None:
    damaged = {"out/safetensors/detector.json": b"{", "out/safetensors/model.safetensors": b""}
    other = {"out/huggingface/config.json": b"{", "out/huggingface/model.safetensors": b"", "out/export.json": b"{}"}
    with pytest.raises(LoadError, match=r"^out/safetensors: its detector"):
        read_detector("out", reader(damaged | other))
    with pytest.raises(LoadError, match=r"^out/huggingface"):
        read_detector("out", reader(other))


def test_an_export_without_a_folder_of_weights_names_what_opens() -> None:
    files = {"out/export.json": b"{}", "out/detector.onnx": b""}
    with pytest.raises(LoadError, match=r"\(detector\.onnx\): export the detector with --to safetensors as well"):
        read_detector("out", reader(files))
    with pytest.raises(LoadError, match=r"give out/detector\.pth"):
        read_detector("out", reader({**files, "out/detector.pth": b""}))
