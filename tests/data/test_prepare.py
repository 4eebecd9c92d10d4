"""From files to shards: what is written, what is refused, and what survives a kill."""

import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from PIL import Image, ImageOps

from jobs.prepare import main as prepare_main
from pipeline import storage
from pipeline.data.doctor.examine import examine
from pipeline.data.prepare import prepare as prepare_module
from pipeline.data.prepare.image_files import BadImageError, checked_image
from pipeline.data.prepare.prepare import PrepareError, prepare, read_rejected
from pipeline.data.prepare.shard_writer import PrepareOptions
from pipeline.data.shards.manifest import ShardSet, load_shards
from pipeline.data.shards.records import SHARD_SCHEMA, ImageRecord, records_from_table
from pipeline.data.sources.coco import coco_source
from pipeline.data.sources.synthetic import CLASSES, synthetic_image
from pipeline.ray_cluster import start_ray
from tests.support.ray_clients import environment_of_cluster
from tests.support.s3_server import s3_bucket


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    with s3_bucket() as uri:
        yield uri


@pytest.fixture(scope="module")
def cluster(bucket: str) -> Iterator[str]:
    """Address of a Ray whose workers know the S3 server."""
    start_ray(num_cpus=2)
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()


def write_coco(folder: Path, records: Sequence[ImageRecord]) -> Path:
    """A COCO data set of these records; category ids are labels + 1."""
    (folder / "images").mkdir(parents=True)
    images, annotations = [], []
    for record in records:
        (folder / "images" / record.file_name).write_bytes(record.image)
        images.append(
            {name: getattr(record, name) for name in ("file_name", "width", "height")} | {"id": record.image_id}
        )
        for box, label, area, crowd in zip(record.boxes, record.labels, record.areas, record.crowd, strict=True):
            x1, y1, x2, y2 = box.tolist()
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": record.image_id,
                    "category_id": int(label) + 1,
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": float(area),
                    "iscrowd": int(crowd),
                }
            )
    categories = [{"id": label + 1, "name": name} for label, name in enumerate(CLASSES)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "instances.json").write_text(json.dumps(content))
    return folder


def rendered(count: int) -> list[ImageRecord]:
    return [synthetic_image(index, longest_side=96) for index in range(count)]


def shards_of(
    folder: Path,
    out: object,
    *,
    strict: bool = False,
    split: str = "train",
    report: Callable[[str], None] = print,
    **options: Any,
) -> ShardSet:
    source = coco_source(str(folder / "images"), str(folder / "instances.json"))
    return prepare(source, str(out), split=split, options=PrepareOptions(**options), strict=strict, report=report)


def stored(shards: ShardSet) -> list[ImageRecord]:
    """All rows in order, read with the reader of pyarrow."""
    files = [io.BytesIO(storage.read_bytes(shards.shard_uri(k))) for k in range(len(shards.manifest.shards))]
    return [record for file in files for record in records_from_table(pq.read_table(file))]


def assert_same(found: ImageRecord, expected: ImageRecord) -> None:
    for name, value in vars(expected).items():
        if isinstance(value, np.ndarray):
            np.testing.assert_allclose(getattr(found, name), value, rtol=1e-5, atol=1e-5)
        else:
            assert getattr(found, name) == value, name


# What is written


@pytest.mark.parametrize("store", ["disk", "s3"])
def test_every_image_is_stored_as_it_came_with_its_boxes(cluster: str, bucket: str, tmp_path: Path, store: str) -> None:
    records = rendered(40)
    out = tmp_path / "out" if store == "disk" else f"{bucket}/coco"
    shards = shards_of(write_coco(tmp_path / "in", records), out, shard_mib=0.05, row_group_rows=8)
    found = {record.image_id: record for record in stored(shards)}
    assert len(found) == len(records)
    for record in records:
        assert_same(found[record.image_id], record)
    manifest = shards.manifest
    assert len(manifest.shards) > 1
    assert manifest.images == 40
    assert manifest.boxes == sum(len(record.labels) for record in records)
    assert manifest.statistics.crowd_boxes == sum(int(record.crowd.sum()) for record in records) > 0
    assert manifest.statistics.images_without_boxes == sum(record.crowd.all() for record in records) > 0
    assert [category.original_id for category in manifest.categories] == list(range(1, len(CLASSES) + 1))
    assert storage.sizes(shards.uri).keys() == {
        "manifest.json",
        "rejected.parquet",
        *(shard.file for shard in manifest.shards),
    }
    assert not storage.exists(storage.join(shards.uri, ".prepare/plan.json"))


