"""Plan of a preparation, stored beside the work list: all that determines the shards, and what was rejected so far."""

from collections.abc import Sequence
from itertools import islice

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import JsonValue, NonNegativeInt, PositiveInt, ValidationError

from pipeline import storage
from pipeline.data.prepare.shard_writer import WORK_FOLDER, WORK_SCHEMA, PrepareOptions, work_table
from pipeline.data.shards.manifest import Category, FrozenModel, Notice
from pipeline.data.shards.records import REJECTED_SCHEMA, Rejection
from pipeline.data.sources.index import AnnotationIndex
from pipeline.errors import UserError, in_one_line
from pipeline.progress import Progress

REJECTED_NAME = "rejected.parquet"
WORK_PLAN = f"{WORK_FOLDER}/plan.json"  # written last: if it exists, the work list is complete
REJECTED_BY_SOURCE = f"{WORK_FOLDER}/rejected.parquet"


class PrepareError(UserError, RuntimeError):
    """Data that cannot become a shard set, or a folder that cannot hold it."""


class WorkPlan(FrozenModel):
    """Everything that determines the shards, stored beside the work list."""

    split: str
    source: dict[str, JsonValue]
    options: PrepareOptions
    categories: tuple[Category, ...]
    images: PositiveInt
    shards: PositiveInt
    first_shard: NonNegativeInt = 0
    extends: str | None = None  # digest of the finished set to which these shards are added
    notices: tuple[Notice, ...] = ()  # counted facts about the source


def read_plan(out: str) -> WorkPlan | None:
    """Read the plan of an unfinished preparation; None if there is none.

    Raises:
        PrepareError: it is damaged.
    """
    uri = storage.join(out, WORK_PLAN)
    if not storage.exists(uri):
        return None
    try:
        return WorkPlan.model_validate_json(storage.read_bytes(uri))
    except ValidationError as error:
        folder = storage.join(out, WORK_FOLDER)
        raise PrepareError(f"{uri}: damaged ({in_one_line(error)}); delete {folder} to begin again") from None


def write_work_list(index: AnnotationIndex, uri: str, *, images: int, rows_per_shard: int) -> None:
    """Write all images of the index in order, one row group per shard."""
    ordered = index.ordered()
    with (
        storage.open_atomic(uri) as file,
        pq.ParquetWriter(file, WORK_SCHEMA) as writer,
        Progress("work list", total=images, unit=" images", delay=5) as progress,
    ):
        while (work := work_table(islice(ordered, rows_per_shard))).num_rows:
            writer.write_table(work, row_group_size=work.num_rows)
            progress.advance(work.num_rows)


def read_rejections(uri: str) -> list[Rejection]:
    """Read a list of rejections."""
    rows = pq.read_table(pa.BufferReader(storage.read_bytes(uri))).to_pylist()
    return [Rejection(**row) for row in rows]


def write_rejections(uri: str, rejected: Sequence[Rejection]) -> None:
    """Write a list of rejections as Parquet."""
    table = pa.Table.from_pylist([rejection._asdict() for rejection in rejected], schema=REJECTED_SCHEMA)
    with storage.open_atomic(uri) as file:
        pq.write_table(table, file)
