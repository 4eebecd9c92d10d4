"""Formats of an export, one line each: what is written, what opens it, and how far it may differ from the detector.

To add a format: a writer in a module of its own, a runtime in `dfine_core.runtimes.files` if no other format has it, and a line
in FORMATS. `gate.py` runs every opening of a written file, and `jobs/export.py` has the name in its help.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dfine_core.agreement import FULL, HALF, INT8, Tolerance
from dfine_core.inference import LoadedDetector
from dfine_core.runtimes.files import runtime_of
from dfine_core.runtimes.program import DEFAULT, F32
from pipeline.export import onnx_files, onnx_int8, openvino_files, openvino_int8, tensorrt_files, writers
from pipeline.export.openings import DetectFunction, open_huggingface, open_released, open_safetensors
from pipeline.export.source import ExportSource


@dataclass(frozen=True)
class Opening:
    """One way to open a written file, which is one row of its verdict."""

    runtime: str
    # In a process of its own: module:function of `dfine_core.runtimes.files.Opener`. In this one: a function, for weights that
    # PyTorch computes with here.
    opener: str | Callable[[Path, LoadedDetector], DetectFunction]
    precision: str = F32
    decides: bool = True  # False: a refusal is reported, and the file is accepted for the other rows
    way_out: str | None = None  # for a refusal that does not decide
    one_per_query: bool = (
        False  # its postprocessing keeps as many detections as there are queries, where others keep 300
    )


@dataclass(frozen=True)
class ExportFormat:
    """Writer of a format, and its openings."""

    file: str  # file or folder below the export folder
    write: Callable[[ExportSource, Path], None]
    openings: tuple[Opening, ...]
    tolerance: Tolerance = FULL
    opened: str | None = None  # file inside the folder that the openers take; None: the whole
    extra: str | None = "export"  # name in ray-dfine[...] that installs the writer and the runtimes
    calibrated: bool = False  # needs images with ground truth when it is written

    def opened_path(self, written: Path) -> Path:
        """Path for the openers."""
        return written / self.opened if self.opened else written


def opening_of(path: str, precision: str = F32, *, decides: bool = True) -> Opening:
    """Opening of a file by the runtime of its suffix."""
    runtime = runtime_of(path)
    return Opening(runtime.name, runtime.opener, precision, decides)


ONNX_RUNTIME = opening_of(".onnx")
OPENVINO = opening_of(".xml")
# On many CPUs bfloat16, which few detectors can stand.
OPENVINO_DEFAULT = Opening(
    OPENVINO.runtime, OPENVINO.opener, DEFAULT, decides=False, way_out="open it with INFERENCE_PRECISION_HINT=f32"
)
TORCH_EXPORT = opening_of(".pt2")

FORMATS = {
    "onnx": ExportFormat("detector.onnx", onnx_files.write_onnx, (ONNX_RUNTIME,)),
    "onnx-portable": ExportFormat(
        "detector-portable.onnx", onnx_files.write_onnx_portable, (ONNX_RUNTIME, OPENVINO, OPENVINO_DEFAULT)
    ),
    "onnx-fp16": ExportFormat("detector-fp16.onnx", onnx_files.write_onnx_half, (ONNX_RUNTIME,), HALF),
    "openvino": ExportFormat(
        "openvino", openvino_files.write_openvino, (OPENVINO, OPENVINO_DEFAULT), opened=openvino_files.MODEL_FILE
    ),
    "openvino-fp16": ExportFormat(
        "openvino-fp16",
        openvino_files.write_openvino_half,
        (OPENVINO, OPENVINO_DEFAULT),
        HALF,
        opened=openvino_files.MODEL_FILE,
    ),
    "onnx-int8": ExportFormat("detector-int8.onnx", onnx_int8.write_onnx_int8, (ONNX_RUNTIME,), INT8, calibrated=True),
    "openvino-int8": ExportFormat(
        "openvino-int8",
        openvino_int8.write_openvino_int8,
        (OPENVINO, OPENVINO_DEFAULT),
        INT8,
        opened=openvino_files.MODEL_FILE,
        calibrated=True,
    ),
    "tensorrt": ExportFormat(
        "tensorrt", tensorrt_files.write_tensorrt, (ONNX_RUNTIME, OPENVINO), opened=tensorrt_files.MODEL_FILE
    ),
    "torch-export": ExportFormat("detector.pt2", writers.write_torch_export, (TORCH_EXPORT,), extra=None),
    "released": ExportFormat("detector.pth", writers.write_released, (Opening("PyTorch", open_released),), extra=None),
    "huggingface": ExportFormat(
        "huggingface", writers.write_huggingface, (Opening("Transformers", open_huggingface, one_per_query=True),)
    ),
    "safetensors": ExportFormat(
        "safetensors", writers.write_safetensors, (Opening("PyTorch", open_safetensors),), extra=None
    ),
}
