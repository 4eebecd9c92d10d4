"""The manifest: what a shard set holds, and all that the rest of the project knows about its data.

A folder holds one split: its shards and their `manifest.json`. The digest of the manifest names the data set: the
shards are in it by their SHA-256, so two folders with one digest hold the same images, boxes and order.
"""

import hashlib
import json
import os
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
    """A manifest that is missing, unreadable or at odds with itself."""


def _plain_file_name(name: str) -> str:
    if not name or name in (".", "..") or any(sign in name for sign in "/\\\0"):
        raise ValueError(f"{name!r} is not a plain file name; shards lie beside their manifest")
    return name


class Data(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Category(Data):
    label: NonNegativeInt  # 0..K-1, what the model learns
    original_id: int  # id in the source, what a COCO result file wants
    name: str


class Shard(Data):
    file: Annotated[str, AfterValidator(_plain_file_name)]  # relative to the manifest
    rows: PositiveInt
    bytes: PositiveInt
    sha256: str
    row_groups: tuple[PositiveInt, ...]  # rows of each

    @model_validator(mode="after")
    def _row_groups_make_up_the_rows(self) -> Self:
        if sum(self.row_groups) != self.rows:
            raise ValueError(f"{self.file}: row_groups add up to {sum(self.row_groups)}, rows is {self.rows}")
        return self


class BoxesPerImage(Data):
    mean: float
    max: NonNegativeInt
    histogram: tuple[NonNegativeInt, ...]  # [n] = images with n boxes


class BoxSizes(Data):
    """Boxes by their annotated area, divided as COCO divides them: at 32^2 and 96^2 px^2."""

    small: NonNegativeInt
    medium: NonNegativeInt
    large: NonNegativeInt


class PixelRange(Data):
    min: PositiveInt
    max: PositiveInt


class CrowdedImage(Data):
    image_id: int
    file_name: str
    boxes: NonNegativeInt


class Statistics(Data):
    """Counts over the boxes to learn from; crowd regions are counted in `crowd_boxes` alone."""

    boxes_per_image: BoxesPerImage
    box_sizes: BoxSizes
    class_counts: tuple[NonNegativeInt, ...]  # [K], by label
    images_without_boxes: NonNegativeInt
    crowd_boxes: NonNegativeInt
    width: PixelRange
    height: PixelRange
    most_crowded: CrowdedImage


class Manifest(Data):
    format_version: Literal[1] = FORMAT_VERSION
    split: str
    categories: tuple[Category, ...]
    shards: tuple[Shard, ...]
    images: NonNegativeInt
    boxes: NonNegativeInt  # crowd regions included
    rejected: NonNegativeInt  # rows of rejected.parquet: images and boxes that were left out, with the reason
    statistics: Statistics
    source: dict[str, JsonValue]
    options: dict[str, JsonValue]

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

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the manifest in canonical JSON: the identity of the data set, in hex."""
        canonical = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()


@dataclass(frozen=True)
class ShardSet:
    """A manifest and the folder that it lies in."""

    uri: str
    manifest: Manifest

    def shard_uri(self, index: int) -> str:
        return storage.join(self.uri, self.manifest.shards[index].file)


def load_shards(uri: str | os.PathLike[str]) -> ShardSet:
    """The shard set at `uri`, the manifest itself or its folder.

    Raises:
        ManifestError: there is no manifest, or it is not one that this version can read.
    """
    parent, _, name = os.fspath(uri).rstrip("/").rpartition("/")
    folder = (parent or ".") if name == MANIFEST_NAME else os.fspath(uri).rstrip("/")
    path = storage.join(folder, MANIFEST_NAME)
    try:
        written = storage.read_bytes(path)
    except (FileNotFoundError, NotADirectoryError):
        raise ManifestError(f"{path}: there is none; `python -m jobs.prepare ... --out {folder}` writes it") from None
    try:
        content = json.loads(written)
    except ValueError as error:  # neither UTF-8 nor JSON
        raise ManifestError(f"{path}: not JSON ({error}); write it again with `python -m jobs.prepare`") from None
    version = content.get("format_version") if isinstance(content, dict) else None
    if version != FORMAT_VERSION:
        raise ManifestError(
            f"{path}: format_version is {version!r}, this version reads {FORMAT_VERSION}; prepare the data again"
        )
    try:
        return ShardSet(uri=folder, manifest=Manifest.model_validate(content))
    except PydanticError as error:
        raise ManifestError(f"{path}: {in_one_line(error)}") from None
