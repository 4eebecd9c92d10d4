"""`dfine select`: what it writes, that annotation tools and `dfine prepare` read it, and that it resumes without harm."""

import json
import re
import shutil
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pycocotools.coco import COCO

from dfine_core.inference import LoadedDetector
from dfine_core.uncertainty import EdgeCalibration, ScoreCalibration
from dfine_core.uncertainty.detector_calibration import LEVELS, DetectorCalibration
from jobs import select as select_job
from pipeline.config import ConfigError
from pipeline.data.sources.coco import coco_source
from pipeline.data.sources.detect import find_source
from pipeline.data.sources.index import AnnotationIndex, DatasetSource
from pipeline.data.sources.yolo import yolo_source
from pipeline.labelling.plan import FORMATS
from pipeline.labelling.prelabels import clipped
from pipeline.labelling.select import SelectOptions, SelectResult, select
from pipeline.predict.inputs import list_inputs
from tests.support.small_detectors import small_detector
from tests.support.synthetic_shards import synthetic_records, write_shards

IMAGES = 12


@pytest.fixture(scope="module")
def loaded() -> LoadedDetector:
    return small_detector()


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Drawn images, a copy of one in another size, and a file that is no image."""
    folder = tmp_path_factory.mktemp("photos")
    for number, record in enumerate(synthetic_records(IMAGES, longest_side=64)):
        (folder / f"photo {number}.jpg").write_bytes(record.image)
    with Image.open(folder / "photo 3.jpg") as image:
        image.resize((image.width * 2, image.height * 2)).save(folder / "same as 3.png")
    (folder / "broken.jpg").write_bytes(b"text")
    return folder


def run(loaded: LoadedDetector, source: Path | str, out: Path, **options: Any) -> SelectResult:
    return select(
        loaded, list_inputs([str(source)]), 0, str(out), SelectOptions(**{"workers": 0, "count": 5} | options)
    )


def read_by(source: DatasetSource) -> tuple[list[str], dict[str, list[tuple[float, ...]]]]:
    """Class names and, by file, boxes with their labels, as `dfine prepare` reads them; YOLO's are fractions."""
    with closing(AnnotationIndex()) as index:
        categories = source.fill(index)
        index.finish()
        assert list(index.rejected()) == []
        boxes = {entry.file_name: [(box.label, *box[1:5]) for box in rows] for entry, rows in index.ordered()}
    return [category.name for category in categories], boxes


# Pre-labels


def test_coco_is_opened_by_pycocotools_and_taken_back_by_prepare(
    loaded: LoadedDetector, photos: Path, tmp_path: Path
) -> None:
    result = run(loaded, photos, tmp_path / "out", threshold=0.3)
    coco = COCO(str(tmp_path / "out" / "annotations.json"))
    assert len(coco.getImgIds()) == 5
    assert {category["name"] for category in coco.loadCats(coco.getCatIds())} == set(loaded.names)
    detected = {}
    for image in coco.loadImgs(coco.getImgIds()):
        path = tmp_path / "out" / "images" / image["file_name"]
        with Image.open(path) as opened:
            assert opened.size == (image["width"], image["height"])
        (found,) = loaded([path], threshold=0.3)
        detected[image["file_name"]] = found
        rows = coco.loadAnns(coco.getAnnIds(image["id"]))
        # Each pre-label is a detection of this image, cut at its border.
        for row in rows:
            corners = np.array([*row["bbox"][:2], row["bbox"][0] + row["bbox"][2], row["bbox"][1] + row["bbox"][3]])
            cut = found.boxes.numpy().clip(0, [image["width"], image["height"]] * 2)
            assert np.abs(cut - corners).max(1).min() < 0.1
    assert sum(len(found) for found in detected.values()) >= len(coco.getAnnIds()) > 5

    # A person corrects: removes a box, moves one, and adds one.
    file = tmp_path / "out" / "annotations.json"
    content = json.loads(file.read_text())
    content["annotations"].pop(0)
    content["annotations"][0]["bbox"] = [1, 2, 10, 12]
    first = content["images"][0]
    content["annotations"].append({"id": 9999, "image_id": first["id"], "category_id": 11, "bbox": [0, 0, 5, 6]})
    file.write_text(json.dumps(content))
    names, boxes = read_by(coco_source(str(tmp_path / "out" / "images"), str(file)))
    assert names == list(loaded.names)
    assert set(boxes) == {image["file"] for image in result.content["chosen"]}
    assert sum(map(len, boxes.values())) == len(content["annotations"])
    assert (0, 0, 0, 5, 6) in boxes[first["file_name"]]


