"""Batch prediction without Ray: inputs, parts, and output files."""

import contextlib
import io
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from dfine_core import ImageDetections, LoadedDetector
from dfine_core.drawing import label_colour
from dfine_core.images import SUFFIXES
from dfine_core.inference import prepare
from dfine_core.model.postprocess import best_pairs, postprocess
from dfine_core.precision_choice import PrecisionChoice
from dfine_core.thresholds import ClassThresholds
from jobs import predict as predict_job
from pipeline.config import ConfigError
from pipeline.data.shards.manifest import ShardSet
from pipeline.data.shards.records import ImageRecord
from pipeline.data.sources.synthetic import CLASSES
from pipeline.evaluation.evaluate import evaluate
from pipeline.evaluation.ground_truth import read_ground_truth
from pipeline.predict.drawings import contact_sheet, draw_detections
from pipeline.predict.inputs import InputImage, decode_input, list_inputs, read_images
from pipeline.predict.on_ray import cpus_per_worker
from pipeline.predict.predict import IN_PROCESS, PredictOptions, predict
from tests.support.small_detectors import small_detector
from tests.support.synthetic_shards import synthetic_records, write_shards

OPTIONS = PredictOptions(precision="fp32", workers=IN_PROCESS, part_size=4, batch_size=3, num_images=0)


