"""Functions that data tasks run: read a window of the plan, decode a block. No torch here: it would slow every start.

A block is a few consecutive micro-batches of one lane, and ONE row of a Ray dataset: its images and boxes are lists within. The
unit that Ray splits and orders is therefore a unit of the plan, and no block can come apart on its way.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.data.augment.decode import UndecodableImageError
from pipeline.data.augment.mixing import mixed_batch
from pipeline.data.augment.photometric_parameters import identity_photometric
from pipeline.data.augment.photometric_pixels import distort_pixels
from pipeline.data.augment.samples import Sample, augmented_sample, plain_sample, without_crowd
from pipeline.data.augment.settings import AugmentSettings
from pipeline.data.shards.reader import ROW_TYPE, RowGroups, Rows, read_training_rows, take_rows
from pipeline.data.shards.records import ImageRecord, records_from_table
from pipeline.data.stream.plan import BatchPlan, Window

ENCODED_SCHEMA = pa.schema(
    [
        ("step", pa.int64()),  # first step of the block
        ("micro_batch", pa.int64()),  # lane: index within the step
        ("epoch", pa.int64()),
        ("real", pa.list_(pa.int64())),  # [K] images of each micro-batch, fewer at the end of an evaluation
        ("rows", pa.list_(ROW_TYPE)),  # [sum of real], micro-batch after micro-batch
    ]
)

DECODED_SCHEMA = pa.schema(
    [
        ("step", pa.int64()),
        ("micro_batch", pa.int64()),
        ("real", pa.list_(pa.int64())),  # [K]
        ("images", pa.list_(pa.uint8())),  # flat [K, B, H, W, 3]; zeros where padded
        ("photometric", pa.list_(pa.float32())),  # flat [K, B, P]
        ("image_id", pa.list_(pa.int64())),  # [sum of real], as in the columns below: padding has no entries
        ("orig_size", pa.list_(pa.int64())),  # flat [sum of real, 2] width, height
        ("counts", pa.list_(pa.int64())),  # [sum of real] boxes of each image
        ("boxes", pa.list_(pa.float32())),  # flat [T, 4] cxcywh, normalised to the canvas, image after image
        ("labels", pa.list_(pa.int64())),  # [T]
        ("teacher_counts", pa.list_(pa.int64())),  # [sum of real] boxes of a teacher, and in the same way
        ("teacher_boxes", pa.list_(pa.float32())),
        ("teacher_labels", pa.list_(pa.int64())),
        ("teacher_scores", pa.list_(pa.float32())),
        ("replaced_in", pa.list_(pa.int64())),  # index in 0..K - 1 of the micro-batch of each undecodable image
        ("replaced_id", pa.list_(pa.int64())),
        ("replaced_why", pa.list_(pa.string())),
    ]
)


@dataclass(frozen=True)
class Augmentation:
    """Augmentation of a training: settings, seed, and the epochs with strong augmentation."""

    seed: int
    settings: AugmentSettings
    strong_epochs: int | None  # strong augmentation ends before this epoch; None: never
    distort: bool = False  # also the colours, which otherwise is left to the training device

    def of_epoch(self, epoch: int) -> AugmentSettings:
        """Settings of one epoch."""
        strong = self.strong_epochs is None or epoch < self.strong_epochs
        return self.settings if strong else self.settings.clean()


@dataclass(frozen=True)
class DecodeSettings:
    """Settings for the decoding of a micro-batch."""

    canvas: tuple[int, int]  # height, width
    micro_batch_size: int
    augmentation: Augmentation | None  # None for evaluation


def read_window(
    item: pa.Table,
    source: RowGroups,
    plan: BatchPlan,
    *,
    lanes: Sequence[Sequence[int | None]],
    block_steps: int,
    start_step: int,
) -> Iterator[pa.Table]:
    """Read the rows of one window in some lanes, and yield them as encoded blocks.

    Blocks of few steps come first, so that the first batch waits for little; then they double up to `block_steps`.

    Args:
        item: one row, the fields of a `Window`.
        lanes: order of the blocks within each run of steps, row after row; None stands for an empty block.
        block_steps: most steps of a block.
        start_step: first step of the stream.
    """
    (fields,) = item.to_pylist()
    window = Window(**fields)
    flat = [lane for row in lanes for lane in row if lane is not None]
    rows_of = dict(zip(flat, plan.rows(window, flat), strict=True))
    wanted = np.unique(np.concatenate([rows.group for rows in rows_of.values()]))
    tables = read_training_rows(source, wanted)
    groups = {group: table.combine_chunks().to_batches()[0].to_struct_array() for group, table in tables.items()}

    size = plan.micro_batch_size
    step = window.first_step
    while step < window.stop_step:
        steps = min(block_steps, max(1, step - start_step), window.stop_step - step)
        first = (step - window.first_step) * size
        for lane in (lane for row in lanes for lane in row):
            rows = Rows(np.zeros(0, np.int64), np.zeros(0, np.int64)) if lane is None else rows_of[lane]
            part = Rows(rows.group[first : first + steps * size], rows.row[first : first + steps * size])
            yield _one_row(
                ENCODED_SCHEMA,
                step=step,
                micro_batch=-1 if lane is None else lane,
                epoch=window.epoch,
                real=[] if lane is None else [min(size, max(0, len(part) - k * size)) for k in range(steps)],
                rows=take_rows(groups, part),
            )
        step += steps


def decode_block(encoded: pa.Table, settings: DecodeSettings) -> pa.Table:
    """Decode one block of micro-batches to pixels and boxes.

    In training an image that cannot be decoded is replaced by the next decodable one of its micro-batch, and reported.

    Raises:
        UndecodableImageError: in training no image of a micro-batch can be decoded, in evaluation one cannot.
    """
    # Decode each image; failures are collected.
    rows = encoded.column("rows").chunk(0).flatten()
    records = list(records_from_table(pa.Table.from_struct_array(rows)))
    real = encoded.column("real").chunk(0).flatten().to_numpy()
    epoch = encoded.column("epoch")[0].as_py()
    images = np.zeros((len(real), settings.micro_batch_size, *settings.canvas, 3), np.uint8)
    photometric = np.tile(identity_photometric(), (len(real), settings.micro_batch_size, 1))
    samples: list[Sample] = []
    kept: list[ImageRecord] = []
    replaced: list[tuple[int, int, str]] = []  # index of the micro-batch, image id, reason
    first = 0
    for k, count in enumerate(real.tolist()):
        decoded, names, failures = _decoded_micro_batch(records[first : first + count], epoch, settings)
        for i, sample in enumerate(decoded):
            images[k, i] = sample.image
            distorts = settings.augmentation is not None and settings.augmentation.distort
            photometric[k, i] = distort_pixels(images[k, i], sample.photometric) if distorts else sample.photometric
        samples += decoded
        kept += names
        replaced += [(k, image_id, reason) for image_id, reason in failures]
        first += count
    truth = [sample.truth for sample in samples]
    return _one_row(
        DECODED_SCHEMA,
        step=encoded.column("step")[0],
        micro_batch=encoded.column("micro_batch")[0],
        real=real,
        images=images.reshape(-1),
        photometric=photometric.reshape(-1),
        image_id=[record.image_id for record in kept],
        orig_size=[side for record in kept for side in (record.width, record.height)],
        counts=[int(mask.sum()) for mask in truth],
        boxes=_joined([sample.boxes[mask] for sample, mask in zip(samples, truth, strict=True)], np.float32),
        labels=_joined([sample.labels[mask] for sample, mask in zip(samples, truth, strict=True)], np.int64),
        teacher_counts=[int((~mask).sum()) for mask in truth],
        teacher_boxes=_joined([sample.boxes[~mask] for sample, mask in zip(samples, truth, strict=True)], np.float32),
        teacher_labels=_joined([sample.labels[~mask] for sample, mask in zip(samples, truth, strict=True)], np.int64),
        teacher_scores=_joined([sample.scores[~mask] for sample, mask in zip(samples, truth, strict=True)], np.float32),
        replaced_in=[k for k, _, _ in replaced],
        replaced_id=[image_id for _, image_id, _ in replaced],
        replaced_why=[reason for _, _, reason in replaced],
    )


def _decoded_micro_batch(
    records: Sequence[ImageRecord], epoch: int, settings: DecodeSettings
) -> tuple[list[Sample], list[ImageRecord], list[tuple[int, str]]]:
    """Samples of a micro-batch, the record that each shows, and (image id, reason) of what could not be decoded."""
    decoded: dict[int, Sample] = {}  # by index in the micro-batch
    failures: dict[int, str] = {}
    for index, record in enumerate(records):
        try:
            decoded[index] = _decoded_sample(record, epoch, settings)
        except UndecodableImageError as error:
            failures[index] = f"{record.file_name}: {error}"
    if failures and (settings.augmentation is None or not decoded):
        named = "; ".join(f"image {records[index].image_id}, {why}" for index, why in failures.items())
        raise UndecodableImageError(f"{named}; `dfine doctor` lists such images, `dfine prepare` leaves them out")
    shown = [_next_decoded(index, decoded, len(records)) for index in range(len(records))]
    kept = [records[index] for index in shown]
    samples = [decoded[index] for index in shown]
    if settings.augmentation is not None:
        seed, strength = settings.augmentation.seed, settings.augmentation.of_epoch(epoch)
        image_ids = [record.image_id for record in kept]
        samples = mixed_batch(samples, image_ids, seed=seed, epoch=epoch, settings=strength)
    return samples, kept, [(records[index].image_id, why) for index, why in failures.items()]


def _decoded_sample(record: ImageRecord, epoch: int, settings: DecodeSettings) -> Sample:
    image = without_crowd(record)
    if settings.augmentation is None:
        return plain_sample(image, canvas=settings.canvas)
    return augmented_sample(
        image,
        seed=settings.augmentation.seed,
        epoch=epoch,
        image_id=record.image_id,
        settings=settings.augmentation.of_epoch(epoch),
        canvas=settings.canvas,
    )


def _next_decoded(index: int, decoded: dict[int, Sample], count: int) -> int:
    return next(i % count for i in range(index, index + count) if i % count in decoded)


def _joined(arrays: list[NDArray[Any]], dtype: type[np.generic]) -> NDArray[Any]:
    return np.concatenate([np.zeros(0, dtype), *(array.ravel() for array in arrays)])


def _one_row(schema: pa.Schema, **values: Any) -> pa.Table:
    """Build a table of one row; for a list column the value is the list."""

    def column(field: pa.Field) -> pa.Array:
        value = values[field.name]
        if not pa.types.is_list(field.type):
            return pa.array([value], field.type)
        items = value if isinstance(value, pa.Array) else pa.array(value, field.type.value_type)
        return pa.ListArray.from_arrays(pa.array([0, len(items)], pa.int32()), items, type=field.type)

    return pa.Table.from_arrays([column(field) for field in schema], schema=schema)
