"""Boxes of a teacher for the images of a shard set, in a folder of their own: the images are neither copied nor changed.

    <folder>/
        teacher.json            which shard set they belong to, where they come from, and the files
        shard-00000.parquet     one file for each shard, with the same row groups and rows

The digest of `teacher.json` identifies them: it covers the SHA-256 of every file, and the digest of the shard set.
"""

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs
from pydantic import JsonValue, NonNegativeInt
from pydantic import ValidationError as PydanticError

from pipeline import storage
from pipeline.data.shards.manifest import FrozenModel, ManifestError, Shard
from pipeline.errors import in_one_line

TEACHER_MANIFEST = "teacher.json"
TEACHER_FIELDS = (
    pa.field("teacher_boxes", pa.list_(pa.float32())),  # flat [4T], xyxy in pixels of the stored image
    pa.field("teacher_labels", pa.list_(pa.int32())),  # [T]
    pa.field("teacher_scores", pa.list_(pa.float32())),  # [T] in 0..1
)
TEACHER_SCHEMA = pa.schema([pa.field("image_id", pa.int64()), *TEACHER_FIELDS])


class TeacherManifest(FrozenModel):
    """Content of `teacher.json`."""

    format_version: Literal[1] = 1
    shard_set: str  # digest of its manifest
    files: tuple[Shard, ...]  # in the order of its shards
    images: NonNegativeInt  # with boxes of the teacher
    boxes: NonNegativeInt
    sources: tuple[dict[str, JsonValue], ...]  # results that were joined
    options: dict[str, JsonValue]

    @cached_property
    def digest(self) -> str:
        """SHA-256 in canonical JSON: the identity of the boxes, in hex."""
        canonical = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()


@dataclass(frozen=True)
class TeacherSet:
    """A teacher's manifest and its folder."""

    uri: str
    manifest: TeacherManifest


def load_teacher_boxes(uri: str, shard_set: str) -> TeacherSet:
    """Open the boxes at `uri`.

    Args:
        shard_set: digest of the shard set that they must belong to.

    Raises:
        ManifestError: there are none, or they belong to another shard set.
    """
    folder = uri.rstrip("/")
    path = storage.join(folder, TEACHER_MANIFEST)
    try:
        manifest = TeacherManifest.model_validate_json(storage.read_bytes(path))
    except (FileNotFoundError, NotADirectoryError):
        raise ManifestError(f"{path}: there is none; `dfine prepare teacher ... --out {folder}` writes it") from None
    except PydanticError as error:
        raise ManifestError(f"{path}: {in_one_line(error)}; write it again with `dfine prepare teacher`") from None
    if manifest.shard_set != shard_set:
        raise ManifestError(
            f"{folder}: its boxes belong to the shard set {manifest.shard_set[:12]}, and the training set is {shard_set[:12]}:"
            " join them with this set by `dfine prepare teacher`"
        )
    sizes = storage.sizes(folder)
    if wrong := [file.file for file in manifest.files if sizes.get(file.file) != file.bytes]:
        raise ManifestError(f"{folder}: {wrong[0]} is missing or has another size; write it again")
    return TeacherSet(folder, manifest)


def with_teacher_columns(rows: pa.Table, teacher: pa.Table | None) -> pa.Table:
    """Rows of a shard with the columns of a teacher beside them; empty lists where there is no teacher."""
    for field in TEACHER_FIELDS:
        empty = pa.array([[]] * rows.num_rows, field.type)
        rows = rows.append_column(field, empty if teacher is None else teacher[field.name])
    return rows


def read_teacher_group(path: str, filesystem: fs.FileSystem, group: int, rows: pa.Table) -> pa.Table:
    """Read the teacher's row group that belongs to `rows` of a shard.

    Raises:
        ManifestError: it has other images.
    """
    with filesystem.open_input_file(path) as file:
        table = pq.ParquetFile(file).read_row_group(group, use_threads=False)
    if table["image_id"].to_pylist() != rows["image_id"].to_pylist():
        raise ManifestError(f"{path}: row group {group} has other images than its shard: write it again")
    return table