def test_yolo_labels_are_fractions_that_prepare_takes_back(
    loaded: LoadedDetector, photos: Path, tmp_path: Path
) -> None:
    run(loaded, photos, tmp_path / "coco", threshold=0.3)
    run(loaded, photos, tmp_path / "out", threshold=0.3, format="yolo")
    names, boxes = read_by(yolo_source(tmp_path / "out" / "data.yaml", "train"))
    assert names == list(loaded.names)
    coco = COCO(str(tmp_path / "coco" / "annotations.json"))
    assert list(find_source(tmp_path / "out").splits) == list(find_source(tmp_path / "coco").splits) == ["train"]
    pixels = 0
    for image in coco.loadImgs(coco.getImgIds()):
        rows = coco.loadAnns(coco.getAnnIds(image["id"]))
        size = np.array([image["width"], image["height"]] * 2)
        (found,) = [rows for name, rows in boxes.items() if name.endswith(image["file_name"])]
        scaled = np.array([row[1:] for row in found]).reshape(-1, 4) * size
        left, top, width, height = np.array([row["bbox"] for row in rows]).reshape(-1, 4).T
        assert scaled == pytest.approx(np.stack([left, top, left + width, top + height], 1), abs=0.02)
        pixels += len(found)
    assert pixels > 5


def test_tasks_of_label_studio_fit_its_interface_and_are_percents(
    loaded: LoadedDetector, photos: Path, tmp_path: Path
) -> None:
    run(loaded, photos, tmp_path / "coco", threshold=0.3)
    run(loaded, photos, tmp_path / "out", threshold=0.3, format="label-studio")
    interface = ElementTree.fromstring((tmp_path / "out" / "label_config.xml").read_text())
    (image_tag,), (labels,) = interface.findall("Image"), interface.findall("RectangleLabels")
    assert [label.get("value") for label in labels] == list(loaded.names)
    assert labels.get("toName") == image_tag.get("name")
    coco = COCO(str(tmp_path / "coco" / "annotations.json"))
    tasks = json.loads((tmp_path / "out" / "tasks.json").read_text())
    assert len(tasks) == 5
    for task in tasks:
        (image,) = coco.loadImgs([task["id"]])
        file = task["data"][(image_tag.get("value") or "").removeprefix("$")].partition("?d=")[2]
        assert file.replace("%20", " ") == f"images/{image['file_name']}"
        (prediction,) = task["predictions"]
        rows = coco.loadAnns(coco.getAnnIds(image["id"]))
        for region, row in zip(prediction["result"], rows, strict=True):
            assert (region["from_name"], region["to_name"]) == (labels.get("name"), image_tag.get("name"))
            value = region["value"]
            x, y, width, height = row["bbox"]
            across, down = image["width"] / 100, image["height"] / 100
            assert value["x"] * across == pytest.approx(x, abs=0.02)
            assert value["y"] * down == pytest.approx(y, abs=0.02)
            assert value["width"] * across == pytest.approx(width, abs=0.02)
            assert value["height"] * down == pytest.approx(height, abs=0.02)
            assert value["rectanglelabels"] == [loaded.names[loaded.category_ids.index(row["category_id"])]]


def test_boxes_are_cut_at_the_border_and_empty_ones_go() -> None:
    boxes = np.array([[-5, -5, 10, 10], [-9, 0, -1, 5], [2, 2, 90, 90]], np.float32)
    cut, labels, scores = clipped(boxes, np.array([0, 1, 2], np.int32), np.array([0.9, 0.8, 0.7], np.float32), 40, 30)
    assert cut.tolist() == [[0, 0, 10, 10], [2, 2, 40, 30]]
    assert labels.tolist() == [0, 2]
    assert scores.tolist() == pytest.approx([0.9, 0.7])


# The choice


def test_copies_and_files_that_are_no_images_are_left_out_and_named(
    loaded: LoadedDetector, photos: Path, tmp_path: Path
) -> None:
    result = run(loaded, photos, tmp_path / "out", count=50)
    chosen = result.content["chosen"]
    assert len(chosen) == IMAGES  # of the image and its copy, one
    (pair,) = [image for image in chosen if image["near_duplicates"]]
    assert {Path(name).name for name in (pair["source"], *pair["near_duplicates"])} == {"photo 3.jpg", "same as 3.png"}
    (rejected,) = result.content["rejected"]
    assert rejected["source"].endswith("broken.jpg")
    assert "50 were asked for" in result.summary()
    listed = (tmp_path / "out" / "selected.txt").read_text().splitlines()
    assert listed == [image["source"] for image in chosen]
    assert len(set(listed)) == IMAGES
    values = [image["expected_error"] for image in chosen]
    assert all(value >= 0 for value in values)
    assert re.match(r"\d+\.\d expected errors, .* by scores and .* by edges; \d+ of \d+ box", chosen[0]["reason"])
    with Image.open(tmp_path / "out" / "contact_sheet.jpg") as sheet:
        assert sheet.width > 600


