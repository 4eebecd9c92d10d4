"""Splitting a share off: by seed, in whole groups of near-duplicates."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.data.prepare.split_off import SplitOff, SplitOffError, choose, gradient_hash, near_duplicates, split_off
from pipeline.data.shards.manifest import Category
from pipeline.data.shards.records import Rejection
from pipeline.data.sources.index import AnnotationIndex, BoxEntry, DatasetSource, ImageEntry


def photograph(seed: int) -> np.ndarray:
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((160, 120), Image.Resampling.BICUBIC))


def entries(folder: Path, count: int, copies: int) -> list[ImageEntry]:
    """Images in groups: each with copies that are brighter, shifted by a pixel, or compressed more."""
    found = []
    for group in range(count):
        for copy in range(copies):
            pixels = np.roll(photograph(group), copy % 2, axis=1).astype(int) + 6 * copy
            path = folder / f"{group}-{copy}.jpg"
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=90 - 20 * (copy % 3))
            found.append(ImageEntry(len(found) + 1, str(path), path.name, 160, 120))
    return found


def source(images: list[ImageEntry]) -> DatasetSource:
    def fill(index: AnnotationIndex) -> tuple[Category, ...]:
        index.add_images(images)
        index.add_boxes(BoxEntry(entry.image_id, 0, 0, 20, 20, 0, 400, False) for entry in images)
        for entry in images:
            index.reject(Rejection(entry.image_id, None, "box", "malformed box", "x"))
        return (Category(label=0, original_id=1, name="cat"),)

    return DatasetSource({"kind": "test"}, fill)


def filled(part: DatasetSource) -> dict[int, int]:
    """Number of boxes by image id; every image has its one rejection."""
    index = AnnotationIndex()
    part.fill(index)
    index.finish()
    found = {entry.image_id: len(boxes) for entry, boxes in index.ordered()}
    assert sorted(row.image_id or 0 for row in index.rejected()) == sorted(found)
    return found


def test_near_duplicates_are_found_and_others_are_not(tmp_path: Path) -> None:
    images = entries(tmp_path, 40, 3)
    groups = near_duplicates(images)
    assert sorted(map(sorted, groups)) == [[3 * k + 1, 3 * k + 2, 3 * k + 3] for k in range(40)]


def test_images_that_cannot_be_read_are_alone(tmp_path: Path) -> None:
    (tmp_path / "broken.jpg").write_bytes(b"broken")
    broken = [ImageEntry(k, str(tmp_path / name), name, 8, 8) for k, name in enumerate(("broken.jpg", "gone.jpg"))]
    assert gradient_hash(broken[0].uri) is gradient_hash(broken[1].uri) is None
    assert near_duplicates(broken) == [[0], [1]]


def test_two_parts_share_all_images_and_no_group(tmp_path: Path) -> None:
    images = entries(tmp_path, 30, 3)
    rest, taken = split_off(source(images), SplitOff("val", 0.2), split="train", seed=0)
    left, right = filled(rest), filled(taken)
    assert set(left) | set(right) == {entry.image_id for entry in images}
    assert not set(left) & set(right)
    assert 12 <= len(right) <= 24  # of 90 images 18 are wanted, in groups of three
    assert set(left.values()) | set(right.values()) == {1}
    assert {(k - 1) // 3 for k in left} & {(k - 1) // 3 for k in right} == set()
    assert rest.description == {"kind": "test", "part": "train", "split_off": "val=0.2", "split_seed": 0}

    again = split_off(source(images), SplitOff("val", 0.2), split="train", seed=0)
    assert filled(again[1]) == right  # also when this part is filled first
    other = split_off(source(images), SplitOff("val", 0.2), split="train", seed=1)
    assert filled(other[1]) != right


def test_a_set_of_near_duplicates_alone_cannot_be_divided(tmp_path: Path) -> None:
    with pytest.raises(SplitOffError, match="they are 1 groups of near-duplicates, the largest of 5"):
        choose(entries(tmp_path, 1, 5), 0.2, 0)


@pytest.mark.parametrize("text", ["val", "val=", "val=0", "val=1", "val=1.5", "val=20%", "=0.2", "a/b=0.2"])
def test_a_share_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(SplitOffError, match="expected NAME=SHARE"):
        SplitOff.parse(text)


def test_a_split_is_not_split_off_itself() -> None:
    with pytest.raises(SplitOffError, match="cannot be split off itself"):
        split_off(source([]), SplitOff("train", 0.2), split="train", seed=0)
