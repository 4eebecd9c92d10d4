"""Several shard sets in one training: classes joined by name, labels and repeats checked by hand, mistakes named at once."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.data.augment.settings import AugmentSettings
from pipeline.data.augment.stages import Stages
from pipeline.data.shards import repeat_factors
from pipeline.data.shards.manifest import ManifestError, ShardSet
from pipeline.data.shards.reader import locate_row_groups, read_training_rows
from pipeline.data.shards.records import ImageRecord, records_from_table
from pipeline.data.shards.set_lines import set_lines
from pipeline.data.shards.training_set import TrainingSet, join_sets, trains_on
from pipeline.data.sources.synthetic import CLASSES
from pipeline.data.stream.batch import Batch
from pipeline.data.stream.stream import training_plan, training_stream
from pipeline.data_settings import Data
from pipeline.training.context import open_training_set, resolve_data
from tests.data.test_classes import renamed
from tests.support.streams import SETTINGS, seen
from tests.support.synthetic_shards import synthetic_records, write_shards
from tests.support.teachers import teacher_boxes

STILL = AugmentSettings(zoom_out_probability=0, iou_crop_probability=0, min_box_size=0)
PLAIN = replace(SETTINGS, augment=STILL, decode_in="inline", stages=Stages(0, 9, 9))
OTHER_NAMES = ["Vehicle", *CLASSES[1:7], "zebra"]  # names of the second set: labels 0 and 7 are called otherwise


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sets")


@pytest.fixture(scope="module")
def records() -> tuple[list[ImageRecord], list[ImageRecord]]:
    return synthetic_records(24), [replace(r, image_id=r.image_id + 1000) for r in synthetic_records(40, seed=1)]


@pytest.fixture(scope="module")
def sets(folder: Path, records: tuple[list[ImageRecord], list[ImageRecord]]) -> tuple[ShardSet, ShardSet]:
    first, second = records
    return write_shards(folder / "first", first), renamed(write_shards(folder / "second", second), OTHER_NAMES)


def joined(sets: Sequence[ShardSet], **settings: Any) -> TrainingSet:
    values = {"weights": [1.0] * len(sets), "renames": [{}] * len(sets), **settings}
    return join_sets(sets, **values)


def batches_of(data: ShardSet | TrainingSet, stop: int, **stream: Any) -> list[Batch]:
    return list(training_stream(data, PLAIN, start_step=stream.pop("start", 0), stop_step=stop, **stream))


# Classes


def test_classes_are_joined_by_name_in_the_order_of_the_sets(sets: tuple[ShardSet, ShardSet]) -> None:
    train = joined(sets, renames=[{}, {"Vehicle": CLASSES[0]}])
    assert train.names == [*CLASSES, "zebra"]
    assert [each.shards.mapped_labels for each in train.sets] == [tuple(range(8)), (*range(7), 8)]
    # Each class keeps the id of the first set that has it: 0..7 there, and zebra is 17 in the second.
    assert [category.original_id for category in train.categories] == [*range(8), 17]
    first, second = (each.manifest.statistics.class_counts for each in sets)
    assert train.statistics.class_counts == (
        *(a + b for a, b in zip(first[:7], second[:7], strict=True)),
        first[7],
        second[7],
    )
    assert train.images == 64
    assert train.boxes == sum(each.manifest.boxes for each in sets)


def test_a_set_with_the_same_classes_is_left_as_it_is(sets: tuple[ShardSet, ShardSet], folder: Path) -> None:
    same = write_shards(folder / "same", synthetic_records(8, seed=9))
    train = joined([sets[0], same])
    assert [each.shards for each in train.sets] == [sets[0], same]
    assert joined([sets[1]]).sets[0].shards is sets[1]


def test_an_id_that_another_class_has_taken_is_not_given_twice(sets: tuple[ShardSet, ShardSet], folder: Path) -> None:
    clashing = renamed(write_shards(folder / "clashing", synthetic_records(8)), ["a", *CLASSES[1:]])  # ids 10 to 17
    train = joined([sets[1], clashing])
    assert train.names == [*OTHER_NAMES, "a", CLASSES[7]]
    assert [category.original_id for category in train.categories] == [*range(10, 18), 18, 19]


def test_joined_labels_reach_the_batches(
    sets: tuple[ShardSet, ShardSet], records: tuple[list[ImageRecord], list[ImageRecord]]
) -> None:
    """By hand: label 0 of the second set is that of the first, and its label 7 becomes 8."""
    train = joined(sets, renames=[{}, {"Vehicle": CLASSES[0]}])
    expected = {record.image_id: sorted(record.labels[~record.crowd].tolist()) for record in records[0]}
    for record in records[1]:
        labels = record.labels[~record.crowd]
        expected[record.image_id] = sorted(np.where(labels == 7, 8, labels).tolist())
    found: dict[int, list[int]] = {}
    for batch in batches_of(train, 8):
        for image_id, target in zip(batch.image_id.tolist(), batch.targets(), strict=True):
            found[image_id] = sorted(target["labels"].tolist())
    assert len(found) == 64
    assert found == expected


def test_two_classes_become_one_where_both_are_named(sets: tuple[ShardSet, ShardSet]) -> None:
    names = {CLASSES[2]: "thing", CLASSES[5]: "thing"}
    train = joined([sets[0]], renames=[names])
    assert train.names == [*CLASSES[:2], "thing", *CLASSES[3:5], *CLASSES[6:]]
    assert train.sets[0].shards.mapped_labels == (0, 1, 2, 3, 4, 2, 5, 6)
    counts = sets[0].manifest.statistics.class_counts
    assert train.statistics.class_counts[2] == counts[2] + counts[5]
    swapped = joined([sets[0]], renames=[{CLASSES[0]: CLASSES[1], CLASSES[1]: CLASSES[0]}])
    assert swapped.names[:2] == [CLASSES[1], CLASSES[0]]


def test_every_wrong_name_is_told_at_once(sets: tuple[ShardSet, ShardSet], folder: Path) -> None:
    twins = renamed(write_shards(folder / "twins", synthetic_records(8)), ["cat", "cat", *CLASSES[2:]])
    with pytest.raises(ManifestError) as raised:
        joined([*sets, twins], renames=[{"sqare": "box", CLASSES[0]: CLASSES[1]}, {"Vehicle": "zebra"}, {}])
    text = str(raised.value)
    for part in (
        f"{sets[0].uri}: classes renames 'sqare', and it has no such class; did you mean square",
        f"{CLASSES[0]} would become {CLASSES[1]}, and it has a class {CLASSES[1]} already: choose another name, or write",
        f"{sets[1].uri}: Vehicle would become zebra",
        f"{twins.uri}: cat names several classes",
    ):
        assert part in text, text


def test_the_table_says_what_becomes_of_each_class_and_what_is_a_trap(sets: tuple[ShardSet, ShardSet]) -> None:
    train = joined(sets, weights=[2, 0.5], renames=[{}, {"Vehicle": CLASSES[0]}])
    first, second = (each.manifest.statistics.class_counts for each in sets)
    lines = set_lines(train)
    assert lines[0] == "2 sets, 68 images in an epoch"
    assert lines[1].startswith(f"  1. {sets[0].uri}: weight 2, 24 images, 48 in an epoch (70.6%)")
    assert lines[3] == "6 classes of the same name in all sets"
    cells = [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in lines[4:8]]
    assert cells == [
        ["class", "set 1", "set 2"],
        [CLASSES[0], f"{CLASSES[0]} ({first[0]} boxes)", f"Vehicle ({second[0]} boxes)"],
        [CLASSES[7], f"{CLASSES[7]} ({first[7]} boxes)", "not annotated"],
        ["zebra", "not annotated", f"zebra ({second[7]} boxes)"],
    ]
    assert lines[8].startswith(
        f"WARNING: set 1 ({sets[0].uri}) does not annotate zebra: such objects in its images are learned as background"
    )
    assert lines[9].startswith(f"WARNING: set 2 ({sets[1].uri}) does not annotate {CLASSES[7]}")
    alike = set_lines(joined(sets, renames=[{CLASSES[0]: "vehicle"}, {}]))
    assert any("WARNING: 'vehicle' and 'Vehicle' differ by case or blanks alone" in line for line in alike)
    assert set_lines(TrainingSet.alone(sets[0])) == []


# Order and weights


def test_a_list_of_one_set_is_that_set(sets: tuple[ShardSet, ShardSet]) -> None:
    """The same plan and, batch by batch, the same pixels; also where the list has its default weight spelled out."""
    uri = sets[0].uri
    train = open_training_set(Data.model_validate({"train": [{"shards": uri, "weight": 1}]}))
    assert train.is_plain
    assert training_plan(train, PLAIN).mixture is None
    assert train.digests == {"train": sets[0].manifest.digest}
    assert list(map(seen, batches_of(train, 7))) == list(map(seen, batches_of(sets[0], 7)))


@pytest.mark.parametrize(
    ("window_rows", "recorded"),
    [(32, [[82, 148], [141, 140], [128, 123], [75, 76]]), (400, [[20, 91], [66, 119], [105, 110], [36, 78]])],
)
def test_the_order_of_one_set_is_the_one_of_before_there_were_several(
    tmp_path: Path, window_rows: int, recorded: list[list[int]]
) -> None:
    """Images of step 20, in the second epoch of 150 drawn images, recorded before the plan knew several sets."""
    shards = write_shards(tmp_path / "train", synthetic_records(150))
    stream = training_stream(shards, replace(PLAIN, window_rows=window_rows), start_step=20, stop_step=21)
    assert [batch.image_id.tolist() for batch in stream] == recorded


def test_weights_count_images_exactly_and_copies_are_augmented_apart(sets: tuple[ShardSet, ShardSet]) -> None:
    train = joined(sets, weights=[2.5, 0.5])
    assert train.images_in_epoch == 60 + 20
    distorted = replace(PLAIN, augment=AugmentSettings())
    seen_in_epoch: list[Counter[int]] = []
    for epoch in range(2):
        counts: Counter[int] = Counter()
        pixels: dict[int, set[bytes]] = {}
        for batch in training_stream(train, distorted, start_step=10 * epoch, stop_step=10 * (epoch + 1)):
            for image_id, image, colours in zip(batch.image_id.tolist(), batch.images, batch.photometric, strict=True):
                counts[image_id] += 1
                pixels.setdefault(image_id, set()).add(image.numpy().tobytes() + colours.numpy().tobytes())
        assert sum(n for image_id, n in counts.items() if image_id < 1000) == 60
        assert sum(n for image_id, n in counts.items() if image_id >= 1000) == 20
        assert set(counts.values()) == {1, 2, 3}
        assert all(len(pixels[image_id]) == count for image_id, count in counts.items())
        seen_in_epoch.append(counts)
    # Over two epochs of weight 0.5 every image was there once; of weight 2.5, five times.
    both = seen_in_epoch[0] + seen_in_epoch[1]
    assert {image_id for image_id in both if image_id > 1000 and both[image_id] == 1} == set(range(1001, 1041))
    assert {image_id for image_id in both if both[image_id] == 5} == set(range(1, 25))


@pytest.mark.parametrize("mosaic", [0.0, 0.5])
def test_samples_of_several_sets_are_the_same_for_any_workers_and_after_a_resume(
    sets: tuple[ShardSet, ShardSet], mosaic: float
) -> None:
    train = joined(sets, weights=[2.5, 0.5], renames=[{}, {"Vehicle": CLASSES[0]}], repeat_threshold=0.4)
    settings = replace(PLAIN, augment=AugmentSettings(mosaic_probability=mosaic, copy_paste_probability=mosaic))
    epoch = training_plan(train, settings).steps_per_epoch
    assert train.images_in_epoch > 80

    def stream(start: int, stop: int, rank: int = 0, workers: int = 1) -> list[Any]:
        batches = training_stream(train, settings, start_step=start, stop_step=stop, rank=rank, world_size=workers)
        return [(*seen(batch), batch.labels.tolist()) for batch in batches]

    alone = stream(epoch - 3, epoch + 4)
    assert len(alone) == 28
    for rank in range(2):
        assert stream(epoch - 3, epoch + 4, rank, 2) == [batch for batch in alone if batch[1] % 2 == rank]
    assert stream(epoch + 1, epoch + 4) == [batch for batch in alone if batch[0] > epoch]


def test_a_weight_that_leaves_nothing_is_refused(sets: tuple[ShardSet, ShardSet]) -> None:
    with pytest.raises(
        ManifestError, match=r"weight 0.01 of its 24 images is no image in an epoch: give at least 0.042"
    ):
        joined(sets, weights=[0.01, 1])


# Repeat factors


def test_repeat_factors_are_those_of_a_plain_loop(
    sets: tuple[ShardSet, ShardSet], records: tuple[list[ImageRecord], list[ImageRecord]]
) -> None:
    """LVIS: max(1, sqrt(t / f)) for a class in a share f of the images, and the largest of an image's classes."""
    train = joined(sets, weights=[2, 1], renames=[{}, {"Vehicle": CLASSES[0]}], repeat_threshold=0.35)
    assert train.repeats is not None
    classes = [
        [{int(label) for label in record.labels[~record.crowd]} for record in records[0]],
        [{8 if label == 7 else int(label) for label in record.labels[~record.crowd]} for record in records[1]],
    ]
    factors = []
    for label in range(9):
        images = 2 * sum(label in each for each in classes[0]) + sum(label in each for each in classes[1])
        factors.append(max(1.0, (0.35 / (images / (2 * 24 + 40))) ** 0.5))
    assert train.repeats.factors == pytest.approx(factors)
    assert train.repeats.images == tuple(
        sum(label in each for of_set in classes for each in of_set) for label in range(9)
    )
    assert max(factors) > 1
    assert min(factors) == 1
    for each, of_images in zip(train.sets, classes, strict=True):
        expected = np.array([max([1.0, *(factors[label] for label in own)]) for own in of_images])
        assert each.copies is not None
        shares = np.diff(each.copies.more, prepend=0)
        lowered = np.floor((expected % 1).sum()) / (expected % 1).sum()  # to a whole number of copies
        np.testing.assert_allclose(each.copies.least + shares, np.floor(expected) + (expected % 1) * lowered)
        assert each.images_in_epoch == each.weight * (np.floor(expected).sum() + np.floor((expected % 1).sum()))
    assert any("repeat factors" in line for line in set_lines(train))


