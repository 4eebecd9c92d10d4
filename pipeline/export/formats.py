"""Write a trained detector in the formats of other programs, one function per format.

A written file is not accepted yet: `gate.py` opens it in its own runtime and compares it with the detector. The libraries
of a format are imported when it is written, because they are extras and slow to import.
"""

import ast
import hashlib
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dfine_core import DISTRIBUTION, Detector, __version__
from dfine_core.checkpoints.folder import DESCRIPTION, THRESHOLDS, TRANSFORMERS_CONFIG, tensors_to_bytes
from dfine_core.checkpoints.weights import save_released
from dfine_core.inference import LoadedDetector, predict_batch
from pipeline.redaction import redact

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

OPSET = 18
INPUT_NAMES, OUTPUT_NAMES = ("images", "orig_target_sizes"), ("labels", "boxes", "scores")


class EndToEnd(nn.Module):
    """Network of ONNX and torch.export files: images and their original sizes to detections in pixels."""

    def __init__(self, detector: Detector):
        super().__init__()
        self.detector = detector

    def forward(self, images: Tensor, orig_target_sizes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Detect in a batch.

        Args:
            images: [B, 3, H, W] float32 in 0..1, resized to the input size.
            orig_target_sizes: [B, 2] int64 (width, height) of the original images.

        Returns:
            labels [B, R] int64, boxes [B, R, 4] xyxy in pixels of the original images, scores [B, R]; best first.
        """
        detections, _ = predict_batch(self.detector, images, orig_target_sizes)
        return detections.labels, detections.boxes, detections.scores


@dataclass(frozen=True, eq=False)
class ExportSource:
    """Detector to be exported: on the CPU, not deployed yet, at the input size of the export."""

    model: LoadedDetector

    @cached_property
    def digest(self) -> str:
        """SHA-256 over names and values of all weights; equal for every format and input size."""
        hashed = hashlib.sha256()
        for key, tensor in sorted(self.model.detector.state_dict().items()):
            hashed.update(key.encode())
            hashed.update(tensor.contiguous().numpy().tobytes())
        return hashed.hexdigest()

    @cached_property
    def description(self) -> dict[str, Any]:
        """Metadata stored in every exported file."""
        thresholds = self.model.thresholds
        return {
            "names": list(self.model.names),
            "category_ids": list(self.model.category_ids),
            "input_size": list(self.model.config.input_size),
            "source": redact(self.model.origin),
            "weights_sha256": self.digest,
            "made_by": f"{DISTRIBUTION} {__version__}",
            **({} if thresholds is None else {THRESHOLDS: thresholds.to_plain()}),
        }

    @cached_property
    def program(self) -> torch.export.ExportedProgram:
        """Traced program for ONNX and torch.export: any batch size, one input size."""
        # The same arithmetic in float32, but the graph gets no autocast regions.
        detector = Detector(self.model.config.with_(numerics="released"))
        detector.load_state_dict(self.model.detector.state_dict())
        images = torch.zeros(2, 3, *self.model.config.input_size)
        sizes = torch.tensor([[640, 480], [480, 640]])
        batch = {0: torch.export.Dim("batch")}
        with _silenced_exporters():
            return torch.export.export(
                EndToEnd(detector.deploy()).eval(), (images, sizes), dynamic_shapes=(batch, batch)
            )

    @cached_property
    def onnx(self) -> "ModelProto":
        """ONNX model in single precision, which half precision starts from."""
        import onnx

        with _silenced_exporters():
            program = torch.onnx.export(
                self.program,
                dynamo=True,
                opset_version=OPSET,
                input_names=INPUT_NAMES,
                output_names=OUTPUT_NAMES,
                verbose=False,
            )
        assert program is not None
        model: ModelProto = program.model_proto
        model.producer_name, model.producer_version = DISTRIBUTION, __version__
        onnx.helper.set_model_props(model, _metadata_properties(self.description))
        onnx.checker.check_model(model)
        return model


def at_input_size(model: LoadedDetector, input_size: tuple[int, int]) -> LoadedDetector:
    """Copy the detector with another input size (height, width) and the same weights.

    Raises:
        ValueError: the detector does not support this size.
    """
    detector = Detector(model.config.with_(input_size=input_size))
    detector.load_state_dict(model.detector.state_dict())
    return replace(model, detector=detector.eval())


def write_onnx(source: ExportSource, path: Path) -> None:
    """Write ONNX in single precision, from images to detections."""
    path.write_bytes(source.onnx.SerializeToString())


def write_onnx_half(source: ExportSource, path: Path) -> None:
    """Write ONNX with weights and most of the arithmetic in half precision. Inputs and outputs stay in single precision."""
    from onnxruntime.transformers.float16 import (  # type: ignore[import-untyped]
        DEFAULT_OP_BLOCK_LIST,
        convert_float_to_float16,
    )
    from onnxruntime.transformers.onnx_model import OnnxModel  # type: ignore[import-untyped]

    model = type(source.onnx).FromString(source.onnx.SerializeToString())  # a copy: the conversion changes it in place
    single = [node.name for node in model.graph.node if _needs_single_precision(node)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a warning per weight that half precision rounds to 0
        half = convert_float_to_float16(
            model, keep_io_types=True, op_block_list=DEFAULT_OP_BLOCK_LIST, node_block_list=single
        )
    OnnxModel(half).topological_sort()  # the conversion appends its casts of the inputs at the end
    path.write_bytes(half.SerializeToString())


def _needs_single_precision(node: "NodeProto") -> bool:
    """Return True for nodes that decode boxes, integrate distributions, estimate quality or convert to pixels.

    These are the decoder's own operations, its quality estimators and the postprocessing. They are cheap and need the range
    and precision of float32. Exported nodes carry the names of their modules, outermost first.
    """
    scopes = {entry.key: entry.value for entry in node.metadata_props}.get("pkg.torch.onnx.name_scopes")
    modules = ast.literal_eval(scopes)[:-1] if scopes else [""]
    return modules[-1] in ("", "detector.decoder") or any("lqe_layers" in module for module in modules)


def write_torch_export(source: ExportSource, path: Path) -> None:
    """Write a program for `torch.export.load`, which needs PyTorch but not this project."""
    torch.export.save(source.program, path, extra_files={"detector.json": json.dumps(source.description)})


def write_released(source: ExportSource, path: Path) -> None:
    """Write a checkpoint in the layout of the published files."""
    save_released(source.model.detector.state_dict(), source.model.config, path)


def write_huggingface(source: ExportSource, path: Path) -> None:
    """Write a folder for Transformers; see `huggingface.py`."""
    from pipeline.export.huggingface import save_transformers

    save_transformers(source.model.config, source.model.detector.state_dict(), source.model.names, path)
    if source.model.thresholds is not None:  # Transformers keeps keys that it does not know
        content = json.loads((path / TRANSFORMERS_CONFIG).read_text())
        content[THRESHOLDS] = source.model.thresholds.to_plain()
        (path / TRANSFORMERS_CONFIG).write_text(json.dumps(content, indent=2))


def write_safetensors(source: ExportSource, path: Path) -> None:
    """Write a folder that `dfine_core.load` opens and another training can start from."""
    path.mkdir()
    description = {"config": asdict(source.model.config), "categories": source.description["names"]}
    (path / DESCRIPTION).write_text(json.dumps(description | source.description, indent=1))
    weights = {key: tensor.clone() for key, tensor in source.model.detector.state_dict().items()}
    (path / "model.safetensors").write_bytes(tensors_to_bytes(weights, source.model.config.activation))


@dataclass(frozen=True)
class ExportFormat:
    """Name and writer of a format."""

    file: str  # file or folder below the export folder
    write: Callable[[ExportSource, Path], None]


FORMATS = {
    "onnx": ExportFormat("detector.onnx", write_onnx),
    "onnx-fp16": ExportFormat("detector-fp16.onnx", write_onnx_half),
    "torch-export": ExportFormat("detector.pt2", write_torch_export),
    "released": ExportFormat("detector.pth", write_released),
    "huggingface": ExportFormat("huggingface", write_huggingface),
    "safetensors": ExportFormat("safetensors", write_safetensors),
}


def _metadata_properties(description: Mapping[str, Any]) -> dict[str, str]:
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in description.items()}


@contextmanager
def _silenced_exporters() -> Iterator[None]:
    """Silence the progress messages and deprecation warnings of the exporters."""
    levels = {name: logging.getLogger(name).level for name in ("torch.onnx", "torch.export", "onnxscript")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in levels:
            logging.getLogger(name).setLevel(logging.ERROR)
        try:
            yield
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)
