"""Write OpenVINO's intermediate representation: detector.xml and detector.bin in a folder."""

import tempfile
from pathlib import Path
from typing import Any

from dfine_core.runtimes.openvino_file import METADATA
from dfine_core.runtimes.program import described_as_text
from pipeline.export.onnx_files import portable_model
from pipeline.export.source import ExportSource

MODEL_FILE = "detector.xml"


def write_openvino(source: ExportSource, path: Path) -> None:
    """Write weights in single precision."""
    save(source, converted(source), path, compressed=False)


def write_openvino_half(source: ExportSource, path: Path) -> None:
    """Write weights in half precision, which OpenVINO widens when it opens the file."""
    save(source, converted(source), path, compressed=True)


def converted(source: ExportSource) -> Any:
    """Model of OpenVINO, whose operators keep the names of the ONNX nodes."""
    import openvino  # type: ignore[import-untyped]

    with tempfile.TemporaryDirectory() as folder:
        portable = Path(folder) / "detector.onnx"
        portable.write_bytes(portable_model(source).SerializeToString())
        return openvino.Core().read_model(portable)  # unlike convert_model it sends no usage statistics


def save(source: ExportSource, model: Any, path: Path, *, compressed: bool) -> None:
    """Write a model with the metadata of the detector into a new folder."""
    import openvino

    for key, value in described_as_text(source.description).items():
        model.set_rt_info(value, [METADATA, key])
    path.mkdir()
    openvino.save_model(model, path / MODEL_FILE, compress_to_fp16=compressed)