def test_without_rare_classes_nothing_is_repeated(sets: tuple[ShardSet, ShardSet]) -> None:
    train = joined([sets[0]], repeat_threshold=0.001)
    assert train.is_plain
    assert (
        set_lines(train)[2] == "repeat factors: no class is in fewer than 0.001 of the images, so nothing is repeated"
    )


# Identity


def test_digests_tell_sets_weights_and_names_apart(sets: tuple[ShardSet, ShardSet]) -> None:
    one = joined(sets)
    assert set(one.digests) == {"train", "data.train.1", "data.train.2"}
    assert one.digests["data.train.2"] == sets[1].manifest.digest
    others = [joined(sets, weights=[1, 2]), joined(sets, renames=[{}, {"zebra": "z"}]), joined(sets[::-1])]
    assert len({each.digests["train"] for each in (one, *others)}) == 4
    assert all(trains_on(one.digests, each.manifest.digest) for each in sets)
    assert not trains_on(TrainingSet.alone(sets[0]).digests, sets[1].manifest.digest)


def test_every_set_that_cannot_be_opened_is_named(sets: tuple[ShardSet, ShardSet], tmp_path: Path) -> None:
    data = Data.model_validate(
        {"train": [{"shards": place} for place in (str(tmp_path / "x"), sets[0].uri, str(tmp_path / "y"))]}
    )
    with pytest.raises(ManifestError) as raised:
        open_training_set(data)
    assert all(f"{tmp_path / name}/manifest.json: there is none" in str(raised.value) for name in "xy")


