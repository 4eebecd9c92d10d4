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

from pipeline.data.augment.blend import Blend, PastedBox, blended_targets, draw_blend
from pipeline.data.augment.decode import UndecodableImageError
from pipeline.data.augment.generators import epoch_of_showing
from pipeline.data.augment.mosaic import mosaic_sample
from pipeline.data.augment.photometric_parameters import identity_photometric
from pipeline.data.augment.photometric_pixels import distort_pixels
from pipeline.data.augment.samples import (
    IGNORED,
    TRUTH,
    Sample,
    augmented_sample,
    is_label,
    plain_sample,
    without_crowd,
)
from pipeline.data.augment.settings import AugmentSettings
from pipeline.data.augment.stages import Stages
from pipeline.data.shards.reader import ROW_TYPE, RowGroups, Rows, read_training_rows, take_rows
from pipeline.data.shards.records import ImageRecord, records_from_table
from pipeline.data.stream.partners import PARTNERS, draw_partners, partner_pools, with_partners
from pipeline.data.stream.plan import BatchPlan, Window

ENCODED_SCHEMA = pa.schema(
    [
        ("step", pa.int64()),  # first step of the block
        ("micro_batch", pa.int64()),  # lane: index within the step
        ("epoch", pa.int64()),
        ("real", pa.list_(pa.int64())),  # [K] images of each micro-batch, fewer at the end of an evaluation
        ("rows", pa.list_(ROW_TYPE)),  # [sum of real], micro-batch after micro-batch; then other partners of mosaics
        ("showings", pa.list_(pa.int64())),  # [sum of real] see `mixture.Mixture`; empty: all are 0
        (
            "partners",
            pa.list_(pa.int32()),
        ),  # flat [sum of real, 3] indices of rows, -1 without; empty: no mosaics at all
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
        ("blend_ratio", pa.list_(pa.float64())),  # [K], with the pastes a `Blend` of each micro-batch
        ("pastes", pa.list_(pa.int32())),  # flat [N, 1 + 8] index in 0..K - 1 of the micro-batch, fields of a `Paste`
        ("counts", pa.list_(pa.int64())),  # [sum of real] boxes of each image, after the blend
        ("boxes", pa.list_(pa.float32())),  # flat [T, 4] cxcywh, normalised to the canvas, image after image
        ("labels", pa.list_(pa.int64())),  # [T]
        ("weights", pa.list_(pa.float32())),  # [T]; empty: all 1
        ("ignored_counts", pa.list_(pa.int64())),  # [sum of real] regions to ignore, and in the same way
        ("ignored_boxes", pa.list_(pa.float32())),
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
    """Augmentation of a training: settings, seed, and the stages that they change with."""

    seed: int
    settings: AugmentSettings
    stages: Stages
    distort: bool = False  # also the colours, which otherwise is left to the training device

    def of_epoch(self, epoch: int) -> AugmentSettings:
        """Settings of one epoch."""
        return self.stages.settings_of(epoch, self.settings)


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
    augmentation: Augmentation | None = None,
) -> Iterator[pa.Table]:
    """Read the rows of one window in some lanes, and yield them as encoded blocks.

    Blocks of few steps come first, so that the first batch waits for little; then they double up to `block_steps`.

    Args:
        item: one row, the fields of a `Window`.
        lanes: order of the blocks within each run of steps, row after row; None stands for an empty block.
        block_steps: most steps of a block.
        start_step: first step of the stream.
        augmentation: decides which samples are mosaics, and need the rows of their partners; None for evaluation.
    """
    (fields,) = item.to_pylist()
    window = Window(**fields)
    flat = [lane for row in lanes for lane in row if lane is not None]
    rows_of = dict(zip(flat, plan.rows(window, flat), strict=True))
    pool_of = _pools(plan, window, flat, augmentation)
    wanted = np.unique(np.concatenate([rows.group for rows in (*rows_of.values(), *pool_of.values())]))
    tables = read_training_rows(source, wanted)
    groups = {group: table.combine_chunks().to_batches()[0].to_struct_array() for group, table in tables.items()}

    size = plan.micro_batch_size
    step = window.first_step
    while step < window.stop_step:
        steps = min(block_steps, max(1, step - start_step), window.stop_step - step)
        first = (step - window.first_step) * size
        for lane in (lane for row in lanes for lane in row):
            rows = Rows(np.zeros(0, np.int64), np.zeros(0, np.int64)) if lane is None else rows_of[lane]
            part = rows[first : first + steps * size]
            together, partners = part, np.zeros(0, np.int32)
            if lane in pool_of and augmentation is not None:
                together, partners = _joined_rows(groups, part, pool_of[lane], augmentation, window.epoch)
            yield _one_row(
                ENCODED_SCHEMA,
                step=step,
                micro_batch=-1 if lane is None else lane,
                epoch=window.epoch,
                real=[] if lane is None else [min(size, max(0, len(part) - k * size)) for k in range(steps)],
                rows=take_rows(groups, together),
                showings=[] if part.showing is None else part.showing,
                partners=partners.ravel(),
            )
        step += steps


def _pools(plan: BatchPlan, window: Window, lanes: list[int], augmentation: Augmentation | None) -> dict[int, Rows]:
    """Rows to draw partners from, by lane; none in an epoch without mosaics."""
    if augmentation is None or not augmentation.of_epoch(window.epoch).mosaic_probability:
        return {}
    return dict(zip(lanes, partner_pools(plan, window, lanes), strict=True))


def _joined_rows(
    groups: dict[int, pa.StructArray], own: Rows, pool: Rows, augmentation: Augmentation, epoch: int
) -> tuple[Rows, NDArray[np.int32]]:
    """Rows of some samples and of their partners, and the indices of the partners."""
    pairs = zip(own.group.tolist(), own.row.tolist(), strict=True)
    image_ids = np.array([groups[group].field("image_id")[row].as_py() for group, row in pairs], np.int64)
    probability = augmentation.of_epoch(epoch).mosaic_probability
    drawn = draw_partners(
        image_ids, len(pool), seed=augmentation.seed, epoch=epoch, probability=probability, showings=own.showing
    )
    return with_partners(own, pool, drawn)


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
    partners = encoded.column("partners").chunk(0).flatten().to_numpy().reshape(-1, PARTNERS).tolist()
    showings = encoded.column("showings").chunk(0).flatten().to_pylist() or [0] * int(real.sum())
    epoch, step = encoded.column("epoch")[0].as_py(), encoded.column("step")[0].as_py()
    micro_batch = encoded.column("micro_batch")[0].as_py()
    images = np.zeros((len(real), settings.micro_batch_size, *settings.canvas, 3), np.uint8)
    photometric = np.tile(identity_photometric(), (len(real), settings.micro_batch_size, 1))
    boxes: list[NDArray[np.float32]] = []
    labels: list[NDArray[np.int64]] = []
    weights: list[NDArray[np.float32]] = []
    ignored: list[NDArray[np.float32]] = []
    teacher: list[tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.float32]]] = []
    kept: list[ImageRecord] = []
    blends: list[Blend] = []
    replaced: list[tuple[int, int, str]] = []  # index of the micro-batch, image id, reason
    first = 0
    for k, count in enumerate(real.tolist()):
        sources = [
            [records[i], *(records[p] for p in (partners[i] if partners else ()) if p >= 0)]
            for i in range(first, first + count)
        ]
        decoded, names, failures = _decoded_micro_batch(sources, showings[first : first + count], epoch, settings)
        for i, sample in enumerate(decoded):
            images[k, i] = sample.image
            distorts = settings.augmentation is not None and settings.augmentation.distort
            photometric[k, i] = distort_pixels(images[k, i], sample.photometric) if distorts else sample.photometric
        blend, pasted = _drawn_blend(decoded, epoch, step + k, micro_batch, settings)
        joined = blended_targets(decoded, blend, pasted)
        for image_boxes, image_labels, marks in zip(*joined, strict=True):
            labelled, taught = is_label(marks), marks >= 0
            boxes.append(image_boxes[labelled])
            labels.append(image_labels[labelled])
            weights.append(-marks[labelled])
            ignored.append(image_boxes[marks == IGNORED])
            teacher.append((image_boxes[taught], image_labels[taught], marks[taught]))
        blends.append(blend)
        kept += names
        replaced += [(k, image_id, reason) for image_id, reason in failures]
        first += count
    return _one_row(
        DECODED_SCHEMA,
        step=step,
        micro_batch=micro_batch,
        real=real,
        images=images.reshape(-1),
        photometric=photometric.reshape(-1),
        image_id=[record.image_id for record in kept],
        orig_size=[side for record in kept for side in (record.width, record.height)],
        blend_ratio=[blend.ratio for blend in blends],
        pastes=[number for k, blend in enumerate(blends) for paste in blend.pastes for number in (k, *paste)],
        counts=[len(label) for label in labels],
        boxes=_joined(boxes, np.float32),
        labels=_joined(labels, np.int64),
        weights=_joined(weights if any((own != -TRUTH).any() for own in weights) else [], np.float32),
        ignored_counts=[len(own) for own in ignored],
        ignored_boxes=_joined(ignored, np.float32),
        teacher_counts=[len(taught) for _, taught, _ in teacher],
        teacher_boxes=_joined([taught for taught, _, _ in teacher], np.float32),
        teacher_labels=_joined([taught for _, taught, _ in teacher], np.int64),
        teacher_scores=_joined([taught for _, _, taught in teacher], np.float32),
        replaced_in=[k for k, _, _ in replaced],
        replaced_id=[image_id for _, image_id, _ in replaced],
        replaced_why=[reason for _, _, reason in replaced],
    )