@pytest.fixture
def loaded() -> LoadedDetector:
    return small_detector()


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten images, two of them in a subfolder, and other files."""
    folder = tmp_path_factory.mktemp("photos")
    (folder / "below").mkdir()
    for number, record in enumerate(synthetic_records(10, longest_side=80)):
        (folder / ("below" if number > 7 else "") / f"{number}.jpg").write_bytes(record.image)
    (folder / "notes.txt").write_text("")
    (folder / ".hidden.jpg").write_text("")
    return folder


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """25 frames of 64 x 48 pixels at 10 per second; frame n is grey with brightness 10 n."""
    path = tmp_path_factory.mktemp("video") / "clip.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 10, (64, 48))
    for number in range(25):
        writer.write(np.full((48, 64, 3), 10 * number, np.uint8))
    writer.release()
    return path


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    return write_shards(tmp_path_factory.mktemp("drawn") / "val", synthetic_records(20, longest_side=64), shard_rows=16)


def rows_of(out: Path) -> list[dict[str, Any]]:
    files = sorted((out / "parts").glob("*.parquet"))
    assert files
    return [row for file in files for row in pq.read_table(file).to_pylist()]


# Inputs


def test_folders_are_read_with_subfolders_and_other_files_are_skipped(photos: Path) -> None:
    inputs = list_inputs([str(photos)])
    assert [Path(source.uri).name for source in inputs.sources] == [*(f"{n}.jpg" for n in range(8)), "8.jpg", "9.jpg"]
    assert inputs.skipped_files == 1
    assert str(inputs) == "10 images (10 image files; 1 other file skipped)"


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_files_of_every_ending_are_taken_from_folders(suffix: str, tmp_path: Path) -> None:
    for name in (f"a{suffix}", f"B{suffix.upper()}"):
        (tmp_path / name).write_bytes(synthetic_records(1)[0].image)
    inputs = list_inputs([str(tmp_path)])
    assert (inputs.num_images, inputs.skipped_files) == (2, 0)


@pytest.mark.parametrize(
    ("pattern", "names"),
    [("?.jpg", "01234567"), ("**/*.jpg", "0123456789"), ("below/*", "89"), ("[12].jpg", ""), ("b*/8.j*", "8")],
)
def test_a_pattern_stays_within_folders_unless_it_has_two_stars(pattern: str, names: str, photos: Path) -> None:
    if not names:
        with pytest.raises(ConfigError, match="there is no such file"):
            list_inputs([str(photos / pattern)])
        return
    inputs = list_inputs([str(photos / pattern)])
    assert "".join(sorted(Path(source.uri).stem for source in inputs.sources)) == names


def test_an_input_given_twice_or_as_a_relative_path_is_read_once(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(photos)
    inputs = list_inputs(["0.jpg", str(photos / "0.jpg"), "1.jpg", "."])
    assert inputs.num_images == 10
    assert Path(inputs.sources[0].uri).name == "0.jpg"


def test_a_shard_set_alone_keeps_its_image_ids_and_among_others_is_numbered(photos: Path, shards: ShardSet) -> None:
    alone = list_inputs([f"{shards.uri}/manifest.json"])
    stored = [row for number in (0, 1) for row in pq.read_table(shards.shard_uri(number)).to_pylist()]
    for first, stop in ((0, 20), (5, 6), (7, 19)):
        images = list(read_images(alone, first, stop))
        assert [image.image_id for image in images] == [row["image_id"] for row in stored[first:stop]]
        assert [image.content for image in images if isinstance(image, InputImage)] == [
            row["image"] for row in stored[first:stop]
        ]
    together = list_inputs([str(photos), shards.uri])
    assert [image.image_id for image in read_images(together, 8, 14)] == [9, 10, 11, 12, 13, 14]


@pytest.mark.parametrize(("stride", "first", "stop"), [(1, 0, 25), (1, 13, 17), (10, 0, 3), (7, 2, 4)])
def test_every_frame_of_a_video_is_found_from_anywhere(stride: int, first: int, stop: int, video: Path) -> None:
    inputs = list_inputs([str(video)], frame_stride=stride)
    assert inputs.num_images == -(-25 // stride)
    images = list(read_images(inputs, first, stop))
    assert len(images) == stop - first
    for number, image in enumerate(images, start=first):
        assert isinstance(image, InputImage)
        assert isinstance(image.content, np.ndarray)
        assert image.content.shape == (48, 64, 3)
        assert abs(float(image.content.mean()) - 10 * number * stride) < 4
        assert image.image_id == number + 1
        assert image.frame == number * stride
        assert image.seconds == pytest.approx(number * stride / 10)


def test_files_are_turned_upright_and_rows_of_a_shard_set_are_not(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (40, 30)).save(tmp_path / "photos/a.jpg", exif=exif)
    lying = replace(synthetic_records(1)[0], image=(tmp_path / "photos/a.jpg").read_bytes(), width=40, height=30)
    shards = write_shards(tmp_path / "shards", [lying])
    for given, size in ((str(tmp_path / "photos"), (30, 40)), (shards.uri, (40, 30))):
        (source,) = read_images(list_inputs([given]), 0, 1)
        assert isinstance(source, InputImage)
        assert decode_input(source).size == size


@pytest.mark.parametrize(
    ("name", "message"), [("nowhere", "no such file"), ("*.png", "no file matches"), ("empty", "no images or videos")]
)
def test_inputs_without_images_are_refused(name: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=message):
        list_inputs([str(tmp_path / name)])


# Predictions


def test_a_prediction_equals_the_detections_of_each_image(loaded: LoadedDetector, photos: Path, tmp_path: Path) -> None:
    inputs = list_inputs([str(photos)])
    expected: list[ImageDetections] = [each for source in inputs.sources for each in small_detector()(source.uri)]
    result = predict(loaded, inputs, str(tmp_path / "out"), OPTIONS)
    rows = rows_of(tmp_path / "out")
    assert [row["file_name"] for row in rows] == [source.uri for source in inputs.sources]
    assert 0 < sum(len(each.scores) for each in expected) == result.detections.total() < 10 * 160
    for row, each in zip(rows, expected, strict=True):
        assert row["labels"] == each.labels.tolist()
        assert row["scores"] == pytest.approx(each.scores.tolist(), abs=1e-5)
        assert row["boxes"] == pytest.approx(each.boxes.flatten().tolist(), abs=1e-3)
        with Image.open(row["file_name"]) as image:
            assert (row["width"], row["height"]) == image.size
    assert str(result.summary()).startswith(f"{tmp_path}/out: {result.detections.total()} detections in 10 images")


def test_the_thresholds_of_the_detector_decide_unless_one_is_given(photos: Path, tmp_path: Path) -> None:
    own = ClassThresholds((0.3, None, 0.6), (None,) * 3, 0.9)
    detector = replace(small_detector(CLASSES[:3]), thresholds=own)
    inputs = list_inputs([str(photos)])
    result = predict(detector, inputs, str(tmp_path / "own"), OPTIONS)
    predict(small_detector(CLASSES[:3]), inputs, str(tmp_path / "every"), replace(OPTIONS, threshold=0.0))
    compared = 0
    for row, every in zip(rows_of(tmp_path / "own"), rows_of(tmp_path / "every"), strict=True):
        pairs = zip(every["scores"], every["labels"], strict=True)
        expected = [score for score, label in pairs if score >= (0.3, 0.4, 0.6)[label]]
        assert row["scores"] == pytest.approx(expected)
        compared += len(expected)
    assert compared
    assert "threshold: best F1 on the validation images: " in result.summary()
    written = json.loads((tmp_path / "own" / "images.json").read_text())
    assert [category["threshold"] for category in written["categories"]] == [0.3, 0.4, 0.6]
    assert written["info"]["threshold"] == detector.threshold_text()
    with pytest.raises(ConfigError, match="thresholds changed"):
        predict(detector, inputs, str(tmp_path / "own"), replace(OPTIONS, threshold=0.5))


def test_results_do_not_depend_on_part_size_and_batch_size(photos: Path, tmp_path: Path) -> None:
    inputs = list_inputs([str(photos)])
    rows = []
    for part, batch in ((4, 3), (100, 3), (1, 1)):
        options = replace(OPTIONS, part_size=part, batch_size=batch)
        predict(small_detector(), inputs, str(tmp_path / f"{part}"), options)
        rows.append(rows_of(tmp_path / f"{part}"))
    for other in rows[1:]:
        assert [row["labels"] for row in other] == [row["labels"] for row in rows[0]]
        for one, two in zip(rows[0], other, strict=True):
            assert one["boxes"] == pytest.approx(two["boxes"], abs=1e-3)


def test_unreadable_inputs_are_listed_and_all_others_processed(
    loaded: LoadedDetector, photos: Path, video: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.jpg").write_bytes((photos / "0.jpg").read_bytes())
    (folder / "b.jpg").write_bytes((photos / "0.jpg").read_bytes()[:-200])
    (folder / "c.png").write_bytes(b"text")
    (folder / "d.avi").write_bytes(b"text")
    (folder / "e.avi").write_bytes(video.read_bytes())
    inputs = list_inputs([str(folder)], frame_stride=20)
    (folder / "f.jpg").write_bytes(b"")
    gone = list_inputs([str(folder)], frame_stride=20)
    (folder / "f.jpg").unlink()
    assert (inputs.num_images, gone.num_images) == (6, 7)
    result = predict(loaded, gone, str(tmp_path / "out"), OPTIONS)
    rows = rows_of(tmp_path / "out")
    assert [row["image_id"] for row in rows] == [1, 2, 3, 4, 5, 6, 7]
    assert [row["rejected"] is None for row in rows] == [True, False, False, False, True, True, False]
    assert [(Path(name).name, reason.split(":")[0]) for name, reason in result.rejected] == [
        ("b.jpg", "a broken JPEG image"),
        ("c.png", "an image cannot be opened"),
        ("d.avi#frame=0", "the video cannot be opened"),
        ("f.jpg", "missing file"),
    ]
    assert "4 could not be read" in result.summary()
    assert pq.read_table(tmp_path / "out/rejected.parquet").column("image_id").to_pylist() == [2, 3, 4, 7]
    described = json.loads((tmp_path / "out/images.json").read_text())
    assert [(image["id"], image.get("frame"), image.get("seconds")) for image in described["images"]] == [
        (1, None, None),
        (5, 0, 0.0),
        (6, 20, 2.0),
    ]


def test_existing_parts_are_kept_and_only_missing_ones_written(photos: Path, tmp_path: Path) -> None:
    inputs, out = list_inputs([str(photos)]), tmp_path / "out"
    predict(small_detector(), inputs, str(out), OPTIONS)
    whole = {path.relative_to(out): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    files = sorted((out / "parts").iterdir())
    assert len(files) == 3
    files[1].unlink()
    (out / "detections.json").unlink()
    (out / "parts" / ".part-000001.parquet.0.tmp").write_bytes(b"half of it")
    written_at = [files[number].stat().st_mtime_ns for number in (0, 2)]
    predict(small_detector(), inputs, str(out), OPTIONS)
    assert [files[number].stat().st_mtime_ns for number in (0, 2)] == written_at
    assert {path.relative_to(out): path.read_bytes() for path in out.rglob("*") if path.is_file()} == whole


def test_another_prediction_in_the_same_folder_is_refused(photos: Path, tmp_path: Path) -> None:
    inputs, out = list_inputs([str(photos)]), str(tmp_path / "out")
    predict(small_detector(), inputs, out, OPTIONS)
    fewer = list_inputs([str(photos / "below")])
    for detector, given, options, message in (
        (small_detector(seed=1), inputs, OPTIONS, "detector changed"),
        (small_detector(), fewer, OPTIONS, "inputs, num_images changed"),
        (small_detector(), inputs, replace(OPTIONS, threshold=0.1), "thresholds changed"),
        (small_detector(), inputs, replace(OPTIONS, precision="bf16"), "precision changed"),
    ):
        with pytest.raises(ConfigError, match=f"contains another prediction: {message}"):
            predict(detector, given, out, options)


def test_a_measured_precision_holds_for_all_parts_of_a_prediction(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs, out, lines = list_inputs([str(photos)]), tmp_path / "out", list[str]()
    options = replace(OPTIONS, precision="auto")
    measured = [PrecisionChoice("bf16-channels-last", {"bf16-channels-last": 7.0}, {})]
    monkeypatch.setattr("pipeline.predict.predict.choose_precision", lambda _: measured.pop())
    predict(small_detector(), inputs, str(out), options, lines.append)
    assert lines == [
        "precision bf16-channels-last, by measurement (bf16-channels-last 7 ms); --precision bf16-channels-last repeats it"
    ]
    part = sorted((out / "parts").iterdir())[1]
    first = part.read_bytes()
    part.unlink()
    predict(small_detector(), inputs, str(out), options, lines.append)  # a second measurement would fail
    assert part.read_bytes() == first
    assert len(lines) == 1
    predict(small_detector(), inputs, str(tmp_path / "named"), replace(OPTIONS, precision="bf16-channels-last"))
    assert (tmp_path / "named" / "parts" / part.name).read_bytes() == first


# COCO


def self_labelled(loaded: LoadedDetector, folder: Path) -> ShardSet:
    """Images whose ground truth is a jittered sample of the detector's own detections: its AP lies between 0 and 1."""
    random = np.random.default_rng(0)
    records = []
    for record in synthetic_records(12, longest_side=64):
        (found,) = loaded(record.image, threshold=0.0)
        chosen = random.choice(100, 6, replace=False)
        boxes = found.boxes.numpy()[chosen] + random.normal(0, 0.4, (6, 4)).astype(np.float32)
        size = np.array([record.width, record.height] * 2, np.float32)
        boxes = np.clip(boxes, 0, size)
        kept = ((boxes[:, 2:] - boxes[:, :2]) > 1).all(1)
        records.append(labelled(record, boxes[kept], found.labels.numpy()[chosen][kept]))
    return write_shards(folder, records)


