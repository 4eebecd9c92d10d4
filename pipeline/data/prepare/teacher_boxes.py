"""Join detections of any detector with a shard set, as boxes of a teacher: one small file for each shard.

Detections come as COCO results, or as the folder that `dfine predict` wrote. They are found by image id; where the ids are
others, a description of the images (`images.json` of that folder, or an instances file) leads to their file names.
"""

import hashlib
import posixpath
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline import storage
from pipeline.data.prepare.shard_writer import HashingFile
from pipeline.data.prepare.work_plan import PrepareError
from pipeline.data.shards.classes import listed
from pipeline.data.shards.manifest import Category, Shard, ShardSet
from pipeline.data.shards.reader import locate_row_groups, read_row_groups
from pipeline.data.shards.teacher_boxes import TEACHER_MANIFEST, TEACHER_SCHEMA, TeacherManifest
from pipeline.data.sources.index import SourceError
from pipeline.data.sources.json_arrays import array_items
from pipeline.output_folder import refuse_foreign_folder

IMAGES_FILE, DETECTIONS_FILE, DETECTIONS_FOLDER = "images.json", "detections.json", "detections"  # of `dfine predict`
UNFINISHED = "teacher.unfinished"  # the first file of the folder, until all others are written
COLUMNS = ("image_id", "file_name", "width", "height")
NMS_IOU = 0.2  # between boxes of one class, where several teachers are joined
MAX_BOXES, MIN_SCORE = 50, 0.05

Boxes = NDArray[np.float32]  # [T, 6]: xyxy in pixels, label, score
Join = Callable[[dict[str, Any]], Boxes]  # boxes of the image in a row of a shard


@dataclass(frozen=True)
class Results:
    """Detections of one teacher, sorted by image."""

    uri: str
    sha256: str
    image_ids: NDArray[np.int64]  # [D]
    boxes: Boxes  # [D, 6], in pixels of the images that the teacher saw
    read: int  # detections in its files, weak ones included
    described: dict[str, tuple[int, int, int]] | None  # by file name: id, width, height; None: not known

    def knows(self, image_id: int, file_name: str) -> bool:
        """Whether the teacher has seen an image; without a description, only an image with detections is known."""
        if self.described is not None:
            return file_name in self.described or posixpath.basename(file_name) in self.described
        return bool(np.searchsorted(self.image_ids, image_id + 1) - np.searchsorted(self.image_ids, image_id))

    def of(self, image_id: int, file_name: str, width: int, height: int) -> Boxes:
        """Boxes of an image, in pixels of its `width` and `height`."""
        scale = np.ones(2, np.float32)
        if self.described is not None:
            known = self.described.get(file_name) or self.described.get(posixpath.basename(file_name))
            if known is None:
                return np.zeros((0, 6), np.float32)
            image_id = known[0]
            scale = np.array([width / known[1], height / known[2]], np.float32)
        first, last = np.searchsorted(self.image_ids, [image_id, image_id + 1])
        found = self.boxes[first:last].copy()
        found[:, :4] *= np.tile(scale, 2)
        return found


def prepare_teacher_boxes(
    shards: ShardSet,
    results: Sequence[str],
    out: str,
    *,
    images: str | None = None,
    min_score: float = MIN_SCORE,
    max_boxes: int = MAX_BOXES,
    bonus: Sequence[float] = (),
) -> TeacherManifest:
    """Write the boxes of one or several teachers for a shard set to the folder `out`; a killed call may be repeated.

    Args:
        results: COCO results, or folders of `dfine predict`; one for each teacher.
        images: file with the "images" that the ids of plain results belong to, if they are not the ids of the shards.
        min_score: boxes with a lower score are left out.
        max_boxes: number kept per image and teacher, the best first.
        bonus: added to the scores of each teacher where they are ranked against those of others.

    Raises:
        PrepareError: results do not fit the shard set, or the folder holds boxes already.
        ConfigError: the folder holds other files.
    """
    if storage.exists(storage.join(out, TEACHER_MANIFEST)):
        raise PrepareError(f"{out} holds boxes of a teacher already: choose another --out, or delete the folder")
    refuse_foreign_folder(out, UNFINISHED, "boxes of a teacher")
    bonus = bonus or [0.0] * len(results)
    if len(bonus) != len(results):
        raise PrepareError(f"--bonus has {len(bonus)} values for {len(results)} --results: give one for each")
    teachers = []
    for uri in results:
        file = images_file(uri, images)
        labels = labels_by_id(shards.categories, described_categories(file), file)
        teachers.append(read_results(uri, labels, file, min_score))
    shrunk = shards.manifest.options.get("longest_side")
    if shrunk and any(teacher.described is None for teacher in teachers):
        raise PrepareError(
            f"{shards.uri} was prepared with --longest-side {shrunk}, so boxes must be scaled: name the sizes that the"
            " teacher saw with --images FILE (instances, or images.json of `dfine predict`)"
        )

    def join(row: dict[str, Any]) -> Boxes:
        of_teachers = [
            _best(within(teacher.of(*(row[name] for name in COLUMNS)), row["width"], row["height"]), max_boxes)
            for teacher in teachers
        ]
        return joined(of_teachers, bonus)

    storage.write_atomic(storage.join(out, UNFINISHED), b"")
    files: list[Shard] = []
    taught = boxes = 0
    for index, shard in enumerate(shards.manifest.shards):
        written, counts = _write_file(storage.join(out, shard.file), shards, index, join)
        files.append(written)
        taught, boxes = taught + int((counts > 0).sum()), boxes + int(counts.sum())
    if not boxes:
        raise PrepareError(
            f"none of {sum(len(t.image_ids) for t in teachers):,} detections belongs to an image of {shards.uri}: their"
            " image ids must be those of the shards, or --images must lead to the same file names"
        )
    manifest = TeacherManifest(
        shard_set=shards.manifest.digest,
        files=tuple(files),
        images=taught,
        boxes=boxes,
        sources=tuple(
            {"results": posixpath.basename(t.uri.rstrip("/")), "sha256": t.sha256, "detections": t.read}
            for t in teachers
        ),
        options={"min_score": min_score, "max_boxes": max_boxes, "bonus": list(bonus)},
    )
    storage.write_atomic(storage.join(out, TEACHER_MANIFEST), manifest.model_dump_json(indent=1).encode())
    storage.remove_file(storage.join(out, UNFINISHED))
    return manifest