def _decoded_micro_batch(
    sources: Sequence[Sequence[ImageRecord]], showings: Sequence[int], epoch: int, settings: DecodeSettings
) -> tuple[list[Sample], list[ImageRecord], list[tuple[int, str]]]:
    """Samples of a micro-batch, the record that each shows, and (image id, reason) of what could not be decoded.

    Args:
        sources: for each sample its own record and those of its partners.
        showings: for each sample the number of its showing.
    """
    decoded: dict[int, Sample] = {}  # by index in the micro-batch
    failures: dict[int, str] = {}
    partners: list[tuple[int, str]] = []
    for index, ((record, *others), showing) in enumerate(zip(sources, showings, strict=True)):
        try:
            decoded[index], broken = _decoded_sample(record, others, epoch, showing, settings)
        except UndecodableImageError as error:
            failures[index] = f"{record.file_name}: {error}"
            continue
        for other, why in broken.items():
            lost = others[other - 1]
            name = f"{lost.file_name}, in the mosaic of image {record.image_id}"
            partners.append((lost.image_id, f"left black: {name}: {why}"))
    records = [source[0] for source in sources]
    if failures and (settings.augmentation is None or not decoded):
        named = "; ".join(f"image {records[index].image_id}, {why}" for index, why in failures.items())
        raise UndecodableImageError(f"{named}; `dfine doctor` lists such images, `dfine prepare` leaves them out")
    shown = [_next_decoded(index, decoded, len(records)) for index in range(len(records))]
    replaced = [(records[index].image_id, f"replaced by the next one: {why}") for index, why in failures.items()]
    return [decoded[index] for index in shown], [records[index] for index in shown], replaced + partners