def test_the_manifest_describes_the_files(cluster: str, tmp_path: Path) -> None:
    shards = shards_of(write_coco(tmp_path / "in", rendered(40)), tmp_path / "out", shard_mib=0.05, row_group_rows=8)
    for k, shard in enumerate(shards.manifest.shards):
        data = Path(shards.shard_uri(k)).read_bytes()
        assert hashlib.sha256(data).hexdigest() == shard.sha256
        assert len(data) == shard.bytes
        file = pq.ParquetFile(pa.BufferReader(data))
        assert file.schema_arrow.equals(SHARD_SCHEMA)
        groups = [file.metadata.row_group(g) for g in range(file.num_row_groups)]
        assert tuple(group.num_rows for group in groups) == shard.row_groups
        assert max(shard.row_groups) == 8
        assert {group.column(c).compression for group in groups for c in range(group.num_columns)} == {"UNCOMPRESSED"}


def test_the_same_input_makes_the_same_digest_and_another_seed_another_order(cluster: str, tmp_path: Path) -> None:
    folder = write_coco(tmp_path / "in", rendered(24))
    one, again, other = (shards_of(folder, tmp_path / f"out{k}", seed=seed) for k, seed in enumerate((0, 0, 1)))
    assert one.manifest.digest == again.manifest.digest != other.manifest.digest
    assert [record.image_id for record in stored(one)] != [record.image_id for record in stored(other)]
    plain = shards_of(folder, tmp_path / "plain", shuffle=False)
    assert [record.image_id for record in stored(plain)] == list(range(1, 25))


def test_larger_images_are_made_smaller_with_their_boxes(cluster: str, tmp_path: Path) -> None:
    records = rendered(16)
    shards = shards_of(write_coco(tmp_path / "in", records), tmp_path / "out", longest_side=48, jpeg_quality=95)
    for found in stored(shards):
        before = records[found.image_id - 1]
        assert max(found.width, found.height) == 48
        assert Image.open(io.BytesIO(found.image)).size == (found.width, found.height)
        sx, sy = found.width / before.width, found.height / before.height
        np.testing.assert_allclose(found.boxes, before.boxes * [sx, sy, sx, sy], rtol=1e-5)
        np.testing.assert_allclose(found.areas, before.areas * sx * sy, rtol=1e-5)
        expected = Image.open(io.BytesIO(before.image)).resize((found.width, found.height), Image.Resampling.LANCZOS)
        error = np.subtract(
            *(np.asarray(image.convert("L"), float) for image in (Image.open(io.BytesIO(found.image)), expected))
        )
        assert np.abs(error).mean() < 3  # of JPEG at that quality


def test_yolo_fractions_become_pixels(cluster: str, tmp_path: Path) -> None:
    for name in ("images", "labels"):
        (tmp_path / name).mkdir()
    Image.new("RGB", (40, 20)).save(tmp_path / "images/a.png")
    (tmp_path / "labels/a.txt").write_text("0 0.5 0.5 0.25 0.5\n0 nan 0.5 0.1 0.1\n")
    (tmp_path / "data.yaml").write_text("train: images\nnames: [cat]")
    prepare_main(["yolo", str(tmp_path / "data.yaml"), "--split", "train", "--out", str(tmp_path / "out")])
    shards = load_shards(tmp_path / "out")
    (record,) = stored(shards)
    assert [(row.kind, row.reason, row.detail) for row in read_rejected(shards)] == [
        ("box", "degenerate box", "xyxy nan, 9, nan, 11")
    ]
    assert (record.width, record.height, record.file_name) == (40, 20, "images/a.png")
    np.testing.assert_allclose(record.boxes, [[15, 5, 25, 15]])
    np.testing.assert_allclose(record.areas, [100])


