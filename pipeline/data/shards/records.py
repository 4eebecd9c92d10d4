"""Rows of a shard: encoded images with their boxes, in memory and as Parquet.

Boxes are kept as annotated: they may extend beyond the image, and crowd regions stay. Training clips and drops them,
evaluation needs them unchanged.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

SHARD_SCHEMA = pa.schema(
    [
        ("image_id", pa.int64()),
        ("file_name", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("image", pa.binary()),  # encoded file, usually JPEG
        ("boxes", pa.list_(pa.float32())),  # flat [4G], xyxy in pixels
        ("labels", pa.list_(pa.int32())),  # [G], 0..K-1
        ("areas", pa.list_(pa.float32())),  # [G] px^2 as annotated: the mask area where there is a mask
        ("crowd", pa.list_(pa.bool_())),  # [G], regions to ignore
    ]
)


# Column of sets with labels of unequal worth, [G]: how much a box counts in training, 1 for a box that a person has drawn. A
# crowd region of weight 0 is ignored by training, too; others are only left out of it. An empty list stands for ones.
WEIGHTS_FIELD = pa.field("weights", pa.list_(pa.float32()))
WEIGHTED_SCHEMA = SHARD_SCHEMA.append(WEIGHTS_FIELD)


@dataclass(frozen=True)
class TeacherBoxes:
    """T boxes that a teacher found in an image."""

    boxes: NDArray[np.float32]  # [T, 4] xyxy in pixels
    labels: NDArray[np.int32]  # [T]
    scores: NDArray[np.float32]  # [T] in 0..1


@dataclass(frozen=True)
class ImageRecord:
    """An encoded image of width x height pixels with G boxes; the first fields are the columns of `SHARD_SCHEMA`."""

    image_id: int
    file_name: str
    width: int
    height: int
    image: bytes
    boxes: NDArray[np.float32]  # [G, 4] xyxy in pixels
    labels: NDArray[np.int32]  # [G]
    areas: NDArray[np.float32]  # [G] px^2
    crowd: NDArray[np.bool_]  # [G]
    teacher: TeacherBoxes | None = None  # no column of the shard
    weights: NDArray[np.float32] | None = None  # [G], see `WEIGHTS_FIELD`; None: all 1

    def __post_init__(self) -> None:
        count = len(self.labels)
        shapes = [self.boxes.shape, self.labels.shape, self.areas.shape, self.crowd.shape]
        if shapes != [(count, 4), (count,), (count,), (count,)]:
            raise ValueError(
                f"{self.file_name}: boxes, labels, areas and crowd have shapes {shapes}; expected [G, 4] and [G]"
            )


def table_from_records(records: Sequence[ImageRecord], *, weighted: bool = False) -> pa.Table:
    """Table of shard rows, one per record, in the same order; with `weighted`, those of `WEIGHTED_SCHEMA`."""
    columns = [
        pa.array([record.image_id for record in records], pa.int64()),
        pa.array([record.file_name for record in records], pa.string()),
        pa.array([record.width for record in records], pa.int32()),
        pa.array([record.height for record in records], pa.int32()),
        pa.array([record.image for record in records], pa.binary()),
        pa.array([record.boxes.ravel() for record in records], pa.list_(pa.float32())),
        pa.array([record.labels for record in records], pa.list_(pa.int32())),
        pa.array([record.areas for record in records], pa.list_(pa.float32())),
        pa.array([record.crowd for record in records], pa.list_(pa.bool_())),
    ]
    table = pa.Table.from_arrays(columns, schema=SHARD_SCHEMA)
    if not weighted:
        return table
    weights = [
        np.ones(len(record.labels), np.float32) if record.weights is None else record.weights for record in records
    ]
    return table.append_column(WEIGHTS_FIELD, pa.array(weights, WEIGHTS_FIELD.type))


def with_weights(table: pa.Table) -> pa.Table:
    """Rows with a column of weights, which is empty lists where their file has none."""
    if WEIGHTS_FIELD.name in table.column_names:
        return table
    return table.append_column(WEIGHTS_FIELD, pa.array([[]] * table.num_rows, WEIGHTS_FIELD.type))


def records_from_table(table: pa.Table) -> Iterator[ImageRecord]:
    """Yield the rows of a table of `SHARD_SCHEMA`, with a teacher's boxes where it has their columns."""
    taught, weighted = "teacher_scores" in table.column_names, WEIGHTS_FIELD.name in table.column_names
    for row in table.to_pylist():
        yield ImageRecord(
            image_id=row["image_id"],
            file_name=row["file_name"],
            width=row["width"],
            height=row["height"],
            image=row["image"],
            boxes=np.asarray(row["boxes"], np.float32).reshape(-1, 4),
            labels=np.asarray(row["labels"], np.int32),
            areas=np.asarray(row["areas"], np.float32),
            crowd=np.asarray(row["crowd"], np.bool_),
            teacher=_teacher_boxes(row) if taught and row["teacher_scores"] else None,
            weights=np.asarray(row["weights"], np.float32) if weighted and row["weights"] else None,
        )


def _teacher_boxes(row: dict[str, Any]) -> TeacherBoxes:
    return TeacherBoxes(
        np.asarray(row["teacher_boxes"], np.float32).reshape(-1, 4),
        np.asarray(row["teacher_labels"], np.int32),
        np.asarray(row["teacher_scores"], np.float32),
    )


class Rejection(NamedTuple):
    """An image, a box or a label file that was left out of the shards; a row of `rejected.parquet`."""

    image_id: int | None
    file_name: str | None
    kind: Literal["image", "box", "file"]  # the image of a rejected box stays; a file is none of the source's images
    reason: str  # short, the same for all cases of a kind
    detail: str


REJECTED_SCHEMA = pa.schema(
    [
        ("image_id", pa.int64()),
        ("file_name", pa.string()),
        ("kind", pa.string()),
        ("reason", pa.string()),
        ("detail", pa.string()),
    ]
)
