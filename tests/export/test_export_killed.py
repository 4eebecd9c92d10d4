"""An export that is killed while it moves its files into place: the same command exports again."""

import json
import os
import signal
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest

from dfine_core.inference import load
from pipeline.export import export as exporting
from pipeline.export.check_images import from_synthetic_images
from pipeline.export.export import ARRIVING, STAGING, export
from tests.support.varied_detectors import loaded, small

FORMATS = ["released", "safetensors"]


def export_and_die(out: Path, moves: int) -> None:
    """Export, and die after so many files have been moved: before the next one, or before the report."""
    exporting._move_into_place = dying(exporting._move_into_place, moves + 1)
    if moves == len(FORMATS):
        exporting._write_report = dying(exporting._write_report, 2)
    export(loaded(small(num_layers=1)), FORMATS, out, from_synthetic_images(1, longest_side=64))


def dying(function: Any, at: int) -> Any:
    calls = 0

    def die_or_do(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments)

    return die_or_do


@pytest.mark.slow  # six processes that import everything
@pytest.mark.parametrize("earlier", [False, True], ids=["new folder", "over an earlier export"])
def test_an_export_killed_among_its_files_is_repeated_by_the_same_command(earlier: bool, tmp_path: Path) -> None:
    images = from_synthetic_images(1, longest_side=64)
    if earlier:
        assert export(loaded(small(num_layers=2)), FORMATS, tmp_path, images).accepted
    for moves in range(len(FORMATS) + 1):
        child = get_context("spawn").Process(target=export_and_die, args=(tmp_path, moves))
        child.start()
        child.join()
        assert child.exitcode == -signal.SIGKILL
        assert list(tmp_path.glob(f"{STAGING}*")) or moves == len(FORMATS)
    detector = loaded(small(num_layers=1))
    assert export(detector, FORMATS, tmp_path, images).accepted
    assert sorted(path.name for path in tmp_path.iterdir()) == ["detector.pth", "export.json", "safetensors"]
    assert ARRIVING not in json.loads((tmp_path / "export.json").read_text())
    assert load(tmp_path, "cpu").config == detector.config


def test_the_folder_of_an_export_that_lives_is_left_alone(tmp_path: Path) -> None:
    with exporting._staging(tmp_path) as alive:
        (alive / "detector.onnx").write_bytes(b"half")
        with exporting._staging(tmp_path):
            assert (alive / "detector.onnx").exists()
    assert list(tmp_path.iterdir()) == []
