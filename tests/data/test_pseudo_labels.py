"""Labels from a teacher: what becomes a label, what is ignored, and which images stay as they are."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jobs.prepare import main as prepare_main
from pipeline.data.prepare.prepare import prepare
from pipeline.data.prepare.pseudo_labels import PseudoLabels, divided, with_pseudo_labels
from pipeline.data.prepare.shard_writer import PrepareOptions
from pipeline.data.prepare.work_plan import PrepareError
from pipeline.data.shards.manifest import ShardSet, load_shards
from pipeline.data.shards.reader import locate_row_groups, read_training_rows
from pipeline.data.shards.records import ImageRecord, records_from_table
from pipeline.data.sources.synthetic import synthetic_image
from pipeline.data.sources.yolo import yolo_source
from pipeline.evaluation.ground_truth import read_ground_truth
from pipeline.ray_cluster import start_ray

WIDTH, HEIGHT = (lambda r: (r.width, r.height))(synthetic_image(0, longest_side=100))


@pytest.fixture(scope="module", autouse=True)
def cluster() -> None:
    start_ray(num_cpus=2)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four images, of which the first is labelled."""
    out = tmp_path / "in"
    (out / "train").mkdir(parents=True)
    (out / "annotations").mkdir()
    for number in range(4):
        (out / "train" / f"{number}.jpg").write_bytes(synthetic_image(0, longest_side=100).image)
    images = [{"id": 10 + n, "file_name": f"{n}.jpg", "width": WIDTH, "height": HEIGHT} for n in range(4)]
    boxes = [{"id": 1, "image_id": 10, "category_id": 7, "bbox": [1, 2, 30, 20], "area": 600, "iscrowd": 0}]
    categories = [{"id": 7, "name": "a"}, {"id": 9, "name": "b"}]
    content = {"images": images, "annotations": boxes, "categories": categories}
    (out / "annotations" / "instances_train.json").write_text(json.dumps(content))
    return out


def found(image: int, category: int, box: list[float], score: float) -> dict[str, Any]:
    return {"image_id": image, "category_id": category, "bbox": box, "score": score}


RESULTS = [
    found(10, 7, [50, 2, 10, 10], 0.9),  # in the labelled image
    found(11, 7, [1, 2, 30, 20], 0.9),
    found(11, 7, [2, 2, 30, 20], 0.7),  # the same label
    found(11, 9, [1, 2, 30, 20], 0.65),  # another class
    found(11, 7, [1, 4, 30, 20], 0.4),  # the object once more
    found(11, 9, [50, 5, 20, 20], 0.5),
    found(11, 9, [70, 5, 20, 20], 0.29),
    found(12, 9, [-5, -5, 20, 20], 0.6),
]


def rows_of(shards: ShardSet) -> dict[int, ImageRecord]:
    source = locate_row_groups(shards)
    tables = read_training_rows(source, range(len(source.rows))).values()
    return {record.image_id: record for table in tables for record in records_from_table(table)}


def columns(record: ImageRecord) -> list[tuple[Any, ...]]:
    weights = np.ones(len(record.labels)) if record.weights is None else record.weights.round(3)
    lists = [record.labels.tolist(), record.crowd.tolist(), weights.round(3).tolist(), record.boxes.tolist()]
    return list(zip(*lists, strict=True))


def command(folder: Path, results: Path, *options: str) -> ShardSet:
    out = folder.parent / "out"
    given = ["coco", str(folder), "--split", "train", "--out", str(out), "--pseudo", str(results)]
    prepare_main([*given, *options])
    return load_shards(out)


def test_scores_become_weights_the_band_is_ignored_and_labelled_images_stay(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "results.json").write_text(json.dumps(RESULTS))
    shards = command(folder, folder / "results.json", "--score", "0.6", "--ignore", "0.3")
    rows = rows_of(shards)
    assert columns(rows[10]) == [(0, False, 1.0, [1, 2, 31, 22])]
    assert columns(rows[11]) == [
        (0, False, pytest.approx(0.9), [1, 2, 31, 22]),
        (1, False, pytest.approx(0.65), [1, 2, 31, 22]),
        (1, True, 0.0, [50, 5, 70, 25]),
    ]
    assert columns(rows[12]) == [(1, False, pytest.approx(0.6), [0, 0, 15, 15])]
    assert columns(rows[13]) == []
    assert shards.manifest.weighted
    assert shards.manifest.statistics.class_counts == (2, 2)
    assert read_ground_truth(shards).ignored.sum() == 1  # as a crowd region
    printed = capsys.readouterr().out
    assert "note: 3 boxes, such as 1.jpg: A detection became a label" in printed
    assert "note: 1 image, such as 3.jpg: An image without boxes was not among the teacher's images" in printed


def test_the_folder_of_a_prediction_is_joined_by_file_and_class_names(folder: Path) -> None:
    predicted = folder.parent / "found"
    predicted.mkdir()
    images = [
        {"id": n + 1, "file_name": f"/elsewhere/{n + 1}.jpg", "width": 2 * WIDTH, "height": HEIGHT} for n in range(3)
    ]
    classes = [{"id": 0, "name": "b", "threshold": 0.3}]
    (predicted / "images.json").write_text(json.dumps({"images": images, "categories": classes, "annotations": []}))
    (predicted / "detections.json").write_text(json.dumps([found(2, 0, [40, 5, 40, 20], 0.8)]))
    shards = command(folder, predicted)
    rows = rows_of(shards)
    assert columns(rows[12]) == [(1, False, pytest.approx(0.8), [20, 5, 40, 25])]
    assert columns(rows[11]) == columns(rows[13]) == []  # seen, and nothing was found
    assert not any(notice.code == "pseudo-unseen" for notice in shards.manifest.notices)