def labelled(record: ImageRecord, boxes: NDArray[np.float32], labels: NDArray[np.int64]) -> ImageRecord:
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    crowd = np.zeros(len(labels), np.bool_)
    return replace(record, boxes=boxes, labels=labels.astype(np.int32), areas=areas, crowd=crowd)


def test_pycocotools_reads_the_detections_and_computes_the_ap_of_the_evaluation(tmp_path: Path) -> None:
    shards = self_labelled(small_detector(), tmp_path / "shards")
    predict(small_detector(), list_inputs([shards.uri]), str(tmp_path / "out"), replace(OPTIONS, threshold=0.0))
    report = evaluate(
        small_detector().detector, shards, device=torch.device("cpu"), micro_batch_size=5, decode_in="inline"
    )
    assert report is not None
    expected = report.numbers
    assert 0.05 < expected["AP"] < 0.95

    ground_truth = json.loads((tmp_path / "out/images.json").read_text())
    assert [category["name"] for category in ground_truth["categories"]] == list(small_detector().names)
    ground_truth["annotations"] = [
        {"id": number, "image_id": image_id, "category_id": label, "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
        for number, (image_id, label, box) in enumerate(boxes_of(shards), start=1)
    ]
    (tmp_path / "ground_truth.json").write_text(json.dumps(ground_truth))
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(tmp_path / "ground_truth.json"))
        run = COCOeval(coco, coco.loadRes(str(tmp_path / "out/detections.json")), "bbox")
        run.evaluate()
        run.accumulate()
        run.summarize()
    assert run.stats[0] == pytest.approx(expected["AP"], abs=1e-4)
    assert run.stats[1] == pytest.approx(expected["AP50"], abs=1e-4)


