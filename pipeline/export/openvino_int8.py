"""Write OpenVINO's representation with quantised blocks, by NNCF."""

import contextlib
import io
import logging
import os
from pathlib import Path
from typing import Any

from dfine_core.runtimes.files import runtime_of
from pipeline.export.int8 import block_of, calibration_of, write_quantised
from pipeline.export.onnx_files import portable_model
from pipeline.export.openings import scaled
from pipeline.export.openvino_files import MODEL_FILE, converted, save
from pipeline.export.source import ExportSource

NO_TELEMETRY = "NNCF_CI"  # without it NNCF reports every quantisation to a server


def write_openvino_int8(source: ExportSource, path: Path) -> None:
    """Write the files of `openvino` with 8-bit weights and activations in backbone and encoder.

    Raises:
        ValueError: there are no calibration images, or AP never holds.
    """
    size = source.model.config.input_size
    inputs = [
        [scaled(batch.pixels[row : row + 1]), batch.sizes[row : row + 1].numpy()]
        for batch in calibration_of(source).ranges.batches(size)
        for row in range(len(batch.pixels))
    ]
    blocks = {node.name: block_of(node) for node in portable_model(source).graph.node}

    def write(target: Path, in_float: frozenset[str]) -> None:
        model = converted(source)
        kept = [
            operator.get_friendly_name()
            for operator in model.get_ops()
            if (block := blocks.get(_node_name(operator))) is None or block in in_float
        ]
        save(source, _quantised(model, inputs, kept), target, compressed=False)

    found = [block for block in blocks.values() if block]
    opener = runtime_of(".xml").opener
    write_quantised(source, "openvino-int8", found, write, path, opener=opener, opened=MODEL_FILE)


def _node_name(operator: Any) -> str:
    """Name of the ONNX node of an operator. A convolution with bias becomes NAME/WithoutBiases and an addition."""
    name: str = operator.get_friendly_name()
    return name.partition("/")[0]


def _quantised(model: Any, inputs: list[Any], in_float: list[str]) -> Any:
    os.environ.setdefault(NO_TELEMETRY, "1")
    import nncf  # type: ignore[import-untyped]

    nncf.set_log_level(logging.ERROR)
    with contextlib.redirect_stdout(io.StringIO()):  # progress bars
        return nncf.quantize(
            model,
            nncf.Dataset(inputs),
            subset_size=len(inputs),
            preset=nncf.QuantizationPreset.MIXED,
            ignored_scope=nncf.IgnoredScope(names=in_float, validate=False),
        )