def test_the_command_prepares_synthetic_images_and_prints_a_summary(
    cluster: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["synthetic", "--images", "20", "--image-side", "64", "--split", "train", "--out", str(tmp_path)]
    prepare_main(command)
    manifest = load_shards(tmp_path).manifest
    assert manifest.options == PrepareOptions().model_dump()  # the command's defaults are those of the options
    assert f"20 images, {manifest.boxes} boxes of 8 classes" in capsys.readouterr().out
    assert [record.image for record in stored(load_shards(tmp_path))] != []


def test_a_recognised_folder_is_prepared_split_by_split(
    cluster: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = rendered(12)
    for split, part in (("train", records[:8]), ("valid", records[8:])):
        written = write_coco(tmp_path / split, part)
        for path in (written / "images").iterdir():
            path.rename(written / path.name)
        (written / "instances.json").rename(written / "_annotations.coco.json")
    prepare_main(["auto", str(tmp_path), "--out", str(tmp_path / "out")])
    assert "splits: train, val" in capsys.readouterr().out
    sets = [load_shards(tmp_path / "out" / split).manifest for split in ("train", "val")]
    assert [(manifest.split, manifest.images) for manifest in sets] == [("train", 8), ("val", 4)]
    with pytest.raises(SystemExit, match="--split test: the splits are train, val"):
        prepare_main(["auto", str(tmp_path), "--split", "test", "--out", str(tmp_path / "other")])


def test_a_share_is_split_off_into_a_set_of_its_own(cluster: str, tmp_path: Path) -> None:
    folder = write_coco(tmp_path / "in", rendered(24))
    command = ["coco", "--images", str(folder / "images"), "--annotations", str(folder / "instances.json")]
    command += ["--split", "train", "--split-off", "val=0.25", "--out", str(tmp_path / "out")]
    for _ in range(2):  # the second finds both finished
        prepare_main(command)
    train, val = (stored(load_shards(tmp_path / "out" / name)) for name in ("train", "val"))
    assert sorted(record.image_id for record in train + val) == list(range(1, 25))
    assert 3 <= len(val) <= 9


# What is refused


def broken_set(folder: Path) -> Path:
    """Twelve images: five that cannot be used, and four boxes that are none on another one."""
    write_coco(folder, rendered(12))
    path = folder / "instances.json"
    content = json.loads(path.read_text())
    files = {image["id"]: folder / "images" / image["file_name"] for image in content["images"]}
    files[1].unlink()
    files[2].write_bytes(files[2].read_bytes()[:-300])
    files[3].write_bytes(b"not an image")
    content["images"][3]["width"] += 1
    Image.new("L", (200, 100)).save(files[5], "PNG")
    content["images"][4] |= {"width": 200, "height": 100}
    boxes = [[5, 5, 0, 4], [5, 5, 4, -1], [5, 5, 1e-9, 4], [5000, 5, 4, 4]]
    content["annotations"] += [
        {"id": 900 + k, "image_id": 6, "category_id": 1, "bbox": box, "area": 1} for k, box in enumerate(boxes)
    ]
    path.write_text(json.dumps(content))
    return folder


def test_what_cannot_be_used_is_listed_and_the_rest_is_written(cluster: str, tmp_path: Path) -> None:
    records = rendered(12)
    shards = shards_of(broken_set(tmp_path / "in"), tmp_path / "out", max_pixels=15_000)
    rejected = {(row.image_id, row.kind, row.reason) for row in read_rejected(shards)}
    assert rejected == {
        (1, "image", "missing file"),
        (2, "image", "undecodable"),
        (3, "image", "undecodable"),
        (4, "image", "size mismatch"),
        (5, "image", "too many pixels"),
        (6, "box", "degenerate box"),
        (6, "box", "box outside the image"),
    }
    assert shards.manifest.rejected == len(read_rejected(shards)) == 9
    assert {row.file_name for row in read_rejected(shards)} == {f"{k:08d}.jpg" for k in range(6)}
    found = {record.image_id: record for record in stored(shards)}
    assert set(found) == set(range(6, 13))
    for number, record in found.items():
        assert_same(record, records[number - 1])


def test_strict_names_what_it_found_and_finishes_nothing(cluster: str, tmp_path: Path) -> None:
    folder = broken_set(tmp_path / "in")
    with pytest.raises(PrepareError, match=r"strict: 3 degenerate box.*rejected(?s:.*)00000000\.jpg: missing file: /"):
        shards_of(folder, tmp_path / "out", strict=True)
    assert not (tmp_path / "out/manifest.json").exists()
    assert shards_of(folder, tmp_path / "out").manifest.images == 8
    with pytest.raises(PrepareError, match="strict"):
        shards_of(folder, tmp_path / "out", strict=True)


def test_a_folder_without_its_images_is_an_error(cluster: str, tmp_path: Path) -> None:
    folder = write_coco(tmp_path / "in", rendered(3))
    (folder / "images").rename(folder / "elsewhere")
    with pytest.raises(PrepareError, match="none of 3 sampled images can be used; the first: missing file"):
        shards_of(folder, tmp_path / "out")


def jpeg(size: tuple[int, int], **options: Any) -> bytes:
    buffer = io.BytesIO()
    gradient = np.add.outer(np.arange(size[1]), np.arange(size[0])).astype(np.uint8)
    Image.fromarray(gradient).convert("RGB").save(buffer, "JPEG", quality=95, **options)
    return buffer.getvalue()


def check(data: bytes, size: tuple[int, int] | None, **options: Any) -> Any:
    settings = {"longest_side": None, "quality": 75, "max_pixels": 10_000, "verify": True} | options
    return checked_image(data, size, **settings)


def marked(size: tuple[int, int], mark: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = mark
    return jpeg(size, exif=exif)


@pytest.mark.parametrize(
    ("stored", "mark", "annotated", "notice"),
    [
        ((30, 20), 6, (20, 30), "exif-turned"),
        ((30, 20), 8, None, "exif-undecided"),
        ((30, 20), 3, (30, 20), "exif-undecided"),
        ((30, 20), 2, (30, 20), "exif-undecided"),
        ((30, 20), 4, None, "exif-undecided"),
        ((24, 24), 6, (24, 24), "exif-undecided"),
    ],
)
def test_an_image_annotated_upright_is_turned_upright(
    stored: tuple[int, int], mark: int, annotated: tuple[int, int] | None, notice: str
) -> None:
    lying = marked(stored, mark)
    image = check(lying, annotated)
    upright = Image.open(io.BytesIO(image.data))
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(lying)))
    assert upright.size == (image.width, image.height) == expected.size
    assert upright.getexif().get(0x0112, 1) == 1
    assert np.abs(np.asarray(upright, int) - np.asarray(expected, int)).max() < 8
    assert image.exif == notice


def test_an_image_annotated_in_the_stored_size_stays_and_is_noticed() -> None:
    lying = marked((30, 20), 6)
    image = check(lying, (30, 20))
    assert (image.data, image.exif) == (lying, "exif-kept")
    assert check(lying, (30, 20), longest_side=15).exif == "exif-kept"
    with pytest.raises(BadImageError, match=r"size mismatch: annotated as \(31, 20\)"):
        check(lying, (31, 20))


@pytest.mark.parametrize(("stored", "mark"), [((30, 20), 6), ((30, 20), 3), ((24, 24), 6)])
def test_the_mark_can_be_ignored(stored: tuple[int, int], mark: int) -> None:
    lying = marked(stored, mark)
    for annotated in (stored, None):
        image = check(lying, annotated, exif="ignore")
        assert (image.data, image.exif) == (lying, None)
    smaller = check(lying, stored, exif="ignore", longest_side=12)
    expected = Image.open(io.BytesIO(lying)).resize((smaller.width, smaller.height))
    assert np.abs(np.asarray(Image.open(io.BytesIO(smaller.data)), int) - np.asarray(expected, int)).mean() < 8


def test_marked_images_are_counted_printed_and_found_by_the_doctor(
    cluster: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes, marks = [(30, 20), (20, 30), (24, 24), (30, 20)], [6, 6, 6, 1]
    images = [{"id": k, "file_name": f"{k}.jpg", "width": w, "height": h} for k, (w, h) in enumerate(sizes, start=1)]
    (tmp_path / "images").mkdir()
    for image, mark in zip(images, marks, strict=True):
        size = (30, 20) if image["width"] != 24 else (24, 24)
        (tmp_path / "images" / image["file_name"]).write_bytes(marked(size, mark))
    content = {"images": images, "categories": [{"id": 1, "name": "cat"}], "annotations": []}
    (tmp_path / "a.json").write_text(json.dumps(content))
    command = ["coco", "--images", str(tmp_path / "images"), "--annotations", str(tmp_path / "a.json")]
    command += ["--split", "train", "--out", str(tmp_path / "out")]
    prepare_main(command)
    shards = load_shards(tmp_path / "out")
    counted = {notice.code: (notice.count, notice.example) for notice in shards.manifest.notices}
    assert counted == {"exif-kept": (1, "1.jpg"), "exif-turned": (1, "2.jpg"), "exif-undecided": (1, "3.jpg")}
    assert "warning: 1 image, such as 1.jpg: An image is marked as turned" in capsys.readouterr().out
    found = {finding.code: finding for finding in examine([shards]).findings}
    assert found["exif-kept"].severity == "warning"
    assert found["exif-kept"].count == found["exif-turned"].count == found["exif-undecided"].count == 1


@pytest.mark.parametrize("mode", ["CMYK", "L"])
def test_unusual_jpegs_stay_as_they_are(mode: str) -> None:
    buffer = io.BytesIO()
    Image.new(mode, (16, 8)).save(buffer, "JPEG")
    assert check(buffer.getvalue(), (16, 8)).data == buffer.getvalue()


def test_a_cut_off_file_is_found_only_by_decoding_it() -> None:
    whole = jpeg((64, 64))
    cut = whole[:-100]
    with pytest.raises(BadImageError, match="undecodable"):
        check(cut, (64, 64))
    assert check(cut, (64, 64), verify=False).data == cut


def test_pixels_are_counted_before_anything_is_decoded() -> None:
    with pytest.raises(BadImageError, match="too many pixels: 200 x 100 are more than 10000"):
        check(jpeg((200, 100))[:700], None)


# What survives a kill


def test_a_finished_set_is_left_alone(cluster: str, tmp_path: Path) -> None:
    folder = write_coco(tmp_path / "in", rendered(8))
    first = shards_of(folder, tmp_path / "out")
    written_at = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    said: list[str] = []
    assert shards_of(folder, tmp_path / "out", report=said.append).manifest == first.manifest
    assert said == [
        f"{tmp_path / 'out'} was prepared before: 8 images kept, not read again; delete the folder to read all of them"
    ]
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == written_at


def repaired(folder: Path, *numbers: int) -> None:
    """Write the files of these images of `broken_set` again, as they were."""
    for number in numbers:
        record = rendered(12)[number - 1]
        (folder / "images" / record.file_name).write_bytes(record.image)


def test_rejected_images_are_tried_again_and_the_old_set_stays_readable(cluster: str, tmp_path: Path) -> None:
    folder, out = broken_set(tmp_path / "in"), tmp_path / "out"
    first = shards_of(folder, out, max_pixels=15_000)
    old_rows = stored(first)
    contents = {path: path.read_bytes() for path in out.glob("shard-*.parquet")}
    repaired(folder, 1, 3)
    said: list[str] = []
    second = shards_of(folder, out, max_pixels=15_000, report=said.append)

    # The set has the repaired images besides the old ones; the old files are as they were.
    assert "7 images kept, not read again; 5 rejected images tried again" in said[0]
    assert said[1].startswith("2 images added as shard-00001.parquet; the digest is another")
    assert {path: path.read_bytes() for path in contents} == contents
    for before, after in zip(old_rows, stored(first), strict=True):
        assert_same(after, before)
    assert second.manifest.digest != first.manifest.digest
    assert second.manifest.shards[:1] == first.manifest.shards
    found = {record.image_id: record for record in stored(second)}
    assert set(found) == {1, 3, *range(6, 13)}
    for number in (1, 3):
        assert_same(found[number], rendered(12)[number - 1])
    assert {(row.image_id, row.reason) for row in read_rejected(second)} == {
        (2, "undecodable"),
        (4, "size mismatch"),
        (5, "too many pixels"),
        (6, "degenerate box"),
        (6, "box outside the image"),
    }
    assert second.manifest.rejected == len(read_rejected(second)) == 7
    assert not examine([second], decode=True).count("error")

    # The same repair makes the same set; without another repair nothing changes.
    again = shards_of(folder, out, max_pixels=15_000, report=said.append)
    assert (again.manifest.digest, said[-1]) == (
        second.manifest.digest,
        "none of them can be used; the set is as it was",
    )
    other = broken_set(tmp_path / "other")
    shards_of(other, tmp_path / "twin", max_pixels=15_000)
    repaired(other, 1, 3)
    assert shards_of(other, tmp_path / "twin", max_pixels=15_000).manifest.digest == second.manifest.digest


def test_a_retry_that_is_cut_short_goes_on(cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, out = broken_set(tmp_path / "in"), tmp_path / "out"
    first = shards_of(folder, out)
    repaired(folder, 1, 2, 3)
    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "_finish", lambda *_args, **_options: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            shards_of(folder, out)
    assert load_shards(out).manifest == first.manifest
    shutil.copytree(out / ".prepare", tmp_path / "left")
    second = shards_of(folder, out)
    assert second.manifest.images == first.manifest.images + 3
    assert not (out / ".prepare").exists()

    # Killed between the exchange and the removal of the work folder: that plan belongs to the former manifest.
    (tmp_path / "left").rename(out / ".prepare")
    assert shards_of(folder, out).manifest == second.manifest
    assert not (out / ".prepare").exists()


def test_a_damaged_plan_is_named(cluster: str, tmp_path: Path) -> None:
    folder, out = write_coco(tmp_path / "in", rendered(3)), tmp_path / "out"
    (out / ".prepare").mkdir(parents=True)
    (out / ".prepare/plan.json").write_text("{}")
    with pytest.raises(PrepareError, match=r"plan\.json: damaged .*delete .*\.prepare to begin again"):
        shards_of(folder, out)


def test_a_strict_preparation_is_finished_after_the_repair(cluster: str, tmp_path: Path) -> None:
    folder, out = write_coco(tmp_path / "in", rendered(6)), tmp_path / "out"
    (folder / "images/00000000.jpg").write_bytes(b"")
    with pytest.raises(PrepareError, match="strict: 1 undecodable"):
        shards_of(folder, out, strict=True)
    repaired(folder, 1)
    assert shards_of(folder, out, strict=True).manifest.images == 6


def test_a_set_of_a_version_without_an_option_says_the_way_out(cluster: str, tmp_path: Path) -> None:
    folder, out = write_coco(tmp_path / "in", rendered(3)), tmp_path / "out"
    shards_of(folder, out)
    content = json.loads((out / "manifest.json").read_text())
    del content["options"]["exif"]
    (out / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(PrepareError, match=r"by a version without exif.*read it as it is.*choose another --out"):
        shards_of(folder, out)


@pytest.mark.parametrize("finished", [True, False])
def test_a_different_set_in_the_same_folder_is_refused(cluster: str, tmp_path: Path, finished: bool) -> None:
    folder = broken_set(tmp_path / "in")
    if finished:
        shards_of(folder, tmp_path / "out")
    else:
        with pytest.raises(PrepareError, match="strict"):
            shards_of(folder, tmp_path / "out", strict=True)
    with pytest.raises(
        PrepareError, match=r"holds a different shard set: seed is 0 there and 1 now\. Choose another --out"
    ):
        shards_of(folder, tmp_path / "out", seed=1)
    with pytest.raises(PrepareError, match="split is 'train' there and 'val' now"):
        shards_of(folder, tmp_path / "out", split="val")
    (folder / "instances.json").write_text((folder / "instances.json").read_text() + " ")
    with pytest.raises(PrepareError, match="annotations_sha256 is"):
        shards_of(folder, tmp_path / "out")


def test_a_killed_prepare_goes_on_and_ends_in_the_same_manifest(cluster: str, tmp_path: Path) -> None:
    distinct = rendered(16)
    records = [
        ImageRecord(**{**vars(distinct[k % 16]), "image_id": k + 1, "file_name": f"{k}.jpg"}) for k in range(800)
    ]
    folder, out = write_coco(tmp_path / "in", records), tmp_path / "out"
    arguments = ["coco", "--images", str(folder / "images"), "--annotations", str(folder / "instances.json")]
    arguments += ["--split", "train", "--shard-mib", "0.1", "--out", str(out)]
    environment = environment_of_cluster()  # as in a submitted job
    process = subprocess.Popen([sys.executable, "-m", "jobs.prepare", *arguments], env=environment)
    deadline = time.monotonic() + 120
    while len(list(out.glob(".prepare/shard-*.json"))) < 3:
        assert process.poll() is None, "ended before it was killed"
        assert time.monotonic() < deadline, "wrote nothing"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (out / "manifest.json").exists()
    time.sleep(1)  # tasks of the dead driver end
    receipts = sorted(out.glob(".prepare/shard-*.json"))
    written_at = {path.name: path.stat().st_mtime_ns for path in out.glob("shard-*.parquet")}

    # What a kill in the middle of a write can leave: half a file under a temporary name, a shard without its receipt.
    (out / ".shard-00000.parquet.0123.tmp").write_bytes(b"half")
    receipts[0].unlink()
    lost = receipts[0].with_suffix(".parquet").name
    (out / lost).write_bytes(b"half")

    prepare_main(arguments)
    digest = load_shards(out).manifest.digest
    assert digest == shards_of(folder, tmp_path / "uninterrupted", shard_mib=0.1).manifest.digest
    kept = {path.with_suffix(".parquet").name for path in receipts[1:]}
    assert len(kept) > 1
    assert {name for name in kept if (out / name).stat().st_mtime_ns != written_at[name]} == set()
    names = {shard.file for shard in load_shards(out).manifest.shards}
    assert len(names) > len(kept) + 1  # it was killed before the end
    assert {path.name for path in out.iterdir()} == names | {"manifest.json", "rejected.parquet"}