def boxes_of(shards: ShardSet) -> Sequence[tuple[int, int, list[float]]]:
    """Image id, label and xywh of all boxes."""
    ground_truth = read_ground_truth(shards)
    sizes = ground_truth.box[:, 2:] - ground_truth.box[:, :2]
    xywh = np.concatenate([ground_truth.box[:, :2], sizes], 1).tolist()
    return list(zip(ground_truth.image_id[ground_truth.image].tolist(), ground_truth.label.tolist(), xywh, strict=True))


def test_other_inputs_have_the_categories_of_the_detector(loaded: LoadedDetector, photos: Path, tmp_path: Path) -> None:
    predict(loaded, list_inputs([str(photos / "0.jpg")]), str(tmp_path / "out"), OPTIONS)
    described = json.loads((tmp_path / "out/images.json").read_text())
    assert described["categories"][0] == {"id": 11, "name": "circle", "threshold": 0.4}
    ids = {row["category_id"] for row in json.loads((tmp_path / "out/detections.json").read_text())}
    assert ids <= set(range(11, 19))
    assert ids


def test_no_detections_are_an_empty_list(loaded: LoadedDetector, photos: Path, tmp_path: Path) -> None:
    result = predict(loaded, list_inputs([str(photos)]), str(tmp_path / "out"), replace(OPTIONS, threshold=1.0))
    assert json.loads((tmp_path / "out/detections.json").read_text()) == []
    assert result.detections.total() == 0
    assert [row["labels"] for row in rows_of(tmp_path / "out")] == [[]] * 10


