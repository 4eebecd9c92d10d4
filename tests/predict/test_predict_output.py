"""Output folder of a prediction: whose it is, parts image by image, JSON in bounded files, names of drawings."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pycocotools.coco import COCO

import pipeline.predict.coco_json
import pipeline.predict.predict
from jobs import predict as predict_job
from pipeline.config import ConfigError
from pipeline.data.shards.manifest import Category
from pipeline.evaluation.detections import DetectionTable, to_coco_json
from pipeline.predict.coco_json import grouped, json_rows
from pipeline.predict.drawings import drawing_name
from pipeline.predict.inputs import InputImage, Inputs, InputSource, list_inputs
from pipeline.predict.partition import write_rows
from pipeline.predict.plan import SCHEMA, PredictPlan, claim_folder, part_uri
from pipeline.predict.predict import FEW_IMAGES, IN_PROCESS, PredictOptions, in_this_process, predict
from pipeline.predict.predicted_images import PARTS_AHEAD, predicted_images, read_part, record_batches
from tests.support.processes import wait_for
from tests.support.small_detectors import small_detector
from tests.support.synthetic_shards import synthetic_records, write_shards

ROOT = Path(__file__).parents[2]
KILLED_IMAGES = 60  # each a part: enough to be killed between two
OPTIONS = PredictOptions(precision="fp32", workers=IN_PROCESS, part_size=4, batch_size=3, num_images=0)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for number, record in enumerate(synthetic_records(10, longest_side=80)):
        (folder / f"{number}.jpg").write_bytes(record.image)
    (folder / "3.jpg").write_bytes(b"text")
    return folder


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_detector().save(tmp_path_factory.mktemp("detector") / "detector")


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def random_rows(counts: list[int]) -> pa.RecordBatch:
    """Rows of a part, image n of which has counts[n] detections."""
    random = np.random.default_rng(0)
    rows: list[dict[str, Any]] = []
    for number, count in enumerate(counts):
        corner = random.uniform(-5, 400, (count, 2)).astype(np.float32)
        boxes = np.concatenate([corner, corner + random.uniform(0, 99, (count, 2)).astype(np.float32)], 1)
        scores = (10.0 ** -random.uniform(0, 9, count)).astype(np.float32)  # down to those with an exponent
        labels = random.integers(0, 3, count, np.int32)
        values = {"boxes": boxes.flatten(), "labels": labels, "scores": scores}
        rows.append(dict.fromkeys(SCHEMA.names) | {"image_id": 7 * number, "file_name": f"{number}.jpg"} | values)
    return pa.RecordBatch.from_pylist(rows, SCHEMA)


# Reading the parts


def test_images_are_read_from_the_parts_in_the_order_of_the_inputs(photos: Path, tmp_path: Path) -> None:
    options = replace(OPTIONS, part_size=1, num_explanations=1)
    predict(small_detector(), list_inputs([str(photos)]), str(tmp_path / "out"), options)
    images = list(predicted_images(str(tmp_path / "out")))
    assert [Path(image.file_name).name for image in images] == [f"{number}.jpg" for number in range(10)]
    for number, image in enumerate(images):
        (row,) = pq.read_table(tmp_path / "out/parts" / f"part-{number:06d}.parquet").to_pylist()
        assert image.rejected == row["rejected"]
        assert image.boxes.flatten().tolist() == row["boxes"]
        assert image.labels.tolist() == row["labels"]
        assert image.scores.tolist() == row["scores"]
        assert (image.width, image.height, image.image_id) == (row["width"], row["height"], number + 1)
        if number == 3:
            assert image.rejected is not None
            assert image.boxes.shape == (0, 4)
            assert image.edge_std_px is None
            continue
        (expected,) = small_detector()(image.file_name)
        assert 0 < len(image.names) == len(expected)
        assert sorted(image.names) == sorted(expected.names)
        assert image.edge_std_px is not None
        assert image.edge_std_px.shape == image.boxes.shape
        assert image.edge_std_px.flatten().tolist() == row["edge_std_px"]


def test_an_unfinished_or_missing_prediction_is_not_read(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    predict(small_detector(), list_inputs([str(photos)]), str(out), OPTIONS)
    (out / "parts/part-000001.parquet").unlink()
    with pytest.raises(ConfigError, match="1 of 3 parts are missing"):
        next(predicted_images(str(out)))
    with pytest.raises(ConfigError, match="holds no prediction"):
        next(predicted_images(str(photos)))


def test_a_slow_reader_holds_a_few_parts_however_many_there_are(tmp_path: Path) -> None:
    plan = PredictPlan(
        inputs="",
        detector="",
        num_images=64 * 20,
        part_size=20,
        batch_size=1,
        thresholds=(0.0,),
        threshold_text="0, as given",
        edge_std=False,
        categories=(Category(label=0, original_id=1, name="a"),),
    )
    out = str(tmp_path)
    claim_folder(out, plan)
    rows = random_rows([300] * 20).to_pylist()
    for part in range(plan.num_parts):
        write_rows(rows, part_uri(out, part))
    size = read_part(out, 0).nbytes
    before = pa.total_allocated_bytes()
    held = []
    for _ in record_batches(out, plan):
        time.sleep(0.01)  # in which an unbounded reader gets ahead
        held.append(pa.total_allocated_bytes() - before)
    assert len(held) == 64
    assert max(held) < 4 * (PARTS_AHEAD + 2) * size < 64 * size


def test_the_lines_in_the_docs_read_all_detections(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = predict(small_detector(), list_inputs([str(photos)]), str(tmp_path / "found"), OPTIONS)
    blocks = re.findall(r"^```python\n(.*?)^```$", (ROOT / "docs/serving.md").read_text(), re.MULTILINE | re.DOTALL)
    (lines,) = [block for block in blocks if "pyarrow.dataset" in block]
    monkeypatch.chdir(tmp_path)
    printed = io.StringIO()
    with redirect_stdout(printed):
        exec(lines, {})
    expected = [
        f"{image.file_name} {name} {score} {box}"
        for image in predicted_images("found")
        for name, score, box in zip(image.names, image.scores.tolist(), image.boxes.tolist(), strict=True)
    ]
    assert len(expected) == result.detections.total() > 0
    assert printed.getvalue().splitlines() == expected


# JSON


def test_json_has_the_numbers_of_the_parts() -> None:
    batch = random_rows([5, 0, 300, 1])
    categories = [Category(label=label, original_id=11 * label + 3, name=f"{label}") for label in range(3)]
    actual = json.loads(b"[" + json_rows(batch, categories) + b"]")
    rows = batch.to_pylist()
    table = DetectionTable(
        image_id=np.array([row["image_id"] for row in rows for _ in row["labels"]]),
        label=np.array([label for row in rows for label in row["labels"]], np.int32),
        score=np.array([score for row in rows for score in row["scores"]], np.float32),
        box=np.array([value for row in rows for value in row["boxes"]], np.float32).reshape(-1, 4),
    )
    expected = to_coco_json(table, categories)
    assert len(actual) == len(expected) == 306
    for one, other in zip(actual, expected, strict=True):
        assert (one["image_id"], one["category_id"]) == (other["image_id"], other["category_id"])
        assert np.float32(one["score"]) == np.float32(other["score"])
        assert np.array_equal(np.float32(one["bbox"]), np.float32(other["bbox"]))
    assert json_rows(random_rows([0, 0]), categories) == b""


@pytest.mark.parametrize(
    ("batches", "limit", "groups"),
    [
        ([[3, 3], [3, 1]], 6, [[3, 3], [3, 1]]),
        ([[3, 3], [3, 1]], 7, [[3, 3], [3, 1]]),
        ([[2, 2], [2, 2]], 6, [[2, 2, 2], [2]]),
        ([[9], [1, 9, 1]], 4, [[9], [1], [9], [1]]),
        ([[0, 4, 0], [0, 4], [0]], 4, [[0, 4, 0, 0], [4, 0]]),
        ([[0], [0]], 1, [[0, 0]]),
    ],
)
def test_groups_have_at_most_the_limit_and_whole_images(
    batches: list[list[int]], limit: int, groups: list[list[int]]
) -> None:
    def counts() -> Iterator[list[int]]:
        for group in grouped([random_rows(each) for each in batches], limit):
            yield [len(row["labels"]) for batch in group for row in batch.to_pylist()]

    assert list(counts()) == groups


def test_many_detections_are_json_only_if_asked_for_and_in_bounded_files(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs, out, small = list_inputs([str(photos)]), tmp_path / "out", tmp_path / "small"
    predict(small_detector(), inputs, str(small), OPTIONS)
    expected = json.loads((small / "detections.json").read_text())
    limit = len(expected) // 3
    monkeypatch.setattr(pipeline.predict.predict, "SMALL_RESULT", len(expected) - 1)
    monkeypatch.setattr(pipeline.predict.coco_json, "DETECTIONS_PER_FILE", limit)

    result = predict(small_detector(), inputs, str(out), OPTIONS)
    assert result.json_files == 0
    assert "the same command with --json" in result.summary()
    assert not [name for name in files_of(out) if name.endswith(".json") and name != "plan.json"]

    parts = files_of(out / "parts")
    result = predict(small_detector(), inputs, str(out), replace(OPTIONS, json=True))
    assert "--json" not in result.summary()
    assert files_of(out / "parts") == parts
    assert not (out / "detections.json").exists()
    files = sorted((out / "detections").iterdir())
    assert result.json_files == len(files) >= 3
    assert [path.name for path in files] == [f"{number:06d}.json" for number in range(len(files))]
    contents = [json.loads(path.read_text()) for path in files]
    assert [row for content in contents for row in content] == expected
    assert all(0 < len(content) <= limit for content in contents)
    assert (out / "images.json").read_bytes() == (small / "images.json").read_bytes()
    with redirect_stdout(io.StringIO()):
        loaded = [COCO(str(out / "images.json")).loadRes(str(path)) for path in files]
    assert sum(len(each.anns) for each in loaded) == len(expected)


# The folder


@pytest.mark.parametrize("name", ["images.json", "drawings/1_0.jpg", "notes.txt", "parts/part-000000.parquet"])
def test_a_folder_with_files_of_others_is_refused_and_left_as_it_was(name: str, photos: Path, tmp_path: Path) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(b"mine")
    with pytest.raises(ConfigError, match=rf"holds other files \({name.split('/')[0]}\).* empty folder"):
        predict(small_detector(), list_inputs([str(photos)]), str(tmp_path), OPTIONS)
    assert files_of(tmp_path) == {name: b"mine"}


@pytest.mark.parametrize("content", [b"mine", b'{"version": 1}', b"\xff", b'{"steps": ["a"]}'])
def test_a_plan_of_something_else_is_refused_and_left_as_it_was(content: bytes, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_bytes(content)
    with pytest.raises(ConfigError, match="not the plan of a prediction"):
        predict(small_detector(), list_inputs([str(photos)]), str(tmp_path), OPTIONS)
    assert files_of(tmp_path) == {"plan.json": content}


def test_a_folder_with_hidden_files_alone_is_empty(photos: Path, tmp_path: Path) -> None:
    (tmp_path / ".DS_Store").write_bytes(b"")
    predict(small_detector(), list_inputs([str(photos)]), str(tmp_path), OPTIONS)
    assert len(list((tmp_path / "parts").iterdir())) == 3


def test_results_inside_the_input_folder_do_not_become_inputs(detector: Path, photos: Path, tmp_path: Path) -> None:
    for path in photos.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    found = tmp_path / "found"
    written = []
    for _ in range(2):
        predict_job.main([str(detector), str(tmp_path), "--out", str(found), "--workers", "0"])
        written.append(files_of(found))
    assert any(name.startswith("drawings/") for name in written[0])
    assert written[0] == written[1]
    (tmp_path / "found_more.jpg").write_bytes((photos / "0.jpg").read_bytes())
    for given in (str(tmp_path), f"{tmp_path}/**/*"):
        inputs = list_inputs([given], leave_out=str(found))
        assert (inputs.num_images, inputs.skipped_files) == (11, 0)


# Drawings


@pytest.mark.parametrize(
    ("file_name", "expected"),
    [
        ("/data/photos/street.jpg", "7_street"),
        ("s3://bucket/a b/Straße 5.JPEG", "7_Straße_5"),
        ("clip.mp4#frame=20", "7_clip.mp4_frame_20"),
        ("../../etc/passwd", "7_passwd"),
        ("..", "7_.."),
        ("a\\..\\..\\b.png", "7_b"),
        ("x\0\n.jpg", "7_x_"),
        ("", "7_"),
    ],
)
def test_drawings_have_the_id_and_the_name_of_their_image(file_name: str, expected: str) -> None:
    assert drawing_name(InputImage(7, file_name, b"")) == expected


def test_a_long_name_is_shortened_to_what_file_systems_accept() -> None:
    name = drawing_name(InputImage(2**62, "ü" * 4000 + ".jpg", b""))
    assert "üü" in name
    assert len(f".{name}.jpg.{'0' * 32}.tmp".encode()) <= 255


def test_names_in_a_shard_set_lead_nowhere_else(tmp_path: Path) -> None:
    records = [replace(record, file_name="../../../evil.jpg") for record in synthetic_records(2, longest_side=64)]
    shards = write_shards(tmp_path / "shards", records)
    predict(small_detector(), list_inputs([shards.uri]), str(tmp_path / "below/out"), replace(OPTIONS, num_images=2))
    drawn = [path for path in tmp_path.rglob("*evil*") if path.is_file()]
    assert len(drawn) == 2
    assert {path.parent for path in drawn} == {tmp_path / "below/out/drawings"}


# This process or Ray


def test_a_few_images_need_no_ray_and_a_named_cluster_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    few = Inputs(tuple(InputSource("image", f"{number}", 1, "") for number in range(FEW_IMAGES)), 1, 0)
    many = Inputs((InputSource("shards", "shards", FEW_IMAGES + 1, ""),), 1, 0)
    assert in_this_process(few, None)
    assert not in_this_process(many, None)
    assert in_this_process(many, IN_PROCESS)
    assert not in_this_process(few, 1)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert not in_this_process(few, None)


def start(detector: Path, photos: Path, out: Path, log: Path, *options: str) -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    code = "import sys; from jobs.predict import main; main(); sys.exit('ray' in sys.modules)"
    command = [sys.executable, "-c", code, str(detector), str(photos), "--out", str(out), "--num-images", "2", *options]
    with log.open("a") as file:
        return subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=file, stderr=file, text=True, start_new_session=True
        )


def test_the_command_killed_and_given_again_ends_with_the_same_files_without_ray(
    detector: Path, tmp_path: Path
) -> None:
    folder, out, log = tmp_path / "photos", tmp_path / "out", tmp_path / "log"
    folder.mkdir()
    for number, record in enumerate(synthetic_records(KILLED_IMAGES, longest_side=64)):
        (folder / f"{number}.jpg").write_bytes(record.image)
    options = ("--part-size", "1", "--json", "--precision", "fp32")  # auto is measured, and may differ in the third run
    killed = start(detector, folder, out, log, *options)
    wait_for(lambda: len(list((out / "parts").glob("*.parquet"))) >= 3, killed, log)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    kept = {path: path.stat().st_mtime_ns for path in (out / "parts").glob("*.parquet")}
    assert 3 <= len(kept) < KILLED_IMAGES
    assert start(detector, folder, out, log, *options).wait() == 0, log.read_text()[-4000:]
    assert {path: path.stat().st_mtime_ns for path in kept} == kept

    undisturbed = tmp_path / "undisturbed"
    assert start(detector, folder, undisturbed, log, *options).wait() == 0, log.read_text()[-4000:]
    assert files_of(out) == files_of(undisturbed)
    assert len(files_of(out / "parts")) == KILLED_IMAGES
