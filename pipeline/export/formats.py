"""A trained detector in the formats of other programs, one function for each.

What is written is not yet accepted: `export_gate` opens it in its own runtime and compares it with the detector. The
libraries of a format are imported with it: they are extras, and slow to import.
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
from safetensors.torch import save as tensors_to_bytes
from torch import Tensor, nn

from dfine_core import DISTRIBUTION, Detector, __version__
from dfine_core.checkpoints.folder import DESCRIPTION
from dfine_core.checkpoints.weights import save_released
from dfine_core.inference import LoadedDetector, predict_batch
from pipeline.redaction import redact

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

OPSET = 18
INPUTS, OUTPUTS = ("images", "orig_target_sizes"), ("labels", "boxes", "scores")


class EndToEnd(nn.Module):
    """Images and their original sizes to detections in pixels: what ONNX and torch.export files compute."""

    def __init__(self, detector: Detector):
        super().__init__()
        self.detector = detector

    def forward(self, images: Tensor, orig_target_sizes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """
        Args:
            images: [B, 3, H, W] float32 in 0..1, stretched to the input size.
            orig_target_sizes: [B, 2] int64 (width, height) of the images before that.

        Returns:
            labels [B, R] int64, boxes [B, R, 4] xyxy in pixels of the original images, scores [B, R]; best first.
        """
        found, _ = predict_batch(self.detector, images, orig_target_sizes)
        return found.labels, found.boxes, found.scores


@dataclass(frozen=True, eq=False)
class Source:
    """What is exported: a detector on the CPU, from before `deploy()`, at the input size of the export."""

    model: LoadedDetector

    @cached_property
    def digest(self) -> str:
        """SHA-256 of names and values of all weights: the same for every format and input size."""
        summed = hashlib.sha256()
        for key, tensor in sorted(self.model.detector.state_dict().items()):
            summed.update(key.encode())
            summed.update(tensor.contiguous().numpy().tobytes())
        return summed.hexdigest()

    @cached_property
    def description(self) -> dict[str, Any]:
        """What an exported file says about itself."""
        return {
            "names": list(self.model.names),
            "category_ids": list(self.model.category_ids),
            "input_size": list(self.model.config.input_size),
            "source": redact(self.model.origin),
            "weights_sha256": self.digest,
            "made_by": f"{DISTRIBUTION} {__version__}",
        }

    @cached_property
    def program(self) -> torch.export.ExportedProgram:
        """Traced once, for ONNX and torch.export alike; any number of images, one input size."""
        # The same arithmetic in float32, and no autocast regions in the graph to leave.
        detector = Detector(self.model.config.with_(numerics="released"))
        detector.load_state_dict(self.model.detector.state_dict())
        images = torch.zeros(2, 3, *self.model.config.input_size)
        sizes = torch.tensor([[640, 480], [480, 640]])
        batch = {0: torch.export.Dim("batch")}
        with _quietly():
            return torch.export.export(
                EndToEnd(detector.deploy()).eval(), (images, sizes), dynamic_shapes=(batch, batch)
            )

    @cached_property
    def onnx(self) -> "ModelProto":
        """Made once, for single and half precision."""
        import onnx

        with _quietly():
            program = torch.onnx.export(
                self.program, dynamo=True, opset_version=OPSET, input_names=INPUTS, output_names=OUTPUTS, verbose=False
            )
        assert program is not None
        model: ModelProto = program.model_proto
        model.producer_name, model.producer_version = DISTRIBUTION, __version__
        onnx.helper.set_model_props(model, _as_text(self.description))
        onnx.checker.check_model(model)
        return model


def at_input_size(model: LoadedDetector, input_size: tuple[int, int]) -> LoadedDetector:
    """The same weights for images of another (height, width).

    Raises:
        ValueError: the detector cannot take such images.
    """
    detector = Detector(model.config.with_(input_size=input_size))
    detector.load_state_dict(model.detector.state_dict())
    return replace(model, detector=detector.eval())


def write_onnx(source: Source, path: Path) -> None:
    """The whole way from images to detections, single precision."""
    path.write_bytes(source.onnx.SerializeToString())


def write_onnx_half(source: Source, path: Path) -> None:
    """The same with weights and most of the arithmetic in half precision; inputs and outputs remain as they are."""
    from onnxruntime.transformers.float16 import (  # type: ignore[import-untyped]
        DEFAULT_OP_BLOCK_LIST,
        convert_float_to_float16,
    )
    from onnxruntime.transformers.onnx_model import OnnxModel  # type: ignore[import-untyped]

    model = type(source.onnx).FromString(source.onnx.SerializeToString())  # changed in place
    single = [node.name for node in model.graph.node if _stays_single(node)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one for every weight that half precision rounds to 0
        half = convert_float_to_float16(
            model, keep_io_types=True, op_block_list=DEFAULT_OP_BLOCK_LIST, node_block_list=single
        )
    OnnxModel(half).topological_sort()  # its casts of the inputs come last
    path.write_bytes(half.SerializeToString())


def _stays_single(node: "NodeProto") -> bool:
    """Whether a node decodes boxes, integrates distributions, estimates quality or turns detections into pixels.

    These are the decoder's own operations, those of its quality estimators and what follows the detector: cheap, and
    without the range or the digits to spare. Exported nodes know the modules that they come from, outermost first.
    """
    written = {entry.key: entry.value for entry in node.metadata_props}.get("pkg.torch.onnx.name_scopes")
    modules = ast.literal_eval(written)[:-1] if written else [""]
    return modules[-1] in ("", "detector.decoder") or any("lqe_layers" in module for module in modules)


def write_torch_export(source: Source, path: Path) -> None:
    """A program for `torch.export.load`, which needs torch and nothing of this project."""
    torch.export.save(source.program, path, extra_files={"detector.json": json.dumps(source.description)})


def write_released(source: Source, path: Path) -> None:
    """The layout of the published files."""
    save_released(source.model.detector.state_dict(), source.model.config, path)


def write_huggingface(source: Source, path: Path) -> None:
    """Transformers' own layout: see `huggingface`."""
    from pipeline.export.huggingface import save_transformers

    save_transformers(source.model.config, source.model.detector.state_dict(), source.model.names, path)


def write_safetensors(source: Source, path: Path) -> None:
    """The folder that `dfine_core.load` opens, with everything that another training could start from."""
    path.mkdir()
    description = {"config": asdict(source.model.config), "categories": source.description["names"]}
    (path / DESCRIPTION).write_text(json.dumps(description | source.description, indent=1))
    weights = {key: tensor.clone() for key, tensor in source.model.detector.state_dict().items()}
    (path / "model.safetensors").write_bytes(tensors_to_bytes(weights))


@dataclass(frozen=True)
class Format:
    file: str  # or folder, below that of the export
    write: Callable[[Source, Path], None]


FORMATS = {
    "onnx": Format("detector.onnx", write_onnx),
    "onnx-fp16": Format("detector-fp16.onnx", write_onnx_half),
    "torch-export": Format("detector.pt2", write_torch_export),
    "released": Format("detector.pth", write_released),
    "huggingface": Format("huggingface", write_huggingface),
    "safetensors": Format("safetensors", write_safetensors),
}


def _as_text(description: Mapping[str, Any]) -> dict[str, str]:
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in description.items()}


@contextmanager
def _quietly() -> Iterator[None]:
    """Without the exporters' remarks on their own progress and their own deprecations."""
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