def images_file(results: str, images: str | None) -> str | None:
    """File that describes the images of results: the given one, or that of a folder of `dfine predict`."""
    if images is None and result_files(results) != [results]:
        return storage.join(results, IMAGES_FILE)
    return images


def described_categories(images: str | None) -> list[dict[str, Any]]:
    """Categories in a file that describes images; none if it has only images."""
    found: list[Any] = []
    with suppress(SourceError):
        found = [] if images is None else list(array_items(images, "categories"))
    return [item for item in found if isinstance(item, dict)]


def labels_by_id(
    categories: Sequence[Category], described: Sequence[Mapping[str, Any]], images: str | None
) -> dict[int, int]:
    """Label of each category id of results: by name where `described` has names, else by the ids of the set's classes.

    Raises:
        PrepareError: there are names, and none of them is a class of the set.
    """
    by_name = {category.name: category.label for category in categories}
    names = {
        item["id"]: item["name"]
        for item in described
        if isinstance(item.get("id"), int) and isinstance(item.get("name"), str)
    }
    named = {number: by_name[name] for number, name in names.items() if name in by_name}
    if names and not named:
        raise PrepareError(
            f"{images}: none of its classes ({listed(list(names.values()))}) is one of the set ({listed(list(by_name))}): use a"
            " teacher of the same classes, or rename them in this file"
        )
    return named or {category.original_id: category.label for category in categories}


def read_results(uri: str, labels: dict[int, int], images: str | None, min_score: float) -> Results:
    """Read the detections of one teacher.

    Args:
        labels: label of each category id.
        images: file that describes the images, see `images_file`.

    Raises:
        PrepareError: a detection is damaged, or of a category that the shard set does not have.
    """
    files = result_files(uri)
    image_ids: list[int] = []
    rows: list[tuple[float, ...]] = []
    read = 0
    sha256 = hashlib.sha256()
    for file in files:
        sha256.update(storage.sha256(file).encode())
        for item in array_items(file, ""):
            try:
                left, top, width, height = (float(side) for side in item["bbox"])
                score, image_id, category = float(item["score"]), int(item["image_id"]), int(item["category_id"])
            except (KeyError, TypeError, ValueError) as error:
                raise PrepareError(f"{file}: detection {read} is none of COCO's results: {error!r}") from None
            if category not in labels:
                raise PrepareError(
                    f"{file}: category_id {category} is not a class of the shard set, whose ids are"
                    f" {', '.join(map(str, sorted(labels)[:10]))}: use a teacher of the same classes"
                )
            if not 0 <= score <= 1:
                raise PrepareError(f"{file}: score {score:g} of image {image_id} does not lie in 0..1")
            read += 1
            if score >= min_score:
                image_ids.append(image_id)
                rows.append((left, top, left + width, top + height, labels[category], score))
    ids = np.array(image_ids, np.int64)
    order = np.argsort(ids, kind="stable")
    boxes = np.array(rows, np.float32).reshape(-1, 6)
    described = None if images is None else _described(images)
    return Results(uri, sha256.hexdigest(), ids[order], boxes[order], read, described)


