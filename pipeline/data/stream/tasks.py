"""Functions of the data tasks: read a window of the plan, decode a micro-batch. No torch: it would slow the start of each task.

A micro-batch is ONE row of a Ray dataset, with its images and boxes as lists. So the unit that Ray splits and orders is the unit
of the plan, and a micro-batch is never split.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.data.augment.decode import UndecodableImageError
from pipeline.data.augment.mixing import mixed_batch
from pipeline.data.augment.photometric_parameters import identity_photometric
from pipeline.data.augment.samples import Sample, augmented_sample, plain_sample, without_crowd
from pipeline.data.augment.settings import AugmentSettings
from pipeline.data.shards.reader import ROW_TYPE, RowGroups, Rows, read_row_groups, take_rows
from pipeline.data.shards.records import ImageRecord, records_from_table
from pipeline.data.stream.plan import BatchPlan, Window

ENCODED_SCHEMA = pa.schema(
    [
        ("step", pa.int64()),
        ("micro_batch", pa.int64()),  # index within the step
        ("epoch", pa.int64()),
        ("rows", pa.list_(ROW_TYPE)),  # [B], or fewer at the end of an evaluation
    ]
)

DECODED_SCHEMA = pa.schema(
    [
        ("step", pa.int64()),
        ("micro_batch", pa.int64()),
        ("images", pa.list_(pa.uint8())),  # flat [B, H, W, 3], zero where padded
        ("photometric", pa.list_(pa.float32())),  # flat [B, P]
        ("image_id", pa.list_(pa.int64())),  # [B], or fewer where the rest is padding, as in the columns below
        ("orig_size", pa.list_(pa.int64())),  # flat [B, 2] width, height
        ("counts", pa.list_(pa.int64())),  # [B] boxes per image
        ("boxes", pa.list_(pa.float32())),  # flat [T, 4] cxcywh, normalised to the canvas, image after image
        ("labels", pa.list_(pa.int64())),  # [T]
        ("replaced_id", pa.list_(pa.int64())),  # images that could not be decoded
        ("replaced_why", pa.list_(pa.string())),
    ]
)


@dataclass(frozen=True)
class Augmentation:
    """Augmentation of a training: settings, seed, and the epochs with strong augmentation."""

    seed: int
    settings: AugmentSettings
    strong_epochs: int | None  # strong augmentation ends before this epoch; None: never

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


def read_window(item: pa.Table, source: RowGroups, plan: BatchPlan) -> Iterator[pa.Table]:
    """Read the encoded micro-batches of one window.

    Args:
        item: one row with the fields of a `Window`.
    """
    (fields,) = item.to_pylist()
    window = Window(**fields)
    rows = plan.rows(window)
    tables = read_row_groups(source, np.unique(rows.group))
    groups = {group: table.combine_chunks().to_batches()[0].to_struct_array() for group, table in tables.items()}
    for number in range((window.stop_step - window.first_step) * plan.micro_batches):
        step, micro_batch = divmod(number, plan.micro_batches)
        part = slice(number * plan.micro_batch_size, (number + 1) * plan.micro_batch_size)
        yield _one_row(
            ENCODED_SCHEMA,
            step=window.first_step + step,
            micro_batch=micro_batch,
            epoch=window.epoch,
            rows=take_rows(groups, Rows(rows.group[part], rows.row[part])),
        )


def decode_micro_batch(encoded: pa.Table, settings: DecodeSettings) -> pa.Table:
    """Decode and augment one micro-batch.

    In training an image that cannot be decoded is replaced by the next decodable one of its micro-batch, and reported.

    Raises:
        UndecodableImageError: in training if no image of the micro-batch can be decoded, in evaluation if any cannot.
    """
    # Decode each image; failures are collected.
    rows = encoded.column("rows").chunk(0).flatten()
    records = list(records_from_table(pa.Table.from_struct_array(rows)))
    epoch = encoded.column("epoch")[0].as_py()
    decoded: dict[int, Sample] = {}  # by index in the micro-batch
    failures: dict[int, str] = {}
    for index, record in enumerate(records):
        try:
            decoded[index] = _decoded_sample(record, epoch, settings)
        except UndecodableImageError as error:
            failures[index] = f"{record.file_name}: {error}"
    if failures and (settings.augmentation is None or not decoded):
        failed = "; ".join(f"image {records[index].image_id}, {why}" for index, why in failures.items())
        raise UndecodableImageError(f"{failed}; `dfine doctor` lists such images, `dfine prepare` leaves them out")

    # Failed images are replaced, then several-image augmentations follow.
    indices = [_next_decoded(index, decoded, len(records)) for index in range(len(records))]
    image_ids = [records[index].image_id for index in indices]
    samples = [decoded[index] for index in indices]
    if settings.augmentation is not None:
        seed, strength = settings.augmentation.seed, settings.augmentation.of_epoch(epoch)
        samples = mixed_batch(samples, image_ids, seed=seed, epoch=epoch, settings=strength)

    # Collect everything in the columns of one row.
    images = np.zeros((settings.micro_batch_size, *settings.canvas, 3), np.uint8)
    for image, sample in zip(images, samples, strict=False):
        image[:] = sample.image
    padding = [identity_photometric()] * (settings.micro_batch_size - len(samples))
    return _one_row(
        DECODED_SCHEMA,
        step=encoded.column("step")[0],
        micro_batch=encoded.column("micro_batch")[0],
        images=images.reshape(-1),
        photometric=np.concatenate([*(sample.photometric for sample in samples), *padding]),
        image_id=image_ids,
        orig_size=[side for index in indices for side in (records[index].width, records[index].height)],
        counts=[len(sample.labels) for sample in samples],
        boxes=_joined([sample.boxes for sample in samples], np.float32),
        labels=_joined([sample.labels for sample in samples], np.int64),
        replaced_id=[records[index].image_id for index in failures],
        replaced_why=list(failures.values()),
    )


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
    return next(p % count for p in range(index, index + count) if p % count in decoded)


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
