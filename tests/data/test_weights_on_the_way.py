"""Weights and regions to ignore on their way from a shard to a training step, through every augmentation."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch

from pipeline.data.augment.samples import IGNORED, TRUTH, without_crowd
from pipeline.data.augment.settings import AugmentSettings
from pipeline.data.augment.stages import Stages
from pipeline.data.shards.records import WEIGHTED_SCHEMA, ImageRecord, records_from_table, table_from_records
from pipeline.data.stream.batch import Batch, batches_from_arrow
from pipeline.data.stream.tasks import ENCODED_SCHEMA, Augmentation, DecodeSettings, decode_block
from tests.support.synthetic_shards import synthetic_records

CANVAS, IMAGES = (64, 64), 8
EVERY = {
    "none": {},
    "zoom and crop": {"zoom_out_probability": 1.0, "iou_crop_probability": 1.0},
    "mixup": {"mixup_probability": 1.0},
    "copy-paste": {"copy_paste_probability": 1.0, "copy_paste_min_area": 4.0},
    "mosaic": {"mosaic_probability": 1.0},
}


def weight_of(label: np.ndarray | torch.Tensor) -> np.ndarray:
    """A weight by which a label is known again."""
    return ((np.asarray(label) + 1) / 10).astype(np.float32)


def weighted(record: ImageRecord) -> ImageRecord:
    """The record with a weight for each box, and the same boxes once more as regions to ignore; then a crowd region."""
    boxes, labels = record.boxes[~record.crowd], record.labels[~record.crowd]
    areas, ones = record.areas[~record.crowd], np.ones(len(labels), np.bool_)
    whole = np.array([[0, 0, record.width, record.height]], np.float32)
    return replace(
        record,
        boxes=np.concatenate([boxes, boxes, whole]),
        labels=np.concatenate([labels, labels, [0]]).astype(np.int32),
        areas=np.concatenate([areas, areas, [1]]).astype(np.float32),
        crowd=np.concatenate([~ones, ones, [True]]),
        weights=np.concatenate([weight_of(labels), 0 * labels, [1]]).astype(np.float32),
    )


def batch_of(records: Sequence[ImageRecord], augment: dict[str, float]) -> Batch:
    strength = AugmentSettings(**augment)  # type: ignore[arg-type]
    stages = Stages(0, 2 if "mosaic_probability" not in augment else 1, 2)
    settings = DecodeSettings(CANVAS, IMAGES, Augmentation(3, strength, stages=stages))
    partners = np.full((IMAGES, 3), -1)
    if "mosaic_probability" in augment:
        partners = np.array([[(i + k) % IMAGES for k in (1, 2, 3)] for i in range(IMAGES)])
    rows = table_from_records(records, weighted=True).to_pylist()
    row = {"step": 11, "micro_batch": 1, "epoch": 0, "real": [IMAGES], "rows": rows, "partners": partners.ravel()}
    (batch,) = batches_from_arrow(decode_block(pa.Table.from_pylist([row], schema=ENCODED_SCHEMA), settings), CANVAS)
    return batch


def rows_of(boxes: torch.Tensor) -> list[list[float]]:
    return sorted([round(value, 4) for value in row] for row in boxes.tolist())


def test_a_table_keeps_weights_and_without_them_reads_none() -> None:
    records = [weighted(record) for record in synthetic_records(4)]
    table = table_from_records(records, weighted=True)
    assert table.schema.equals(WEIGHTED_SCHEMA)
    for record, read in zip(records, records_from_table(table), strict=True):
        assert read.weights is not None
        assert record.weights is not None
        assert np.array_equal(read.weights, record.weights)
    assert all(read.weights is None for read in records_from_table(table_from_records(records)))


def test_crowd_regions_are_left_out_and_regions_to_ignore_stay() -> None:
    record = weighted(next(r for r in synthetic_records(9) if len(r.labels)))
    image, count = without_crowd(record), len(record.labels) // 2
    assert image.marks is not None
    assert image.marks.tolist() == [*(-weight_of(record.labels[:count])), *[IGNORED] * count]
    assert not image.areas[count:].any()  # so that none of them is pasted


@pytest.mark.parametrize("name", EVERY)
def test_every_box_keeps_its_weight_and_every_region_its_place(name: str) -> None:
    records = synthetic_records(IMAGES, longest_side=64)
    batch, plain = batch_of([weighted(r) for r in records], EVERY[name]), batch_of(records, EVERY[name])
    assert batch.weights is not None
    assert np.allclose(batch.weights, weight_of(batch.labels))
    assert len(batch.labels) > 5
    assert batch.ignored_boxes is not None
    own = [target["boxes"] for target in batch.targets()]
    regions = [target["ignored"] for target in batch.targets()]
    if name == "copy-paste":  # objects are pasted, regions are not
        assert sum(map(len, own)) > sum(map(len, regions))
        return
    assert [rows_of(boxes) for boxes in own] == [rows_of(boxes) for boxes in regions]
    assert torch.equal(batch.images, plain.images)  # draws depend on labels alone
    assert torch.equal(batch.boxes, plain.boxes)
    assert (plain.weights, plain.ignored_boxes) == (None, None)


def test_a_pasted_object_brings_its_weight() -> None:
    records = [weighted(r) for r in synthetic_records(IMAGES, longest_side=64)]
    pasted, plain = batch_of(records, EVERY["copy-paste"]), batch_of(records, {})
    assert len(pasted.labels) > len(plain.labels)
    assert pasted.weights is not None
    assert TRUTH not in (-pasted.weights).tolist()