def test_classes_of_other_names_are_not_taken_by_their_ids(folder: Path) -> None:
    predicted = folder.parent / "found"
    predicted.mkdir()
    images = [{"id": 2, "file_name": "2.jpg", "width": WIDTH, "height": HEIGHT}]
    described = {"images": images, "categories": [{"id": 7, "name": "A"}, {"id": 9, "name": ["b"]}, 3]}
    (predicted / "images.json").write_text(json.dumps(described))
    (predicted / "detections.json").write_text(json.dumps([found(2, 7, [10, 5, 20, 20], 0.8)]))
    with pytest.raises(SystemExit, match=r"none of its classes \(A\) is one of the set \(a, b\)"):
        command(folder, predicted)


def test_fractions_of_sources_without_sizes_are_scaled(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for name in ("0.jpg", "1.jpg"):
        (tmp_path / "images" / name).write_bytes(synthetic_image(0, longest_side=100).image)
    (tmp_path / "images" / "0.txt").write_text("0 0.5 0.5 0.5 0.5\n")
    (tmp_path / "data.yaml").write_text(f"path: {tmp_path}\ntrain: images\nnames: [a]\n")
    images = {"images": [{"id": 5, "file_name": "1.jpg", "width": 2 * WIDTH, "height": 2 * HEIGHT}]}
    (tmp_path / "images.json").write_text(json.dumps(images))
    (tmp_path / "results.json").write_text(json.dumps([found(5, 0, [20, 10, 40, 20], 0.8)]))
    source = yolo_source(tmp_path / "data.yaml", "train")
    rule = PseudoLabels(str(tmp_path / "results.json"), str(tmp_path / "images.json"), 0.6, 0.3)
    shards = prepare(
        with_pseudo_labels(source, rule), str(tmp_path / "out"), split="train", options=PrepareOptions(weights=True)
    )
    row = next(row for row in rows_of(shards).values() if row.file_name.endswith("1.jpg"))
    assert row.boxes.tolist() == [pytest.approx([10, 5, 30, 15], abs=1e-3)]
    (tmp_path / "results.json").write_text(json.dumps([found(2, 0, [20, 10, 40, 20], 0.8)]))  # its id here
    with pytest.raises(PrepareError, match=r"no sizes of images.*--pseudo-images"):
        prepare(
            with_pseudo_labels(source, PseudoLabels(str(tmp_path / "results.json"), None, 0.6, 0.3)),
            str(tmp_path / "other"), split="train", options=PrepareOptions(weights=True),
        )  # fmt: skip


def test_other_results_or_scores_are_another_set(folder: Path) -> None:
    results = folder / "results.json"
    results.write_text(json.dumps(RESULTS))
    before = command(folder, results).manifest.digest
    assert command(folder, results).manifest.digest == before
    with pytest.raises(SystemExit, match="holds a different shard set: pseudo"):
        command(folder, results, "--score", "0.7")
    results.write_text(json.dumps(RESULTS[1:]))
    with pytest.raises(SystemExit, match="holds a different shard set: pseudo"):
        command(folder, results)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--score", "0.2"], None),
        (["--score", "0.5", "--ignore", "0.6"], "--ignore 0.6 --score 0.5: both lie between 0 and 1"),
        (["--ignore", "0"], "both lie between 0 and 1"),
        (["--split-off", "val=0.5"], "--pseudo with --split-off"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: list[str], message: str | None, folder: Path) -> None:
    (folder / "results.json").write_text(json.dumps(RESULTS))
    if message is None:  # the default of --ignore follows a low score
        assert command(folder, folder / "results.json", *options).manifest.boxes == 6
        return
    with pytest.raises(SystemExit, match=message):
        command(folder, folder / "results.json", *options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"category_id": 8}, "category_id 8 is not a class"),
        ({"score": 1.5}, r"score 1\.5 of image 11"),
        ({"bbox": [1, 2]}, "is none of COCO's results"),
    ],
)
def test_damaged_results_are_named(change: dict[str, Any], message: str, folder: Path) -> None:
    (folder / "results.json").write_text(json.dumps([found(11, 7, [1, 2, 3, 4], 0.9) | change]))
    with pytest.raises(SystemExit, match=message):
        command(folder, folder / "results.json")


def test_a_missing_file_and_options_alone_are_named(folder: Path) -> None:
    with pytest.raises(SystemExit, match="there is no such file"):
        command(folder, folder / "nothing.json")
    with pytest.raises(SystemExit, match="--score, --ignore: there are no labels of a teacher without --pseudo"):
        prepare_main([*("coco", str(folder), "--split", "train"), "--out", "x", "--score", "0.5", "--ignore", "0.2"])


def test_a_prediction_that_left_out_the_band_is_refused(folder: Path) -> None:
    predicted = folder.parent / "found"
    predicted.mkdir()
    classes = [{"id": 7, "name": "a", "threshold": 0.45}]
    (predicted / "images.json").write_text(json.dumps({"images": [], "categories": classes}))
    (predicted / "detections.json").write_text("[]")
    with pytest.raises(SystemExit, match=r"threshold of 0\.45, and --ignore is 0\.3.*--threshold 0\.3"):
        command(folder, predicted)


def test_detections_of_an_image_are_divided_by_hand() -> None:
    boxes = np.array(
        [[0, 0, 10, 10, 0, 0.61], [0, 0, 10, 8, 0, 0.9], [0, 0, 10, 6, 0, 0.3], [50, 0, 60, 10, 0, 0.3]], np.float32
    )
    labels, ignored = divided(boxes, 0.6)
    assert labels[:, 5].tolist() == pytest.approx([0.9])  # IoU 0.8 with the other
    assert ignored[:, :4].tolist() == [[50, 0, 60, 10]]
