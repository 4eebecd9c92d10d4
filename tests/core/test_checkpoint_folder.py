"""Checkpoint folders on a reader in memory: complete ones, the best one, and damaged ones."""

import hashlib
import json

import pytest

from dfine_core.checkpoints.folder import (
    FileReader,
    LoadError,
    checkpoints_by_rank,
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
    assert checkpoints_by_rank("c", reader(checkpoint(3) | checkpoint(20, best_step=3)))[0] == "c/step-00000003"
    assert checkpoints_by_rank("c", reader(checkpoint(3, best_step=3) | checkpoint(20)))[0] == "c/step-00000020"
    assert checkpoints_by_rank("c", reader({"c/step-00000030/ema.safetensors": b""})) == []


def sealed(step: int, best_step: int, *evaluated: tuple[int, float]) -> dict[str, bytes]:
    content = {"step": step, "history": {"best_step": best_step, "evaluated": evaluated}}
    return {f"c/{step_folder(step)}/metadata.json": sealed_metadata(content)}


def test_checkpoints_are_ranked_by_the_newest_intact_metadata(caplog: pytest.LogCaptureFixture) -> None:
    files = sealed(2, 2, (2, 0.3)) | sealed(4, 2, (2, 0.3), (4, 0.2)) | sealed(6, 6, (2, 0.3), (4, 0.2), (6, 0.4))
    files |= sealed(7, 6, (2, 0.3), (4, 0.2), (6, 0.4))
    assert checkpoints_by_rank("c", reader(files)) == [f"c/{step_folder(step)}" for step in (6, 2, 4, 7)]
    assert not caplog.records

    newest = f"c/{step_folder(7)}/metadata.json"
    files[newest] = files[newest].replace(b'"best_step": 6', b'"best_step": 4')
    assert checkpoints_by_rank("c", reader(files))[0] == f"c/{step_folder(6)}"
    assert f"{newest}: is damaged: not what was written (SHA-256); trying the checkpoint before it" in caplog.text

    with pytest.raises(LoadError, match=f"{step_folder(7)}/metadata.json: is damaged"):
        checkpoints_by_rank("c", reader({name: content.replace(b"best", b"bust") for name, content in files.items()}))


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