def test_validation_images_are_mapped_to_the_joined_classes(sets: tuple[ShardSet, ShardSet]) -> None:
    train = [{"shards": sets[0].uri}, {"shards": sets[1].uri, "classes": {"Vehicle": CLASSES[0]}}]
    data = resolve_data(Data.model_validate({"train": train, "val": sets[0].uri}))
    assert data.val is not None
    assert data.val.mapped_labels == tuple(range(8))
    assert "val lacks zebra: not measured" in data.lines()
    assert set(data.digests()) == {"train", "data.train.1", "data.train.2", "val"}


def test_labels_of_a_teacher_are_renamed_with_those_of_its_set(sets: tuple[ShardSet, ShardSet], tmp_path: Path) -> None:
    boxes = teacher_boxes(sets[0].uri, tmp_path / "teacher")
    mapped = joined([sets[0]], renames=[{CLASSES[2]: "thing", CLASSES[5]: "thing"}]).sets[0].shards
    source = locate_row_groups(replace(mapped, teacher_boxes=boxes))
    found = 0
    for table in read_training_rows(source, range(len(source.rows))).values():
        for record in records_from_table(table):
            if record.teacher is not None:
                found += len(record.teacher.labels)
                learned = record.labels[~record.crowd]
                assert sorted(record.teacher.labels.tolist()) == sorted(learned.tolist())
    assert found > 20


def test_an_image_that_would_be_repeated_without_end_is_refused(
    sets: tuple[ShardSet, ShardSet], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Threshold 1, and Vehicle in a ten-thousandth of the images, as one set weighs 5,000 times the other."""
    monkeypatch.setattr(repeat_factors, "MOST_COPIES", 50)
    with pytest.raises(
        ManifestError, match=r"repeat_factor_threshold \(1\): images with Vehicle would be repeated [\d,]+ times"
    ):
        joined(sets, weights=[100, 0.02], repeat_threshold=1)
