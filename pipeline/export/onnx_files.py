"""Write ONNX files."""

import ast
import warnings
from collections.abc import Container
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dfine_core import DISTRIBUTION, __version__
from dfine_core.runtimes.program import described_as_text
from pipeline.export.source import INPUT_NAMES, OUTPUT_NAMES, ExportSource, silenced_exporters

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

NAME_SCOPES = "pkg.torch.onnx.name_scopes"  # metadata of exported nodes
OPSET, PORTABLE_OPSET = 18, 17
PORTABLE_IR = 8  # the version of files that came with opset 17
PORTABLE_OPERATORS = frozenset(
    """
    Add And Cast Clip Concat Conv Div Equal Erf Expand Floor Gather GatherElements GreaterOrEqual Identity LayerNormalization
    Less LessOrEqual Log MatMul Max MaxPool Mod Mul Neg Pad Pow Range ReduceMax ReduceMean ReduceSum Relu Reshape Resize Shape
    Sigmoid Slice Softmax Split Sqrt Squeeze Sub Tile TopK Transpose Unsqueeze Where
    """.split()  # noqa: SIM905  # a list would take a page
)
# Their axes were an attribute; those of ReduceSum are an input since opset 13.
REDUCTIONS = ("ReduceMax", "ReduceMean", "ReduceMin")
# Attributes that opset 18 has added, with the values that mean what opset 17 does.
SINCE_18: dict[str, dict[str, Container[object]]] = {
    **{name: {"noop_with_empty_axes": (0,)} for name in REDUCTIONS},
    "Resize": {"antialias": (0,), "keep_aspect_ratio_policy": (b"stretch",)},
    "Split": {"num_outputs": range(2, 1000)},  # equal parts, as without it
}


def onnx_model(source: ExportSource) -> "ModelProto":
    """ONNX model in single precision, which half precision starts from."""
    return source.once("onnx", lambda: _converted(source, source.program))


def _converted(source: ExportSource, traced: torch.export.ExportedProgram) -> "ModelProto":
    import onnx

    with silenced_exporters():
        program = torch.onnx.export(
            traced,
            dynamo=True,
            opset_version=OPSET,
            input_names=INPUT_NAMES,
            output_names=OUTPUT_NAMES,
            verbose=False,
        )
    assert program is not None
    model: ModelProto = program.model_proto
    model.producer_name, model.producer_version = DISTRIBUTION, __version__
    onnx.helper.set_model_props(model, described_as_text(source.description))
    onnx.checker.check_model(model)
    return model


def write_onnx(source: ExportSource, path: Path) -> None:
    """Write ONNX in single precision, from images to detections."""
    path.write_bytes(onnx_model(source).SerializeToString())


def write_onnx_half(source: ExportSource, path: Path) -> None:
    """Write ONNX with weights and most of the arithmetic in half precision. Inputs and outputs stay in single precision."""
    from onnxruntime.transformers.float16 import (  # type: ignore[import-untyped]
        DEFAULT_OP_BLOCK_LIST,
        convert_float_to_float16,
    )
    from onnxruntime.transformers.onnx_model import OnnxModel  # type: ignore[import-untyped]

    single = onnx_model(source)
    model = type(single).FromString(single.SerializeToString())  # a copy: the conversion changes it in place
    kept = [node.name for node in model.graph.node if _needs_single_precision(node)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a warning per weight that half precision rounds to 0
        half = convert_float_to_float16(
            model, keep_io_types=True, op_block_list=DEFAULT_OP_BLOCK_LIST, node_block_list=kept
        )
    OnnxModel(half).topological_sort()  # the conversion appends its casts of the inputs at the end
    path.write_bytes(half.SerializeToString())


def _needs_single_precision(node: "NodeProto") -> bool:
    """Return True for nodes that decode boxes, integrate distributions, estimate quality or convert to pixels.

    These are the decoder's own operations, its quality estimators and the postprocessing. They are cheap and need the range
    and precision of float32.
    """
    modules = module_names(node)
    return modules[-1] in ("", "detector.decoder") or any("lqe_layers" in module for module in modules)


def module_names(node: "NodeProto") -> list[str]:
    """Names of the modules that an exported node comes from, outermost first; at least one, "" for the whole."""
    scopes = {entry.key: entry.value for entry in node.metadata_props}.get(NAME_SCOPES)
    return (ast.literal_eval(scopes)[:-1] if scopes else []) or [""]


def write_onnx_portable(source: ExportSource, path: Path) -> None:
    """Write ONNX of opset 17 for any runtime: sampling by gathers, and no operator outside PORTABLE_OPERATORS.

    Raises:
        ValueError: this detector needs another operator.
    """
    path.write_bytes(portable_model(source).SerializeToString())


def portable_model(source: ExportSource, batch_size: int | None = None) -> "ModelProto":
    """Model of `write_onnx_portable`, from which other formats start.

    Args:
        batch_size: for formats that need a fixed one; None: that of the source.
    """
    batch_size = batch_size or source.batch_size
    return source.once(("portable", batch_size), lambda: _portable(source, batch_size))


def _portable(source: ExportSource, batch_size: int | None) -> "ModelProto":
    model = _converted(source, source.traced(gathers=True, batch_size=batch_size))
    to_opset_17(model)
    others = sorted({node.op_type for node in model.graph.node} - PORTABLE_OPERATORS)
    if others or model.functions:
        raise ValueError(f"the graph needs operators outside the portable ones: {', '.join(others) or 'functions'}")
    return model


def to_opset_17(model: "ModelProto") -> None:
    """Rewrite the operators that opset 18 has changed, in place.

    Raises:
        ValueError: one of them does something that opset 17 cannot express.
    """
    import onnx

    constants: dict[str, Any] = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    for node in model.graph.node:
        attributes: dict[str, Any] = {one.name: onnx.helper.get_attribute_value(one) for one in node.attribute}
        if node.op_type in REDUCTIONS and len(node.input) > 1:
            axes = constants[node.input[1]].tolist()
            del node.input[1:]
            node.attribute.append(onnx.helper.make_attribute("axes", axes))
        elif node.op_type == "Pad" and len(node.input) > 3:
            raise ValueError(f"{node.name}: padding of named axes needs opset 18")
        new = {name: attributes[name] for name in SINCE_18.get(node.op_type, {}) if name in attributes}
        if any(value not in SINCE_18[node.op_type][name] for name, value in new.items()):
            raise ValueError(f"{node.name}: {node.op_type} with {', '.join(new)} needs opset 18")
        kept = [one for one in node.attribute if one.name not in new]
        del node.attribute[:]
        node.attribute.extend(kept)
    del model.opset_import[:]
    model.opset_import.append(onnx.helper.make_opsetid("", PORTABLE_OPSET))
    model.ir_version = PORTABLE_IR
    onnx.checker.check_model(model, full_check=True)
