"""Command line of TensorRT's builder: shapes of both inputs, in float32, whatever folder it is called from."""

import os
import subprocess
from pathlib import Path

import pytest

from pipeline.export.tensorrt_files import build_script


@pytest.mark.parametrize(
    ("batch_size", "shapes"),
    [
        (
            None,
            [
                "--minShapes=images:1x3x64x96,orig_target_sizes:1x2",
                "--optShapes=images:1x3x64x96,orig_target_sizes:1x2",
                "--maxShapes=images:8x3x64x96,orig_target_sizes:8x2",
            ],
        ),
        (4, []),
    ],
)
def test_the_script_calls_the_builder_beside_its_file(
    tmp_path: Path, batch_size: int | None, shapes: list[str]
) -> None:
    (tmp_path / "exported folder").mkdir()
    script = tmp_path / "exported folder" / "build.sh"
    script.write_text(build_script((64, 96), batch_size))
    builder = tmp_path / "trtexec"  # prints where it is called, and its arguments
    builder.write_text('#!/bin/sh\npwd\nprintf "%s\\n" "$@"\n')
    builder.chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    called = subprocess.run(["sh", script], env=environment, capture_output=True, text=True, check=True)
    folder, *arguments = called.stdout.splitlines()
    assert folder == str(script.parent)
    assert arguments == ["--onnx=detector.onnx", "--saveEngine=detector.engine", "--noTF32", *shapes]
