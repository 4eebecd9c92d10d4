"""Records, storage, statistics and the manifest: what a shard set is made of."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pipeline import storage
from pipeline.data.shards.manifest import Manifest, ManifestError, load_shards
from pipeline.data.shards.records import ImageRecord, records_from_table, table_from_records
from pipeline.data.shards.set_statistics import add_up, count_rows
from pipeline.data.sources.synthetic import CLASSES, synthetic_image
from tests.support.s3_server import s3_bucket

on_busy_machines = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=50)


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    with s3_bucket() as uri:
        yield uri


@pytest.fixture(params=["disk", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path, bucket: str) -> str:
    return str(tmp_path) if request.param == "disk" else f"{bucket}/{tmp_path.name}"


@st.composite
def records(draw: st.DrawFn) -> ImageRecord:
    count = draw(st.integers(0, 4))
    return ImageRecord(
        image_id=draw(st.integers(-(2**63), 2**63 - 1)),
        file_name=draw(st.text("ab/. ö日", max_size=6)),
        width=draw(st.integers(1, 10_000)),
        height=draw(st.integers(1, 10_000)),
        image=draw(st.binary(max_size=20)),
        boxes=draw(hnp.arrays(np.float32, (count, 4), elements=st.floats(-1e4, 1e4, width=32))),
        labels=draw(hnp.arrays(np.int32, count, elements=st.integers(0, 7))),
        areas=draw(hnp.arrays(np.float32, count, elements=st.floats(0, 3e4, width=32))),
        crowd=draw(hnp.arrays(np.bool_, count)),
    )


@on_busy_machines
@given(st.lists(records(), max_size=4))
def test_records_survive_the_table(written: list[ImageRecord]) -> None:
    read = list(records_from_table(table_from_records(written)))
    assert len(read) == len(written)
    for one, other in zip(written, read, strict=True):
        for name, value in vars(one).items():
            np.testing.assert_array_equal(value, getattr(other, name), strict=isinstance(value, np.ndarray))


def test_a_record_with_arrays_of_different_lengths_is_refused() -> None:
    good = synthetic_image(0, longest_side=32)
    with pytest.raises(ValueError, match=r"00000000\.jpg: boxes, labels, areas and crowd have shapes"):
        ImageRecord(**{**vars(good), "labels": np.append(good.labels, np.int32(0))})


@on_busy_machines
@given(st.lists(records(), min_size=1, max_size=8), st.data())
def test_statistics_equal_a_plain_count_and_add_up_over_parts(written: list[ImageRecord], data: st.DataObject) -> None:
    cut = data.draw(st.integers(0, len(written)))
    parts = [table_from_records(part) for part in (written[:cut], written[cut:]) if part]
    found = add_up([count_rows(part, 8) for part in parts])
    assert found == count_rows(table_from_records(written), 8)

    trained = [[k for k in range(len(one.labels)) if not one.crowd[k]] for one in written]
    areas = [one.areas[k] for one, kept in zip(written, trained, strict=True) for k in kept]
    labels = [one.labels[k] for one, kept in zip(written, trained, strict=True) for k in kept]
    assert found.box_sizes.small == sum(area < 32**2 for area in areas)
    assert found.box_sizes.large == sum(area >= 96**2 for area in areas)
    assert found.box_sizes.medium == len(areas) - found.box_sizes.small - found.box_sizes.large
    assert found.class_counts == tuple(labels.count(label) for label in range(8))
    assert found.crowd_boxes == sum(int(one.crowd.sum()) for one in written)
    assert found.images_without_boxes == sum(not kept for kept in trained)
    assert found.boxes_per_image.mean == pytest.approx(len(areas) / len(written))
    assert found.boxes_per_image.max == max(map(len, trained)) == found.most_crowded.boxes
    assert (
        found.most_crowded.image_id == written[[len(kept) for kept in trained].index(found.most_crowded.boxes)].image_id
    )
    assert sum(found.boxes_per_image.histogram) == len(written)
    assert (found.width.min, found.width.max) == (min(one.width for one in written), max(one.width for one in written))


def test_a_file_appears_whole_or_not_at_all(folder: str) -> None:
    uri = storage.join(folder, "file")
    storage.write_atomic(uri, b"old")

    def stop_halfway() -> None:
        with storage.open_atomic(uri) as file:
            file.write(b"half of the n")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        stop_halfway()
    assert storage.read_bytes(uri) == b"old"
    storage.write_atomic(uri, b"new")
    assert storage.read_bytes(uri) == b"new"
    assert storage.sizes(folder) == {"file": 3}


@pytest.mark.parametrize("folder", ["s3://bucket/run", "s3://bucket/run/", Path("/data/run"), "relative", "/"])
def test_names_are_joined_to_paths_and_uris_with_one_slash_each(folder: str | Path) -> None:
    base = str(folder).rstrip("/")
    assert storage.join(folder, "a") == f"{base}/a"
    assert storage.join(folder, "a", "b", "c") == f"{base}/a/b/c"
    assert storage.join(storage.join(folder, "a"), "b") == storage.join(folder, "a", "b")


def test_storage_lists_what_exists(folder: str) -> None:
    assert storage.sizes(storage.join(folder, "nothing")) == {}
    assert not storage.exists(storage.join(folder, "nothing"))
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(storage.join(folder, "nothing"))
    storage.write_atomic(storage.join(folder, "a/b"), b"12")
    storage.write_atomic(storage.join(folder, "a/.b.0123.tmp"), b"12")
    storage.remove_temporaries(storage.join(folder, "a"))
    assert storage.sizes(storage.join(folder, "a")) == {"b": 2}
    storage.remove_folder(storage.join(folder, "a"))
    assert not storage.exists(storage.join(folder, "a/b"))


def test_a_file_uri_is_a_path(tmp_path: Path) -> None:
    (tmp_path / "with blank").write_bytes(b"1")
    assert storage.read_bytes(f"file://{tmp_path}/with%20blank") == b"1"


@pytest.mark.parametrize("uri", ["ftp://host/x", "s3://", "gs:///key"])
def test_a_uri_that_means_nothing_is_refused(uri: str) -> None:
    with pytest.raises(storage.StorageError, match=r"unknown scheme|names no bucket"):
        storage.resolve(uri)


def manifest_content() -> dict[str, Any]:
    table = table_from_records([synthetic_image(index, longest_side=32) for index in range(3)])
    statistics = count_rows(table, len(CLASSES))
    return {
        "format_version": 1,
        "split": "train",
        "categories": [{"label": k, "original_id": k + 1, "name": name} for k, name in enumerate(CLASSES)],
        "shards": [{"file": "shard-00000.parquet", "rows": 3, "bytes": 10, "sha256": "00", "row_groups": [2, 1]}],
        "images": 3,
        "boxes": sum(statistics.class_counts) + statistics.crowd_boxes,
        "rejected": 0,
        "statistics": statistics.model_dump(mode="json"),
        "source": {"kind": "synthetic"},
        "options": {"seed": 0},
    }


def test_the_digest_is_the_hash_of_canonical_json_and_knows_the_shards() -> None:
    content = manifest_content()
    manifest = Manifest.model_validate(content)
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    assert manifest.digest == hashlib.sha256(canonical.encode()).hexdigest()
    content["shards"][0]["sha256"] = "01"
    assert Manifest.model_validate(content).digest != manifest.digest


def test_notices_are_no_part_of_the_identity_and_older_manifests_have_none() -> None:
    older = Manifest.model_validate(manifest_content())
    assert older.notices == ()
    notice = {"code": "exif-kept", "count": 2, "example": "a.jpg"}
    newer = Manifest.model_validate(manifest_content() | {"notices": [notice]})
    assert newer.digest == older.digest
    canonical = json.dumps(manifest_content(), sort_keys=True, separators=(",", ":"))
    assert older.digest == hashlib.sha256(canonical.encode()).hexdigest()


@pytest.mark.parametrize("ending", ["", "/", "/manifest.json"])
def test_shards_are_found_by_folder_or_manifest(tmp_path: Path, ending: str) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps(manifest_content()))
    shards = load_shards(f"{tmp_path}{ending}")
    assert shards.uri == str(tmp_path)
    assert shards.shard_uri(0) == str(tmp_path / "shard-00000.parquet")


def test_shards_are_found_in_object_storage(bucket: str) -> None:
    storage.write_atomic(f"{bucket}/set/manifest.json", json.dumps(manifest_content()).encode())
    assert load_shards(f"{bucket}/set").shard_uri(0) == f"{bucket}/set/shard-00000.parquet"


def changed(**changes: Any) -> str:
    return json.dumps(manifest_content() | changes)


def with_file(name: str) -> str:
    content = manifest_content()
    content["shards"][0]["file"] = name
    return json.dumps(content)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[]", "format_version is None"),
        (changed(format_version=2), "format_version is 2, this version reads 1"),
        (changed(images=4), "images is 4, the shards hold 3"),
        (changed(colour="red"), "colour"),
        (changed(categories=[{"label": 1, "original_id": 1, "name": "x"}]), "expected 0..0"),
        (with_file("../shard"), "not a plain file name"),
        (with_file("/etc/passwd"), "not a plain file name"),
        (with_file(".."), "not a plain file name"),
    ],
)
def test_a_wrong_manifest_is_named_and_explained(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(ManifestError, match=message) as error:
        load_shards(str(tmp_path))
    assert str(tmp_path / "manifest.json") in str(error.value)


def test_a_missing_manifest_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"there is none; `dfine prepare"):
        load_shards(str(tmp_path))
