"""A password in the tracking server's address is never printed, not even when the server is unreachable."""

import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import jobs.benchmark
import jobs.compare
import jobs.evaluate
import jobs.export
import jobs.lineage
import jobs.predict
from pipeline.open_detector import open_detector
from pipeline.tracking.client import connect, find_run, resolve
from pipeline.tracking.model_registry import register
from pipeline.training.init_weights import materialize_init
from tests.support.synthetic_shards import synthetic_records, write_shards

PASSWORD = "hunter2"
MODEL = "models:/shapes@champion"
Call = Callable[[Path], Any]


@pytest.fixture
def address(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Address of a server that refuses every connection."""
    with socket.socket() as listening:  # bound, but not listening
        listening.bind(("127.0.0.1", 0))
        uri = f"http://bob:{PASSWORD}@127.0.0.1:{listening.getsockname()[1]}"
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        yield uri


COMMANDS: dict[str, Call] = {
    "lineage": lambda folder: jobs.lineage.main(["mine"]),
    "compare": lambda folder: jobs.compare.main(["one", "other"]),
    "export": lambda folder: jobs.export.main([MODEL, "--to", "safetensors", "--out", str(folder / "out")]),
    "benchmark": lambda folder: jobs.benchmark.main([MODEL]),
    "evaluate": lambda folder: jobs.evaluate.main([MODEL, str(folder / "shards")]),
    "predict": lambda folder: jobs.predict.main([MODEL, str(folder / "shards"), "--out", str(folder / "out")]),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_print_no_password(
    name: str, address: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    write_shards(tmp_path / "shards", synthetic_records(2))
    with pytest.raises(SystemExit) as ended:
        COMMANDS[name](tmp_path)
    output = "".join(capfd.readouterr()) + caplog.text + str(ended.value)
    assert PASSWORD not in output
    assert "bob" not in output
    assert "***@127.0.0.1" in output
    assert ended.value.__cause__ is None


@pytest.mark.parametrize(
    "call",
    [
        lambda address, folder: open_detector(MODEL),
        lambda address, folder: resolve(connect(address), MODEL),
        lambda address, folder: find_run(connect(address), "mine"),
        lambda address, folder: register(address, "0" * 32, "shapes"),
        lambda address, folder: materialize_init(MODEL, str(folder / "run"), address),
    ],
    ids=["open_detector", "resolve", "find_run", "register", "materialize_init"],
)
def test_errors_hold_no_password(call: Callable[[str, Path], Any], address: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\*\*\*@127\.0\.0\.1") as error:
        call(address, tmp_path)
    assert PASSWORD not in str(error.value)