def joined(teachers: Sequence[Boxes], bonus: Sequence[float]) -> Boxes:
    """Join the boxes of one image: boxes of several teachers are suppressed class by class, and their mean number is kept.

    They are ranked by score and bonus; the score that is kept is their own.

    Source: Teach-DETR, arXiv:2211.11953.
    """
    if len(teachers) == 1:
        return teachers[0]
    boxes = np.concatenate(teachers)
    rank = boxes[:, 5] + np.repeat(np.array(bonus, np.float32), [len(own) for own in teachers])
    order = np.argsort(-rank, kind="stable")
    kept: list[int] = []
    for index in order:
        rivals = [other for other in kept if boxes[other, 4] == boxes[index, 4]]
        if not rivals or box_iou(boxes[index], boxes[rivals]).max() <= NMS_IOU:
            kept.append(int(index))
    return boxes[kept[: len(boxes) // len(teachers)]]


def box_iou(box: NDArray[np.float32], others: Boxes) -> NDArray[np.float32]:
    """IoU of a box with others, [n]."""
    size = np.minimum(box[2:4], others[:, 2:4]) - np.maximum(box[:2], others[:, :2])
    shared = size.clip(min=0).prod(axis=1)
    areas = (others[:, 2:4] - others[:, :2]).prod(axis=1)
    iou: NDArray[np.float32] = shared / ((box[2:4] - box[:2]).prod() + areas - shared)
    return iou


def within(boxes: Boxes, width: int, height: int) -> Boxes:
    """Clip to the image, and drop what has no area."""
    boxes[:, [0, 2]] = boxes[:, [0, 2]].clip(0, width)
    boxes[:, [1, 3]] = boxes[:, [1, 3]].clip(0, height)
    return boxes[(boxes[:, 2:4] > boxes[:, :2]).all(axis=1)]


def _best(boxes: Boxes, count: int) -> Boxes:
    return boxes[np.argsort(-boxes[:, 5], kind="stable")[:count]]


def result_files(uri: str) -> list[str]:
    """Files of one teacher: the file itself, or those in a folder of `dfine predict`."""
    if storage.exists(single := storage.join(uri, DETECTIONS_FILE)):
        return [single]
    folder = storage.join(uri, DETECTIONS_FOLDER)
    if storage.exists(folder):
        return [storage.join(folder, name) for name in sorted(storage.sizes(folder)) if name.endswith(".json")]
    return [uri]


def _described(uri: str) -> dict[str, tuple[int, int, int]]:
    """Id, width and height of every image, by its file name and, where it is the only one, by the last part of it."""
    described: dict[str, tuple[int, int, int]] = {}
    by_last_part: dict[str, list[tuple[int, int, int]]] = {}
    for item in array_items(uri, "images"):
        try:
            entry = int(item["id"]), int(item["width"]), int(item["height"])
            name = str(item["file_name"])
        except (KeyError, TypeError, ValueError) as error:
            raise PrepareError(f"{uri}: image {len(described)} lacks a value: {error!r}") from None
        if min(entry[1:]) < 1:
            raise PrepareError(f"{uri}: {name} has the size {entry[1]} x {entry[2]}, which boxes cannot be scaled from")
        described[name] = entry
        by_last_part.setdefault(posixpath.basename(name), []).append(entry)
    unique = {name: entries[0] for name, entries in by_last_part.items() if len(entries) == 1}
    return unique | described


def _write_file(uri: str, shards: ShardSet, index: int, join: Join) -> tuple[Shard, NDArray[np.int64]]:
    """Write the boxes of one shard; return the file, and the number of boxes of each image."""
    source = locate_row_groups(shards)
    groups = np.flatnonzero(source.shard == index)
    counts: list[int] = []
    with storage.open_atomic(uri) as file:
        hashing = HashingFile(file)
        with pq.ParquetWriter(hashing, TEACHER_SCHEMA) as writer:
            for table in read_row_groups(source, groups.tolist(), COLUMNS).values():
                rows = list(_rows(table, join))
                counts += [len(row["teacher_scores"]) for row in rows]
                writer.write_table(pa.Table.from_pylist(rows, schema=TEACHER_SCHEMA), row_group_size=len(rows))
    shard = shards.manifest.shards[index]
    written = shard.model_copy(update={"bytes": hashing.bytes, "sha256": hashing.sha256.hexdigest()})
    return written, np.array(counts, np.int64)


def _rows(table: pa.Table, join: Join) -> Iterator[dict[str, Any]]:
    for row in table.to_pylist():
        boxes = join(row)
        yield {
            "image_id": row["image_id"],
            "teacher_boxes": boxes[:, :4].ravel(),
            "teacher_labels": boxes[:, 4].astype(np.int32),
            "teacher_scores": boxes[:, 5],
        }