# Deviations of the edges


def test_explained_parts_have_the_deviation_of_each_edge_in_pixels(
    loaded: LoadedDetector, photos: Path, tmp_path: Path
) -> None:
    predict(loaded, list_inputs([str(photos / "0.jpg")]), str(tmp_path / "out"), replace(OPTIONS, num_explanations=1))
    (row,) = rows_of(tmp_path / "out")
    with Image.open(photos / "0.jpg") as image:
        pixels, size = prepare([image.convert("RGB")], (64, 64)), image.size
    with torch.no_grad():
        output = loaded.detector(pixels.float() / 255, every_layer=True)
    _, query, _ = best_pairs(output.logits, 160)
    detections = postprocess(output.logits, output.boxes, torch.tensor([size]), 160)
    kept = int((detections.scores >= 0.4).sum())
    assert 0 < kept == len(row["labels"])
    for index in range(0, kept, 7):
        probabilities = output.matching.edge_logits[-1, 0, query[0, index]].softmax(-1)
        bins, (_, _, width, height) = loaded.detector.decoder.bins, output.matching.initial_boxes[0, query[0, index]]
        variance = probabilities @ bins**2 - (probabilities @ bins) ** 2
        unit = torch.stack([width * size[0], height * size[1]] * 2) / loaded.config.reg_scale
        expected = (variance.sqrt() * unit).tolist()
        assert row["edge_std_px"][4 * index : 4 * index + 4] == pytest.approx(expected, rel=1e-3)
    assert (tmp_path / "out/explained/1_0.png").read_bytes().startswith(b"\x89PNG")


