"""Labels of one shard set in the order of another: mapped by name, or refused."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipeline.data.shards.classes import class_lines, with_classes_of
from pipeline.data.shards.manifest import MANIFEST_NAME, ManifestError, ShardSet, load_shards
from pipeline.data.shards.reader import ShardError, locate_row_groups, read_annotations, read_row_groups
from pipeline.data.shards.records import ImageRecord, records_from_table
from pipeline.data.sources.synthetic import CLASSES
from pipeline.data.stream.stream import evaluation_stream
from pipeline.data_settings import Data
from pipeline.evaluation.ground_truth import read_ground_truth
from pipeline.training.context import resolve_data
from tests.support.synthetic_shards import stored_rows, synthetic_records, write_shards

ORDER = (5, 2, 7, 0, 1, 6, 3, 4)  # classes of the reordered set, by their labels in CLASSES


def reordered(folder: Path, records: Sequence[ImageRecord], names: Sequence[str] | None = None) -> ShardSet:
    """The same objects; class CLASSES[k] has label ORDER.index(k), as from an exporter that numbers by appearance."""
    labels = np.argsort(ORDER)
    shards = write_shards(folder, [replace(r, labels=labels[r.labels].astype(np.int32)) for r in records])
    return renamed(shards, names or [CLASSES[label] for label in ORDER])


def renamed(shards: ShardSet, names: Sequence[str]) -> ShardSet:
    path = Path(shards.uri) / MANIFEST_NAME
    content = json.loads(path.read_text())
    counts = content["statistics"]["class_counts"]
    content["statistics"]["class_counts"] = counts + [0] * (len(names) - len(counts))
    content["categories"] = [{"label": k, "original_id": 10 + k, "name": name} for k, name in enumerate(names)]
    path.write_text(json.dumps(content))
    return load_shards(shards.uri)


def test_labels_in_another_order_are_mapped_by_name_wherever_they_are_read(tmp_path: Path) -> None:
    records = synthetic_records(24)
    train, val = write_shards(tmp_path / "train", records), reordered(tmp_path / "val", records)
    assert stored_rows(val)["labels"] != stored_rows(train)["labels"]
    data = resolve_data(Data(train=train.uri, val=val.uri))
    assert data.val is not None
    assert data.digests() == {"train": train.manifest.digest, "val": val.manifest.digest}

    expected = [record.labels.tolist() for record in records]
    assert read_annotations(data.val)["labels"].to_pylist() == expected
    (rows, *_) = read_row_groups(locate_row_groups(data.val), [0]).values()
    assert [record.labels.tolist() for record in records_from_table(rows)] == expected[: len(rows)]
    truth, before = read_ground_truth(data.val), read_ground_truth(train)
    assert truth.names == tuple(CLASSES)
    np.testing.assert_array_equal(truth.label, before.label)
    np.testing.assert_array_equal(truth.boxes_of_class, before.boxes_of_class)
    # A class keeps the id that its own source gave it.
    assert [category.original_id for category in truth.categories] == [10 + ORDER.index(k) for k in range(8)]
    streams = [
        evaluation_stream(shards, canvas=(64, 64), micro_batch_size=4, decode_in="inline")
        for shards in (data.val, train)
    ]
    for one, other in zip(*streams, strict=True):
        for mine, theirs in zip(one.targets(), other.targets(), strict=True):
            assert mine["labels"].tolist() == theirs["labels"].tolist()
    assert data.lines() == ["val: its classes are in another order, or fewer; labels are mapped by name"]


def test_equal_classes_are_left_alone(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "train", synthetic_records(8))
    assert with_classes_of(shards, list(CLASSES), "train") is shards
    assert class_lines(shards, "val") == []


def test_a_class_that_only_one_of_both_has_is_named(tmp_path: Path) -> None:
    records = [replace(r, crowd=np.zeros_like(r.crowd)) for r in synthetic_records(24)]
    val = reordered(tmp_path / "val", records, [*(CLASSES[label] for label in ORDER), "ghost"])
    names = [*CLASSES, "unicorn"]
    mapped = with_classes_of(val, names, "train")
    assert read_annotations(mapped)["labels"].to_pylist() == [record.labels.tolist() for record in records]
    assert len({category.original_id for category in mapped.categories}) == len(names)
    assert class_lines(mapped, "val")[1:] == [
        "val alone has ghost, without boxes: left out",
        "val lacks unicorn: not measured",
    ]

    count = val.manifest.statistics.class_counts[ORDER.index(3)]
    assert count > 0
    without = [name for name in CLASSES if name != CLASSES[3]]
    with pytest.raises(
        ManifestError, match=rf"here alone: {CLASSES[3]} \({count} boxes\).*only of /t: none\): prepare"
    ):
        with_classes_of(val, without, "/t")


def test_a_crowd_region_of_an_unknown_class_is_no_reason_to_drop_it(tmp_path: Path) -> None:
    records = synthetic_records(24)
    assert any(record.crowd.any() for record in records)
    val = reordered(tmp_path / "val", records, [*(CLASSES[label] for label in ORDER), "ghost"])
    with pytest.raises(ManifestError, match="here alone: ghost"):
        with_classes_of(val, list(CLASSES), "train")


def test_names_that_do_not_tell_classes_apart_are_refused(tmp_path: Path) -> None:
    names = ["cat", "cat", *CLASSES[2:]]
    val = renamed(write_shards(tmp_path / "val", synthetic_records(8)), names)
    assert with_classes_of(val, names, "train") is val
    with pytest.raises(ManifestError, match="cat names several classes"):
        with_classes_of(val, [*CLASSES[2:], "cat"], "train")
    with pytest.raises(ManifestError, match="cat names several classes"):
        with_classes_of(val, [*names, "cow"], "train")


def test_no_name_in_common_is_refused_even_without_boxes(tmp_path: Path) -> None:
    records = [replace(r, crowd=np.zeros_like(r.crowd)) for r in synthetic_records(2)]
    val = write_shards(tmp_path / "val", records)
    with pytest.raises(ManifestError, match="are not the 2 of train"):
        with_classes_of(val, ["Cat", "Dog"], "train")


def test_a_label_that_no_class_has_is_an_error_of_the_shard(tmp_path: Path) -> None:
    val = write_shards(tmp_path / "val", synthetic_records(8))
    mapped = replace(val, mapped_labels=(0, 1), mapped_categories=val.manifest.categories[:2])
    with pytest.raises(ShardError, match=r"a label is not in 0\.\.1: `dfine doctor` names its image"):
        read_annotations(mapped)
