"""Write ONNX with quantised blocks: pairs of QuantizeLinear and DequantizeLinear, one scale per channel of a weight."""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dfine_core.runtimes.files import runtime_of
from pipeline.export.int8 import block_of, calibration_of, write_quantised
from pipeline.export.onnx_files import onnx_model
from pipeline.export.openings import scaled
from pipeline.export.source import INPUT_NAMES, ExportSource

if TYPE_CHECKING:
    from onnx import ModelProto

QUANTISED = ["Conv", "MatMul", "Add", "Mul", "Concat", "Relu", "Sigmoid", "MaxPool", "Resize"]


def write_onnx_int8(source: ExportSource, path: Path) -> None:
    """Write the file of `onnx` with 8-bit weights and activations in backbone and encoder.

    Raises:
        ValueError: there are no calibration images, or AP never holds.
    """
    import onnx
    from onnxruntime.quantization import QuantType  # type: ignore[import-untyped]
    from onnxruntime.quantization.qdq_quantizer import QDQQuantizer  # type: ignore[import-untyped]

    single = onnx.shape_inference.infer_shapes(onnx_model(source))
    blocks = {node.name: block for node in single.graph.node if (block := block_of(node)) and node.op_type in QUANTISED}
    ranges = _ranges(source, single)

    def write(target: Path, in_float: frozenset[str]) -> None:
        copied = type(single).FromString(single.SerializeToString())  # the quantiser changes it in place
        nodes = [name for name, block in blocks.items() if block not in in_float]
        quantiser = QDQQuantizer(
            copied,
            per_channel=True,
            reduce_range=False,
            weight_qType=QuantType.QInt8,
            activation_qType=QuantType.QUInt8,
            tensors_range=ranges,
            nodes_to_quantize=nodes,
            nodes_to_exclude=[],
            op_types_to_quantize=QUANTISED,
            extra_options={},
        )
        quantiser.quantize_model()
        quantiser.model.topological_sort()  # the quantiser appends its nodes at the end
        quantised: ModelProto = quantiser.model.model
        target.write_bytes(quantised.SerializeToString())

    opener = runtime_of(".onnx").opener
    write_quantised(source, "onnx-int8", blocks.values(), write, path, opener=opener)


def _ranges(source: ExportSource, model: "ModelProto") -> Any:
    """Least and largest value of every activation on the calibration images."""
    from onnxruntime.quantization.calibrate import CalibrationDataReader, create_calibrator  # type: ignore[import-untyped]

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        """Calibration images in the form that ONNX Runtime reads."""

        def __init__(self) -> None:
            self.inputs = _inputs(source)

        def get_next(self) -> dict[str, Any] | None:
            """Inputs of the next batch; None at the end."""
            return next(self.inputs, None)

    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / "float.onnx"
        written.write_bytes(model.SerializeToString())
        augmented = str(Path(folder) / "augmented.onnx")
        calibrator = create_calibrator(written, QUANTISED, augmented_model_path=augmented)
        calibrator.collect_data(Reader())
        return calibrator.compute_data()


def _inputs(source: ExportSource) -> Iterator[dict[str, Any]]:
    for batch in calibration_of(source).ranges.batches(source.model.config.input_size):
        yield dict(zip(INPUT_NAMES, (scaled(batch.pixels), batch.sizes.numpy()), strict=True))
