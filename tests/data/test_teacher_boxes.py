"""Boxes of a teacher: COCO results joined with a shard set, read beside its rows, augmented as the true boxes."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jobs import prepare
from pipeline import storage
from pipeline.config import ConfigError
from pipeline.data.augment.samples import TRUTH, AnnotatedImage, augmented_sample, is_label
from pipeline.data.augment.settings import AugmentSettings
from pipeline.data.prepare.teacher_boxes import joined, prepare_teacher_boxes
from pipeline.data.prepare.work_plan import PrepareError
from pipeline.data.shards.manifest import ManifestError, ShardSet
from pipeline.data.shards.reader import locate_row_groups, read_training_rows
from pipeline.data.shards.records import ImageRecord, records_from_table
from pipeline.data.shards.teacher_boxes import load_teacher_boxes
from tests.support.synthetic_shards import synthetic_records, write_shards
from tests.support.teachers import results_of_truth


@pytest.fixture
def shards(tmp_path: Path) -> ShardSet:
    return write_shards(tmp_path / "train", synthetic_records(12, longest_side=64))


def write(folder: Path, results: Sequence[Any], name: str = "results.json") -> str:
    (folder / name).write_text(json.dumps(results))
    return str(folder / name)


def records(shards: ShardSet, boxes: str | None = None) -> list[ImageRecord]:
    from dataclasses import replace

    source = locate_row_groups(replace(shards, teacher_boxes=boxes))
    tables = read_training_rows(source, range(len(source.rows)))
    return [record for table in tables.values() for record in records_from_table(table)]


def box(x: float, label: int, score: float) -> list[float]:
    return [x, 0, x + 10, 10, label, score]


@pytest.mark.parametrize(
    ("labels", "kept"),
    [((0, 0), [[0, 0, 10, 10, 0, 0.9]]), ((0, 1), [[0, 0, 10, 10, 0, 0.9]])],
    ids=["one class", "two classes"],
)
def test_boxes_of_two_teachers_are_joined_to_as_many_as_one_has(
    labels: tuple[int, int], kept: list[list[float]]
) -> None:
    """IoU 90 / 110: of one class, the better one suppresses the other; of two, there is room for one of two."""
    first, second = np.array([box(0, labels[0], 0.9)], np.float32), np.array([box(1, labels[1], 0.8)], np.float32)
    np.testing.assert_allclose(joined([first, second], [0.5, 0.5]), kept, rtol=1e-6)
    # A bonus changes the rank, and not the score.
    np.testing.assert_allclose(joined([first, second], [0, 0.5])[0], second[0], rtol=1e-6)
    np.testing.assert_allclose(joined([second], [0]), second)


def test_results_are_read_beside_the_rows_of_their_images(tmp_path: Path, shards: ShardSet) -> None:
    results = results_of_truth(shards.uri)
    weak = [{**results[0], "score": 0.01}]
    manifest = prepare_teacher_boxes(shards, [write(tmp_path, results[::-1] + weak)], str(tmp_path / "boxes"))
    assert manifest.boxes == len(results) > 12
    for record in records(shards, str(tmp_path / "boxes")):
        learned = ~record.crowd
        assert record.teacher is not None
        order = np.lexsort(record.boxes[learned].T), np.lexsort(record.teacher.boxes.T)
        np.testing.assert_allclose(record.teacher.boxes[order[1]], record.boxes[learned][order[0]], atol=1e-4)
        assert sorted(record.teacher.labels) == sorted(record.labels[learned])
        np.testing.assert_allclose(record.teacher.scores, 0.8)
    assert all(record.teacher is None for record in records(shards))


def test_the_command_reads_the_folder_of_a_prediction_by_file_names_and_scales(
    tmp_path: Path, shards: ShardSet, capsys: pytest.CaptureFixture[str]
) -> None:
    """The prediction has other ids, and saw images of twice the size."""
    rows = {record.image_id: record for record in records(shards)}
    images = [
        {"id": 100 + i, "file_name": f"/found/{r.file_name}", "width": 2 * r.width, "height": 2 * r.height}
        for i, r in rows.items()
    ]
    results = [
        {**row, "image_id": 100 + row["image_id"], "bbox": [2 * side for side in row["bbox"]]}
        for row in results_of_truth(shards.uri)
    ]
    folder = tmp_path / "predicted"
    (folder / "detections").mkdir(parents=True)
    write(folder, {"images": images}, "images.json")  # type: ignore[arg-type]
    write(folder / "detections", results[::2], "000000.json")
    write(folder / "detections", results[1::2], "000001.json")
    out = str(tmp_path / "boxes")
    prepare.main(["teacher", shards.uri, "--results", str(folder), "--out", out, "--max-boxes", "1"])
    printed = capsys.readouterr().out
    assert f"{len(rows)} boxes of a teacher for {len(rows)} of {len(rows)} images" in printed
    assert f"teacher.boxes.folder={out}" in printed
    for record in records(shards, out):
        assert record.teacher is not None
        (found,) = record.teacher.boxes
        assert np.abs(record.boxes - found).max(axis=1).min() < 1e-3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"category_id": 99}, "category_id 99 is not a class of the shard set"),
        ({"score": 1.5}, "score 1.5"),
        ({"bbox": [1, 2, 3]}, "none of COCO's results"),
        ({"image_id": 10**6}, "none of 1 detections belongs to an image"),
    ],
)
def test_results_that_do_not_fit_are_refused(
    tmp_path: Path, shards: ShardSet, change: dict[str, Any], message: str
) -> None:
    results = [{**results_of_truth(shards.uri)[0], **change}]
    with pytest.raises(PrepareError, match=message):
        prepare_teacher_boxes(shards, [write(tmp_path, results)], str(tmp_path / "boxes"))


def test_boxes_belong_to_one_shard_set_and_are_written_once(tmp_path: Path, shards: ShardSet) -> None:
    out, results = str(tmp_path / "boxes"), write(tmp_path, results_of_truth(shards.uri))
    manifest = prepare_teacher_boxes(shards, [results], out)
    assert load_teacher_boxes(out, shards.manifest.digest).manifest.digest == manifest.digest
    with pytest.raises(ManifestError, match="belong to the shard set"):
        load_teacher_boxes(out, "another")
    with pytest.raises(PrepareError, match="holds boxes of a teacher already"):
        prepare_teacher_boxes(shards, [results], out)
    again = prepare_teacher_boxes(shards, [results], str(tmp_path / "again"))
    assert again.digest == manifest.digest
    (tmp_path / "boxes" / manifest.files[0].file).write_bytes(b"")
    with pytest.raises(ManifestError, match="is missing or has another size"):
        load_teacher_boxes(out, shards.manifest.digest)


def test_the_shards_themselves_and_other_files_of_a_user_are_not_replaced(tmp_path: Path, shards: ShardSet) -> None:
    results = write(tmp_path, results_of_truth(shards.uri))
    before = {path: path.read_bytes() for path in Path(shards.uri).iterdir()}
    with pytest.raises(ConfigError, match=r"holds other files .* nothing is written there"):
        prepare_teacher_boxes(shards, [results], shards.uri)
    assert {path: path.read_bytes() for path in Path(shards.uri).iterdir()} == before


def test_a_call_that_was_killed_is_repeated(tmp_path: Path, shards: ShardSet, monkeypatch: pytest.MonkeyPatch) -> None:
    out, results = str(tmp_path / "boxes"), write(tmp_path, results_of_truth(shards.uri))

    def killed(uri: str, data: bytes, **options: bool) -> None:
        if uri.endswith("teacher.json"):
            raise KeyboardInterrupt
        write_atomic(uri, data, **options)

    write_atomic = storage.write_atomic
    monkeypatch.setattr(storage, "write_atomic", killed)
    with pytest.raises(KeyboardInterrupt):
        prepare_teacher_boxes(shards, [results], out)
    monkeypatch.undo()
    with pytest.raises(ManifestError, match="there is none"):
        load_teacher_boxes(out, shards.manifest.digest)
    manifest = prepare_teacher_boxes(shards, [results], out)
    assert {path.name for path in Path(out).iterdir()} == {"teacher.json", *(file.file for file in manifest.files)}


def test_a_box_of_a_teacher_goes_where_a_true_box_goes_and_is_dropped_where_it_is() -> None:
    """The teacher's boxes are the true ones and another; whatever is drawn depends on the true ones alone."""
    dropped = 0
    for seed in range(60):
        (record,) = synthetic_records(1, longest_side=64, seed=seed % 5)
        boxes, labels = record.boxes, record.labels
        other = np.array([[1, 1, 30, 20]], np.float32)
        scores = np.concatenate([np.full(len(labels), TRUTH), np.full(len(labels) + 1, 0.5)]).astype(np.float32)
        taught = AnnotatedImage(
            *(record.image, record.width, record.height, np.concatenate([boxes, boxes, other])),
            np.concatenate([labels, labels, [99]]),
            np.zeros(2 * len(labels) + 1, np.float32),
            scores,
        )
        keyed: dict[str, Any] = {
            "seed": seed,
            "epoch": 0,
            "image_id": 3,
            "settings": AugmentSettings(),
            "canvas": (48, 64),
        }
        areas = np.zeros(len(labels), np.float32)
        alone = AnnotatedImage(record.image, record.width, record.height, boxes, labels, areas)
        plain = augmented_sample(alone, **keyed)
        sample = augmented_sample(taught, **keyed)
        assert np.array_equal(sample.image, plain.image)
        assert np.array_equal(sample.boxes[is_label(sample.marks)], plain.boxes)
        found = ~is_label(sample.marks) & (sample.labels != 99)
        assert np.array_equal(sample.boxes[found], plain.boxes)
        assert np.array_equal(sample.labels[found], plain.labels)
        dropped += len(labels) - len(plain.labels)
    assert dropped > 10
