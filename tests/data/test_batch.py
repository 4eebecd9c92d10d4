"""From encoded rows to tensors, in one process: what a data task makes of a micro-batch and how a worker sees it."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch

from pipeline.data.augment.decode import UndecodableImageError
from pipeline.data.augment.photometric import leaves_unchanged, photometric_distort
from pipeline.data.augment.photometric_parameters import identity_photometric
from pipeline.data.augment.samples import augmented_sample, plain_sample, without_crowd
from pipeline.data.augment.settings import AugmentSettings
from pipeline.data.augment.stages import Stages
from pipeline.data.shards.records import SHARD_SCHEMA, ImageRecord, table_from_records
from pipeline.data.stream.batch import Batch, Replacement, batches_from_arrow
from pipeline.data.stream.tasks import DECODED_SCHEMA, ENCODED_SCHEMA, Augmentation, DecodeSettings, decode_block
from tests.support.synthetic_shards import synthetic_records

CANVAS = (32, 64)
TRAINING = DecodeSettings(
    CANVAS, micro_batch_size=4, augmentation=Augmentation(3, AugmentSettings(), stages=Stages(0, 2, 2))
)
EVALUATION = DecodeSettings(CANVAS, micro_batch_size=4, augmentation=None)


def encoded(records: Sequence[ImageRecord], epoch: int = 0, real: Sequence[int] | None = None) -> pa.Table:
    rows = pa.concat_tables([SHARD_SCHEMA.empty_table(), table_from_records(records)]).to_pylist()
    row = {"step": 11, "micro_batch": 1, "epoch": epoch, "real": real or [len(records)], "rows": rows, "partners": []}
    return pa.Table.from_pylist([row], schema=ENCODED_SCHEMA)


def batch_of(records: Sequence[ImageRecord], settings: DecodeSettings = TRAINING, epoch: int = 0) -> Batch:
    decoded = decode_block(encoded(records, epoch), settings)
    assert decoded.schema == DECODED_SCHEMA
    (batch,) = batches_from_arrow(decoded, CANVAS)
    return batch


def broken(record: ImageRecord) -> ImageRecord:
    return replace(record, image=b"no image at all")


@pytest.mark.parametrize("epoch", [1, 2])
def test_a_batch_holds_the_samples_of_its_images(epoch: int) -> None:
    records = synthetic_records(4)
    batch = batch_of(records, epoch=epoch)
    settings = AugmentSettings() if epoch < 2 else AugmentSettings().clean()
    assert (batch.step, batch.micro_batch) == (11, 1)
    assert batch.images.shape == (4, 3, *CANVAS)
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    for i, (record, target) in enumerate(zip(records, batch.targets(), strict=True)):
        sample = augmented_sample(
            without_crowd(record),
            seed=3,
            epoch=epoch,
            image_id=record.image_id,
            settings=settings,
            canvas=CANVAS,
        )
        np.testing.assert_array_equal(batch.images[i].permute(1, 2, 0).numpy(), sample.image)
        np.testing.assert_array_equal(batch.photometric[i].numpy(), sample.photometric)
        np.testing.assert_array_equal(target["boxes"].numpy(), sample.boxes)
        np.testing.assert_array_equal(target["labels"].numpy(), sample.labels)
    assert batch.image_id.tolist() == [record.image_id for record in records]
    assert batch.orig_size.tolist() == [[record.width, record.height] for record in records]
    assert batch.padding == (False,) * 4
    assert batch.replaced == ()


def test_colours_can_be_distorted_where_images_are_decoded() -> None:
    records = synthetic_records(6)
    here = replace(TRAINING, micro_batch_size=6, augmentation=replace(TRAINING.augmentation, distort=True))
    left, done = batch_of(records, replace(here, augmentation=TRAINING.augmentation)), batch_of(records, here)
    expected = photometric_distort(left.images.float() / 255, left.photometric)
    assert (expected * 255 - left.images).abs().max() > 10
    torch.testing.assert_close(done.images / 255, expected, atol=0.501 / 255, rtol=0)
    assert leaves_unchanged(done.photometric)
    assert not leaves_unchanged(left.photometric)


def test_crowd_regions_are_not_learned_and_boxes_are_clipped_to_the_image() -> None:
    record = replace(
        synthetic_records(1)[0],
        boxes=np.array([[-9, -9, 8, 8], [5, 5, 99, 99], [1, 1, 9, 9], [4, 60, 9, 60]], np.float32),
        labels=np.array([0, 1, 2, 3], np.int32),
        areas=np.ones(4, np.float32),
        crowd=np.array([False, False, True, False]),
    )
    width, height = record.width, record.height
    (target,) = batch_of([record], replace(EVALUATION, micro_batch_size=1)).targets()
    assert target["labels"].tolist() == [0, 1]
    expected = torch.tensor([[0, 0, 8, 8], [5, 5, width, height]]) / torch.tensor([width, height] * 2)
    centre, size = target["boxes"].split(2, dim=1)
    torch.testing.assert_close(torch.cat([centre - size / 2, centre + size / 2], dim=1), expected)


def test_targets_of_images_without_boxes_are_empty_and_typed() -> None:
    records = synthetic_records(4)
    none = {name: getattr(records[0], name)[:0] for name in ("boxes", "labels", "areas", "crowd")}
    batch = batch_of([replace(record, **none) for record in records])
    assert batch.counts == (0, 0, 0, 0)
    for target in batch.targets():
        assert target["boxes"].shape == (0, 4)
        assert target["boxes"].dtype == torch.float32
        assert target["labels"].dtype == torch.int64


def test_the_pixels_are_those_of_the_block_not_a_copy() -> None:
    decoded = decode_block(encoded(synthetic_records(4)), TRAINING)
    images = decoded.column("images").chunk(0).flatten()
    (batch,) = batches_from_arrow(decoded, CANVAS)
    assert batch.images.data_ptr() == images.buffers()[1].address


def test_a_block_is_the_micro_batches_that_it_was_made_of() -> None:
    """Also with a broken image in one of them, and with fewer images at the end of an evaluation."""
    records = synthetic_records(10)
    records[5] = broken(records[5])
    alone = [batch_of(records[:4]), batch_of(records[4:8])]
    block = batches_from_arrow(decode_block(encoded(records[:8], real=[4, 4]), TRAINING), CANVAS)
    assert [batch.step for batch in block] == [11, 12]
    for batch, expected in zip(block, alone, strict=True):
        assert_equal(batch, replace(expected, step=batch.step))
    assert [len(batch.replaced) for batch in block] == [0, 1]

    kept = [*records[:4], records[8]]
    block = batches_from_arrow(decode_block(encoded(kept, real=[4, 1, 0]), EVALUATION), CANVAS)
    for batch, images in zip(block, (records[:4], [records[8]], []), strict=True):
        assert_equal(batch, replace(batch_of(images, EVALUATION), step=batch.step))


def test_an_empty_block_has_no_micro_batches() -> None:
    empty = encoded([]).set_column(3, "real", pa.array([[]], pa.list_(pa.int64())))
    assert batches_from_arrow(decode_block(empty, TRAINING), CANVAS) == []


def assert_equal(batch: Batch, expected: Batch) -> None:
    for name, value in vars(expected).items():
        same = (
            torch.equal(getattr(batch, name), value)
            if isinstance(value, torch.Tensor)
            else getattr(batch, name) == value
        )
        assert same, name


@pytest.mark.parametrize(("bad", "stand_ins"), [([1], {1: 2}), ([3], {3: 0}), ([0, 1, 3], {0: 2, 1: 2, 3: 2})])
def test_an_image_that_cannot_be_decoded_is_replaced_by_the_next_that_can_and_named(
    bad: list[int], stand_ins: dict[int, int]
) -> None:
    records = synthetic_records(4)
    whole = batch_of(records)
    batch = batch_of([broken(record) if i in bad else record for i, record in enumerate(records)])
    for i in range(4):
        stand_in = stand_ins.get(i, i)
        assert batch.image_id[i] == records[stand_in].image_id
        assert torch.equal(batch.images[i], whole.images[stand_in])
        assert torch.equal(batch.photometric[i], whole.photometric[stand_in])
        assert torch.equal(batch.targets()[i]["boxes"], whole.targets()[stand_in]["boxes"])
    assert [replacement.image_id for replacement in batch.replaced] == [records[i].image_id for i in bad]
    assert all(records[replacement.image_id - 1].file_name in replacement.reason for replacement in batch.replaced)


def test_a_broken_partner_is_named_and_leaves_its_part_of_the_mosaic_black() -> None:
    records = synthetic_records(4)
    records[2] = broken(records[2])
    block = encoded([records[0], records[1], records[2]], real=[2])
    partners = pa.array([[1, 0, 2, -1, -1, -1]], pa.list_(pa.int32()))
    block = block.set_column(block.schema.get_field_index("partners"), "partners", partners)
    (batch,) = batches_from_arrow(decode_block(block, replace(TRAINING, micro_batch_size=2)), CANVAS)
    assert batch.image_id.tolist() == [records[0].image_id, records[1].image_id]
    (lost,) = batch.replaced
    assert lost.image_id == records[2].image_id
    assert f"left black: {records[2].file_name}, in the mosaic of image {records[0].image_id}" in lost.reason


def test_a_micro_batch_without_a_decodable_image_is_an_error_that_names_every_image() -> None:
    records = [broken(record) for record in synthetic_records(4)]
    with pytest.raises(UndecodableImageError) as error:
        batch_of(records)
    assert all(record.file_name in str(error.value) for record in records)


def test_evaluation_does_not_replace_images() -> None:
    records = synthetic_records(4)
    with pytest.raises(UndecodableImageError, match=f"image {records[2].image_id}, {records[2].file_name}"):
        batch_of([*records[:2], broken(records[2]), records[3]], EVALUATION)


@pytest.mark.parametrize("real", [3, 1, 0])
def test_evaluation_pads_its_last_batches_and_marks_the_padding(real: int) -> None:
    records = synthetic_records(real)
    batch = batch_of(records, EVALUATION)
    assert batch.padding == (False,) * real + (True,) * (4 - real)
    assert batch.image_id.tolist() == [record.image_id for record in records] + [-1] * (4 - real)
    assert batch.images.shape == (4, 3, *CANVAS)
    assert batch.photometric.shape == (4, len(identity_photometric()))
    assert batch.orig_size.shape == (4, 2)
    assert not batch.images[real:].any()
    assert [len(target["labels"]) for target in batch.targets()[real:]] == [0] * (4 - real)
    for i, record in enumerate(records):
        sample = plain_sample(without_crowd(record), canvas=CANVAS)
        np.testing.assert_array_equal(batch.images[i].permute(1, 2, 0).numpy(), sample.image)


def test_a_batch_moves_with_all_its_tensors() -> None:
    batch = replace(batch_of(synthetic_records(4)), replaced=(Replacement(7, "broken"),))
    moved = batch.to("meta")
    tensors = {name for name, value in vars(batch).items() if isinstance(value, torch.Tensor)}
    taught = {"teacher_boxes", "teacher_labels", "teacher_scores"}
    assert tensors == {"images", "photometric", "boxes", "labels", "image_id", "orig_size"} | taught
    assert all(getattr(moved, name).device.type == "meta" for name in tensors)
    assert (moved.counts, moved.replaced, moved.step) == (batch.counts, batch.replaced, batch.step)