def _decoded_sample(
    record: ImageRecord, partners: Sequence[ImageRecord], epoch: int, showing: int, settings: DecodeSettings
) -> tuple[Sample, dict[int, str]]:
    """A sample, and for a mosaic the reasons why some partners are missing, counted from 1."""
    image = without_crowd(record)
    if settings.augmentation is None:
        return plain_sample(image, canvas=settings.canvas), {}
    seed, strength = settings.augmentation.seed, settings.augmentation.of_epoch(epoch)
    key = epoch_of_showing(epoch, showing)
    if partners:
        return mosaic_sample(
            [image, *map(without_crowd, partners)],
            seed=seed,
            epoch=key,
            image_id=record.image_id,
            settings=strength,
            canvas=settings.canvas,
        )
    sample = augmented_sample(
        image, seed=seed, epoch=key, image_id=record.image_id, settings=strength, canvas=settings.canvas
    )
    return sample, {}


def _drawn_blend(
    samples: Sequence[Sample], epoch: int, step: int, micro_batch: int, settings: DecodeSettings
) -> tuple[Blend, list[PastedBox]]:
    if settings.augmentation is None:
        return Blend(), []
    return draw_blend(
        samples,
        seed=settings.augmentation.seed,
        step=step,
        micro_batch=micro_batch,
        settings=settings.augmentation.of_epoch(epoch),
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