def test_labelled_images_are_kept_away_from(loaded: LoadedDetector, photos: Path, tmp_path: Path) -> None:
    write_shards(tmp_path / "shards", synthetic_records(4, longest_side=64))  # the first four photos
    select_job.main(
        [
            *(str(loaded.save(tmp_path / "detector")), str(photos), "--labelled", str(tmp_path / "shards")),
            *("--out", str(tmp_path / "out"), "--workers", "0", "--count", "50"),
        ]
    )
    content = json.loads((tmp_path / "out" / "selected.json").read_text())
    names = {Path(image["source"]).stem for image in content["chosen"]}
    assert names == {f"photo {number}" for number in range(4, IMAGES)}
    assert content["already_labelled"] == 5


def test_rows_of_a_shard_set_are_written_as_images(loaded: LoadedDetector, tmp_path: Path) -> None:
    records = synthetic_records(6, longest_side=64)
    write_shards(tmp_path / "shards", records)
    result = run(loaded, tmp_path / "shards", tmp_path / "out", count=3)
    by_id = {record.image_id: record.image for record in records}
    for image in result.content["chosen"]:
        assert (tmp_path / "out" / "images" / image["file"]).read_bytes() == by_id[int(image["file"].split("_")[0])]


def test_calibrated_scores_decide_and_are_compared_with_calibrated_thresholds(
    loaded: LoadedDetector, photos: Path, tmp_path: Path
) -> None:
    edges = tuple(EdgeCalibration(2.0, level, joint=False, objects=100) for level in LEVELS)
    calibration = DetectorCalibration(edges, edges, ScoreCalibration("temperature", 0.5), 10, None)
    run(loaded, photos, tmp_path / "raw", threshold=0.0, count=50)
    annotations = json.loads((tmp_path / "raw" / "annotations.json").read_text())["annotations"]
    raw = np.array([row["score"] for row in annotations])
    halved = 1 / (1 + np.sqrt((1 - raw) / raw))  # sigmoid of half the logit
    least = float(np.median(halved))
    calibrated = replace(loaded, calibration=calibration)
    run(calibrated, photos, tmp_path / "milder", threshold=least, count=50)
    annotations = json.loads((tmp_path / "milder" / "annotations.json").read_text())["annotations"]
    assert abs(len(annotations) - len(raw) / 2) <= 2
    assert min(row["score"] for row in annotations) == pytest.approx(least, abs=1e-3)
    plans = [json.loads((tmp_path / name / "select_plan.json").read_text()) for name in ("raw", "milder")]
    assert plans[0]["scores"] is None
    assert plans[1]["scores"]["slope"] == 0.5


# Resuming


def test_the_same_command_writes_missing_parts_alone_and_a_finished_selection_stays(
    loaded: LoadedDetector, photos: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    whole = run(loaded, photos, out, part_size=4)
    parts = sorted((out / "parts").glob("*.parquet"))
    assert len(parts) == 4
    kept = parts[0].stat().st_mtime_ns

    # Interrupted after the first part: the others are measured again, with the same result.
    for part in parts[1:]:
        part.unlink()
    (out / "selected.json").unlink()
    assert run(loaded, photos, out, part_size=4).content == whole.content
    assert parts[0].stat().st_mtime_ns == kept
    assert pq.read_table(parts[3]).num_rows == IMAGES + 2 - 12

    # Finished: labels that were corrected since stay as they are.
    (out / "annotations.json").write_text("corrected")
    assert run(loaded, photos, out, part_size=4).content == whole.content
    assert (out / "annotations.json").read_text() == "corrected"


@pytest.mark.parametrize(("changed", "named"), [({"count": 6}, "count"), ({"format": "yolo"}, "format")])
def test_another_selection_is_refused_in_the_folder(
    loaded: LoadedDetector, photos: Path, tmp_path: Path, changed: dict[str, Any], named: str
) -> None:
    run(loaded, photos, tmp_path / "out")
    with pytest.raises(ConfigError, match=f"another selection: {named} changed"):
        run(loaded, photos, tmp_path / "out", **changed)


def test_files_of_others_are_not_replaced(loaded: LoadedDetector, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "annotations.json").write_text("mine")
    with pytest.raises(ConfigError, match="holds other files"):
        run(loaded, photos, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["annotations.json"]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "select_plan.json").write_text("{}")
    with pytest.raises(ConfigError, match="not the plan of a selection"):
        run(loaded, photos, tmp_path / "other")


def test_nothing_to_choose_from_is_said(loaded: LoadedDetector, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    shutil.copy(photos / "broken.jpg", tmp_path / "photos")
    with pytest.raises(ConfigError, match="none of the 1 unlabelled images can be read"):
        run(loaded, tmp_path / "photos", tmp_path / "out")
    inputs = list_inputs([str(photos)])
    with pytest.raises(ConfigError, match="also one of --labelled"):
        select(loaded, inputs, inputs.num_images, str(tmp_path / "out"), SelectOptions())


def test_formats_of_the_command_are_those_that_can_be_written() -> None:
    assert select_job.SELECT_FORMATS == FORMATS
    defaults: Callable[[str], Any] = select_job.parser().get_default
    options = SelectOptions()
    assert {name: defaults(name) for name in vars(options)} == vars(options)
