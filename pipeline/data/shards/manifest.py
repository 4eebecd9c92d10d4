"""The manifest: contents of a shard set, and all that the rest of the project knows about its data.

A folder holds one split: its shards and their `manifest.json`. The digest of the manifest identifies the data set: it covers
the SHA-256 of every shard, so two folders with equal digests hold the same images, boxes and order.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Final, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, JsonValue, NonNegativeInt, PositiveInt, model_validator
from pydantic import ValidationError as PydanticError

from pipeline import storage
from pipeline.errors import UserError, in_one_line

MANIFEST_NAME = "manifest.json"
FORMAT_VERSION: Final = 1


class ManifestError(UserError, ValueError):
    """A manifest that is missing, unreadable or inconsistent."""


def _plain_file_name(name: str) -> str:
    if not name or name in (".", "..") or any(sign in name for sign in "/\\\0"):
        raise ValueError(f"{name!r} is not a plain file name; shards are in the folder of their manifest")
    return name


class FrozenModel(BaseModel):
    """A validated, immutable record that is stored as JSON."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Category(FrozenModel):
    """A class of the data set."""

    label: NonNegativeInt  # 0..K-1, what the model learns
    original_id: int  # id in the source, used in COCO result files
    name: str


class Shard(FrozenModel):
    """A Parquet file of the set."""

    file: Annotated[str, AfterValidator(_plain_file_name)]  # relative to the manifest
    rows: PositiveInt
    bytes: PositiveInt
    sha256: str
    row_groups: tuple[PositiveInt, ...]  # rows per group

    @model_validator(mode="after")
    def _row_groups_make_up_the_rows(self) -> Self:
        if sum(self.row_groups) != self.rows:
            raise ValueError(f"{self.file}: row_groups add up to {sum(self.row_groups)}, rows is {self.rows}")
        return self


class BoxesPerImage(FrozenModel):
    """Distribution of the number of boxes per image."""

    mean: float
    max: NonNegativeInt
    histogram: tuple[NonNegativeInt, ...]  # [n] = images with n boxes


class BoxSizes(FrozenModel):
    """Number of boxes by annotated area, with COCO's limits: 32^2 and 96^2 px^2."""

    small: NonNegativeInt
    medium: NonNegativeInt
    large: NonNegativeInt


class PixelRange(FrozenModel):
    """Smallest and largest side."""

    min: PositiveInt
    max: PositiveInt


class CrowdedImage(FrozenModel):
    """The image with the most boxes."""

    image_id: int
    file_name: str
    boxes: NonNegativeInt


class Statistics(FrozenModel):
    """Counts over the boxes to learn from; crowd regions are counted in `crowd_boxes` alone."""

    boxes_per_image: BoxesPerImage
    box_sizes: BoxSizes
    class_counts: tuple[NonNegativeInt, ...]  # [K], by label
    images_without_boxes: NonNegativeInt
    crowd_boxes: NonNegativeInt
    width: PixelRange
    height: PixelRange
    most_crowded: CrowdedImage


class Notice(FrozenModel):
    """Something that `prepare` met in the source and a person should know, by its kind among the doctor's findings."""

    code: str
    count: PositiveInt
    example: str


class Manifest(FrozenModel):
    """Contents of a shard set; validated for consistency when it is read."""

    format_version: Literal[1] = FORMAT_VERSION
    split: str
    categories: tuple[Category, ...]
    shards: tuple[Shard, ...]
    images: NonNegativeInt
    boxes: NonNegativeInt  # crowd regions included
    rejected: NonNegativeInt  # rows of rejected.parquet: images and boxes that were left out, each with its reason
    statistics: Statistics
    source: dict[str, JsonValue]
    options: dict[str, JsonValue]
    notices: tuple[Notice, ...] = ()  # remarks on the source; no part of the identity

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> Self:
        labels = [category.label for category in self.categories]
        if labels != list(range(len(labels))):
            raise ValueError(f"categories: labels are {labels}, expected 0..{len(labels) - 1} in ascending order")
        rows = sum(shard.rows for shard in self.shards)
        if rows != self.images:
            raise ValueError(f"images is {self.images}, the shards hold {rows}")
        if len({shard.file for shard in self.shards}) != len(self.shards):
            raise ValueError("shards: two of them have the same file")
        if len(self.statistics.class_counts) != len(labels):
            raise ValueError(
                f"statistics.class_counts has {len(self.statistics.class_counts)} entries for {len(labels)} categories"
            )
        return self

    @property
    def weighted(self) -> bool:
        """Whether labels are of unequal worth, see `records.WEIGHTS_FIELD`."""
        return any(self.options.get(option) for option in ("weights", "tiles"))

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the manifest without its notices, in canonical JSON: the identity of the data set, in hex."""
        content = self.model_dump(mode="json", exclude={"notices"})
        canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()


def merge_notices(notices: Iterable[Notice]) -> tuple[Notice, ...]:
    """Add up the notices of each kind, in the order of their first ones."""
    merged: dict[str, Notice] = {}
    for notice in notices:
        known = merged.get(notice.code)
        merged[notice.code] = known.model_copy(update={"count": known.count + notice.count}) if known else notice
    return tuple(merged.values())


@dataclass(frozen=True)
class ShardSet:
    """A manifest and its folder; `classes.with_classes_of` maps its labels to other categories."""

    uri: str
    manifest: Manifest
    mapped_categories: tuple[Category, ...] | None = None  # None: those of the manifest
    mapped_labels: tuple[int, ...] | None = None  # by label in the files
    teacher_boxes: str | None = None  # folder or URI of a teacher's boxes that are read along

    @property
    def categories(self) -> tuple[Category, ...]:
        """Categories of the labels as they are read."""
        return self.manifest.categories if self.mapped_categories is None else self.mapped_categories

    def shard_uri(self, index: int) -> str:
        """URI of shard `index`."""
        return storage.join(self.uri, self.manifest.shards[index].file)


def load_shards(uri: str | os.PathLike[str]) -> ShardSet:
    """Open the shard set at `uri`, a folder or the manifest in it.

    Raises:
        ManifestError: the manifest is missing, or this version cannot read it.
    """
    parent, _, name = os.fspath(uri).rstrip("/").rpartition("/")
    folder = (parent or ".") if name == MANIFEST_NAME else os.fspath(uri).rstrip("/")
    path = storage.join(folder, MANIFEST_NAME)
    try:
        data = storage.read_bytes(path)
    except (FileNotFoundError, NotADirectoryError):
        raise ManifestError(f"{path}: there is none; `dfine prepare ... --out {folder}` writes it") from None
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:  # neither UTF-8 nor JSON, or nested too deeply
        raise ManifestError(f"{path}: not JSON ({error}); write it again with `dfine prepare`") from None
    version = content.get("format_version") if isinstance(content, dict) else None
    if version != FORMAT_VERSION:
        raise ManifestError(
            f"{path}: format_version is {version!r}, this version reads {FORMAT_VERSION}; prepare the data again"
        )
    try:
        return ShardSet(uri=folder, manifest=Manifest.model_validate(content))
    except PydanticError as error:
        raise ManifestError(f"{path}: {in_one_line(error)}") from None
