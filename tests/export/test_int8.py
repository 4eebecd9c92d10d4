"""Integers: which nodes are quantised, which blocks go back to float, and which images decide."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import helper

from dfine_core.inference import LoadedDetector
from dfine_core.runtimes.files import open_program
from pipeline.config import ConfigError
from pipeline.data.shards.records import ImageRecord
from pipeline.export import int8
from pipeline.export.check_images import Calibration, calibration_from_shards, from_shards
from pipeline.export.int8 import Attempt, BlockSearch, block_of, search_blocks
from pipeline.export.onnx_files import NAME_SCOPES
from pipeline.export.onnx_int8 import write_onnx_int8
from pipeline.export.openvino_int8 import write_openvino_int8
from pipeline.export.source import ExportSource
from tests.support.calibrations import a_calibration
from tests.support.synthetic_shards import synthetic_records, write_shards
from tests.support.varied_detectors import loaded, small

IN_FLOAT = "backbone.stages.1"
BLOCKS = ("backbone.stem", "backbone.stages.0", "encoder.fpn_blocks.0")
COSTS = {"backbone.stem": 0.002, "backbone.stages.0": 0.05, "encoder.fpn_blocks.0": 0.01}  # AP lost by quantising


def additive_ap(in_float: frozenset[str]) -> float:
    return 0.5 - sum(cost for block, cost in COSTS.items() if block not in in_float)


@pytest.mark.parametrize(
    ("least", "put_back"),
    [
        (0.43, []),
        (0.48, ["backbone.stages.0"]),
        (0.495, ["backbone.stages.0", "encoder.fpn_blocks.0"]),
    ],
)
def test_blocks_go_back_to_float_worst_first_until_ap_holds(least: float, put_back: list[str]) -> None:
    found = search_blocks(BLOCKS, additive_ap, least)
    assert [list(one.in_float) for one in found.attempts] == [put_back[:count] for count in range(len(put_back) + 1)]
    assert found.in_float == frozenset(put_back)
    assert found.attempts[-1].ap == additive_ap(found.in_float)
    assert found.alone == ({block: additive_ap(frozenset({block})) for block in BLOCKS} if put_back else {})


def test_a_detector_that_stands_no_integers_is_refused() -> None:
    with pytest.raises(ValueError, match=r"AP stays at 0\.4980, below 0\.4995"):
        search_blocks(BLOCKS, additive_ap, 0.4995)


@pytest.mark.parametrize(
    ("modules", "block"),
    [
        (["", "detector", "detector.backbone.stem.stem1.conv"], "backbone.stem"),
        (["", "detector.backbone.stages.2.blocks.1.layers.0"], "backbone.stages.2"),
        (["", "detector.encoder.input_proj.1"], "encoder.input_proj.1"),
        (["", "detector.encoder"], "encoder"),
        (["", "detector.decoder.decoder.layers.0.self_attn"], None),
        (["", "detector.decoder.dec_score_head.2"], None),
        ([""], None),
    ],
)
def test_nodes_of_backbone_and_encoder_alone_belong_to_blocks(modules: list[str], block: str | None) -> None:
    node = helper.make_node("Conv", ["x"], ["y"])
    node.metadata_props.append(onnx.StringStringEntryProto(key=NAME_SCOPES, value=str([*modules, "conv2d"])))
    assert block_of(node) == block
    assert block_of(helper.make_node("Conv", ["x"], ["y"])) is None


def image_ids(calibration_part: object) -> list[int]:
    return [int(one) for batch in calibration_part.batches((64, 64)) for one in batch.image_id]  # type: ignore[attr-defined]


def test_compared_measured_and_judged_images_are_different_ones(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "val", synthetic_records(11, longest_side=64))
    compared, calibration = from_shards(shards, 4), calibration_from_shards(shards, skip=4)
    parts = [image_ids(part) for part in (compared, calibration.ranges, calibration.judged)]
    assert [len(part) for part in parts] == [4, 3, 4]
    assert [one for part in parts for one in part] == image_ids(from_shards(shards, 11))
    assert calibration.judged.ground_truth is not None
    assert calibration.judged.ground_truth.image_id.tolist() == parts[2]
    assert calibration.judged.description.startswith("images 8 to 11 of ")


def test_a_set_without_images_for_calibration_is_refused(tmp_path: Path) -> None:
    records = synthetic_records(4, longest_side=64)
    shards = write_shards(tmp_path / "val", records)
    with pytest.raises(ConfigError, match="0 images left for calibration after the 4 that are compared"):
        calibration_from_shards(shards, skip=4)
    empty = write_shards(tmp_path / "empty", [without_boxes(record) for record in records])
    with pytest.raises(ConfigError, match=r"images 3 to 4 of .* have no boxes to judge"):
        calibration_from_shards(empty)


def without_boxes(record: ImageRecord) -> ImageRecord:
    return replace(
        record, boxes=record.boxes[:0], labels=record.labels[:0], areas=record.areas[:0], crowd=record.crowd[:0]
    )


def own_calibration(model: LoadedDetector, folder: Path) -> Calibration:
    """Images whose ground truth is the best detections of the detector itself."""
    calibration = calibration_from_shards(write_shards(folder, synthetic_records(16, longest_side=96)))
    judged = calibration.judged
    assert judged.ground_truth is not None
    found = [model.detect(batch.pixels, batch.sizes) for batch in judged.batches(model.config.input_size)]
    boxes = torch.cat([part.boxes[:, :3] for part in found]).reshape(-1, 4).numpy()
    count = len(boxes)
    truth = replace(
        judged.ground_truth,
        image=np.repeat(np.arange(count // 3), 3),
        box=boxes.astype(np.float32),
        label=torch.cat([part.labels[:, :3] for part in found]).flatten().numpy().astype(np.int32),
        area=(boxes[:, 2:] - boxes[:, :2]).prod(1).astype(np.float32),
        crowd=np.zeros(count, np.bool_),
    )
    return replace(calibration, judged=replace(judged, ground_truth=truth))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> ExportSource:
    model = replace(loaded(small(num_layers=1)), calibration=a_calibration())
    return ExportSource(model, calibration=own_calibration(model, tmp_path_factory.mktemp("calibration") / "shards"))


def one_block_in_float(blocks: Sequence[str], ap_of: Callable[[frozenset[str]], float], least: float) -> BlockSearch:
    """Search that ends at once: an untrained network loses AP as chance has it."""
    assert IN_FLOAT in blocks
    return BlockSearch((Attempt((IN_FLOAT,), ap_of(frozenset({IN_FLOAT}))),), {})


def check_note(source: ExportSource, name: str) -> None:
    facts, lines = source.notes[name].facts["quantisation"], source.notes[name].lines
    assert facts["AP_in_float"] > 0.9
    (attempt,) = facts["attempts"]
    assert attempt["AP"] - facts["AP_in_float"] == attempt["AP_change"] <= 0
    assert facts["judged_on"].startswith("images 9 to 16 of ")
    quantised, calibrated = lines
    assert quantised.endswith(f"in float: {IN_FLOAT}")
    assert calibrated == facts["calibration"]
    assert "fitted to the detector in float" in calibrated


@pytest.mark.slow
def test_onnx_has_integers_in_backbone_and_encoder_alone(
    source: ExportSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(int8, "search_blocks", one_block_in_float)
    write_onnx_int8(source, tmp_path / "detector.onnx")
    check_note(source, "onnx-int8")
    model = onnx.load(tmp_path / "detector.onnx")
    onnx.checker.check_model(model)
    weights = {one.name: one for one in model.graph.initializer}
    made_by = {output: node for node in model.graph.node for output in node.output}
    kinds: Counter[tuple[str, bool]] = Counter()
    for node in model.graph.node:
        if node.op_type not in ("Conv", "MatMul"):
            continue
        maker = made_by.get(node.input[1])
        quantised = maker is not None and maker.op_type == "DequantizeLinear" and maker.input[0] in weights
        kinds[block_of(node) or "decoder", quantised] += 1
        if quantised and node.op_type == "Conv":
            stored, scale = (weights[name] for name in maker.input[:2])  # type: ignore[union-attr]
            assert stored.data_type == onnx.TensorProto.INT8
            assert list(scale.dims) == [stored.dims[0]]
    assert kinds["decoder", False] > 10
    assert kinds["decoder", True] == kinds[IN_FLOAT, True] == 0
    assert kinds[IN_FLOAT, False] > 3
    assert kinds["backbone.stages.2", True] > 3
    assert kinds["backbone.stages.2", False] == 0
    opened = open_program(tmp_path / "detector.onnx")
    assert opened.description["names"] == list(source.model.names)


@pytest.mark.slow
def test_openvino_has_integers_and_the_metadata(
    source: ExportSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(int8, "search_blocks", one_block_in_float)
    write_openvino_int8(source, tmp_path / "detector")
    check_note(source, "openvino-int8")
    text = (tmp_path / "detector" / "detector.xml").read_text()
    assert text.count('type="FakeQuantize"') > 10
    assert text.count('element_type="i8"') > 10  # weights
    opened = open_program(tmp_path / "detector" / "detector.xml")
    assert opened.description["names"] == list(source.model.names)