def test_direct_regression_has_nothing_to_explain(photos: Path, tmp_path: Path) -> None:
    direct = small_detector(regression="direct")
    with pytest.raises(ConfigError, match="no distributions to explain"):
        predict(direct, list_inputs([str(photos)]), str(tmp_path / "out"), replace(OPTIONS, num_explanations=1))
    predict(direct, list_inputs([str(photos)]), str(tmp_path / "out"), OPTIONS)


# Drawings


def test_boxes_are_drawn_where_they_are_in_the_colour_of_their_class() -> None:
    image = Image.new("RGB", (800, 600), "black")
    drawing = draw_detections(image, [[100, 200, 500, 580]], [2], [0.9], ["a", "b", "c"])
    assert drawing.size == (800, 600)
    for point in ((100, 400), (500, 400), (300, 580)):
        assert drawing.getpixel(point) == label_colour(2)
    assert drawing.getpixel((300, 400)) == (0, 0, 0)
    assert image.getbbox() is None  # the original is unchanged
    assert draw_detections(image.resize((80, 60)), [], [], [], []).size == (640, 480)
    assert draw_detections(image.resize((3200, 2400)), [[-5, -5, 9e3, 9e3]], [0], [1.0], ["a"]).size == (1600, 1200)


def test_an_image_without_detections_is_not_explained(loaded: LoadedDetector, photos: Path, tmp_path: Path) -> None:
    options = replace(OPTIONS, num_explanations=1, threshold=1.0)
    predict(loaded, list_inputs([str(photos / "0.jpg")]), str(tmp_path / "out"), options)
    (row,) = rows_of(tmp_path / "out")
    assert row["labels"] == []
    assert not (tmp_path / "out/explained").exists()


def test_images_are_sampled_evenly_and_shown_on_one_contact_sheet(
    loaded: LoadedDetector, photos: Path, tmp_path: Path
) -> None:
    predict(loaded, list_inputs([str(photos)]), str(tmp_path / "out"), replace(OPTIONS, num_images=4))
    assert sorted(path.name for path in (tmp_path / "out/drawings").iterdir()) == [
        *("10_9.jpg", "1_0.jpg", "4_3.jpg", "7_6.jpg")
    ]
    with Image.open(tmp_path / "out/contact_sheet.jpg") as sheet:
        assert sheet.size == contact_sheet([("", Image.new("RGB", (9, 9)))] * 4).size


# The command


def test_the_command_predicts_and_prints_a_summary(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from dfine_core.checkpoints.weights import save_released

    released = small_detector(("person", "dog"), input_size=(160, 160))
    save_released(released.detector.state_dict(), released.config, tmp_path / "small.pth")
    command = [str(tmp_path / "small.pth"), str(photos / "below"), "--out", str(tmp_path / "out"), "--workers", "0"]
    predict_job.main([*command, "--num-images", "1"])
    output = capsys.readouterr().out
    assert "on 2 images (2 image files)" in output
    assert "class_0" in output
    with pytest.raises(SystemExit, match="thresholds changed"):
        predict_job.main([*command, "--threshold", "0.9"])
    with pytest.raises(SystemExit, match="no detector"):
        predict_job.main([str(photos), *command[1:]])


@pytest.mark.parametrize(
    ("nodes", "workers", "cpus"),
    [([2], 1, 2), ([2], 2, 1), ([4, 4], 3, 2), ([3, 3, 3], 4, 1), ([1], 5, 1), ([16], 3, 5)],
)
def test_workers_share_the_cpus_of_their_nodes(nodes: list[int], workers: int, cpus: int) -> None:
    assert cpus_per_worker(nodes, workers) == cpus
