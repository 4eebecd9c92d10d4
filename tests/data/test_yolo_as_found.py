"""YOLO folders as tools and people leave them: every file is taken, listed or counted."""

import codecs
import os
from pathlib import Path

import numpy as np
import pytest

from pipeline.data.sources.index import AnnotationIndex, SourceError
from pipeline.data.sources.yolo import yolo_source

BOX = "0 0.5 0.5 0.2 0.4\n"
CORNERS = (0.4, 0.3, 0.6, 0.7)


def write(root: Path, *names: str, **texts: str | bytes) -> None:
    """Empty files of these names, and a data.yaml unless there is one."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(BOX if name.lower().endswith(".txt") else "")
    if not (root / "data.yaml").exists():
        (root / "data.yaml").write_text("train: train\nnames: [cat, dog]")


def read(root: Path, split: str = "train") -> AnnotationIndex:
    index = AnnotationIndex(shuffle=False)
    yolo_source(root, split).fill(index)
    index.finish()
    return index


def boxes(index: AnnotationIndex) -> dict[str, int]:
    """Number of boxes by file name."""
    return {Path(entry.file_name).name: len(group) for entry, group in index.ordered()}


def notices(index: AnnotationIndex) -> dict[str, int]:
    return {notice.code: notice.count for notice in index.notices}


# Where labels are


@pytest.mark.parametrize(
    ("image", "label"),
    [
        ("train/images/a.jpg", "train/labels/a.txt"),
        ("train/JPEGImages/a.jpg", "train/labels/a.txt"),
        ("train/Images/a.jpg", "train/Labels/a.txt"),
        ("train/images/a.jpg", "train/labels/a.TXT"),
        ("train/images/a.jpg", "train/images/a.txt"),
        ("train/images/deep/a.jpg", "train/labels/deep/a.txt"),
        ("train/images/deep/a.jpg", "train/images/deep/a.txt"),
        ("train/photos/a.jpg", "train/labels/a.txt"),
        ("train/any/a.jpg", "train/labels/a.txt"),
        ("train/a.jpg", "train/labels/a.txt"),
        ("train/a.jpg", "train/a.txt"),
        ("train/a.b.jpg", "train/a.b.txt"),
        ("train/caf\u00e9.jpg", "train/cafe\u0301.txt"),
    ],
)
def test_labels_are_found_in_every_usual_place(tmp_path: Path, image: str, label: str) -> None:
    write(tmp_path, image, label)
    index = read(tmp_path / "data.yaml")
    ((_, [box]),) = index.ordered()
    np.testing.assert_allclose(box[1:5], CORNERS)
    assert list(index.rejected()) == []


def test_the_folder_of_labels_comes_before_a_text_beside_the_image(tmp_path: Path) -> None:
    write(tmp_path, "train/images/a.jpg", "train/images/a.txt", "train/labels/a.txt")
    (tmp_path / "train/images/a.txt").write_text("a caption")
    assert boxes(read(tmp_path / "data.yaml")) == {"a.jpg": 1}


def test_a_set_without_a_single_label_file_is_refused_with_the_places(tmp_path: Path) -> None:
    write(tmp_path, "train/images/a.jpg", "train/annotations/a.txt")
    (tmp_path / "train/labels").mkdir()
    with pytest.raises(
        SourceError, match=r"not one of 1 images has a label file; .*a\.txt was looked for in .*/labels"
    ):
        read(tmp_path / "data.yaml")
    (tmp_path / "train/labels/a.txt").write_text("")
    assert boxes(read(tmp_path / "data.yaml")) == {"a.jpg": 0}


# Every file is taken, listed or counted


def test_files_are_images_whatever_their_ending_unless_it_says_otherwise(tmp_path: Path) -> None:
    taken = ["a.jpg", "B.JPG", "c.jfif", "d.mpo", "e.avif", "f.jpe", "g.ppm", "h.heic", "no_ending"]
    others = ["notes.json", "labels.cache", ".DS_Store", "._a.jpg", "Thumbs.db"]
    write(tmp_path, *(f"train/images/{name}" for name in taken + others))
    write(tmp_path, *(f"train/labels/{Path(name).stem}.txt" for name in taken))
    index = read(tmp_path / "data.yaml")
    assert boxes(index) == dict.fromkeys(taken, 1)
    assert notices(index) == {"file-passed-over": 5}


def test_labels_without_an_image_are_listed(tmp_path: Path) -> None:
    write(tmp_path, "train/images/a.jpg", "train/labels/a.txt", "train/labels/lost.txt", "train/labels/classes.txt")
    (row,) = read(tmp_path / "data.yaml").rejected()
    assert row[1:4] == ("train/labels/lost.txt", "file", "label without an image")


def test_a_label_of_another_split_is_not_without_an_image(tmp_path: Path) -> None:
    write(tmp_path, "images/a.jpg", "images/b.jpg", "labels/a.txt", "labels/b.txt")
    (tmp_path / "data.yaml").write_text("train: list.txt\nnames: [cat]")
    (tmp_path / "list.txt").write_text("images\\a.jpg\n")
    index = read(tmp_path / "data.yaml")
    assert (boxes(index), list(index.rejected())) == ({"a.jpg": 1}, [])


def test_images_without_a_label_file_are_counted(tmp_path: Path) -> None:
    write(tmp_path, "train/images/a.jpg", "train/images/b.jpg", "train/labels/a.txt")
    index = read(tmp_path / "data.yaml")
    assert boxes(index) == {"a.jpg": 1, "b.jpg": 0}
    assert notices(index) == {"label-file-missing": 1}


def test_linked_folders_are_followed_once(tmp_path: Path) -> None:
    write(tmp_path, "elsewhere/images/a.jpg", "elsewhere/labels/a.txt")
    (tmp_path / "train").mkdir()
    (tmp_path / "train/part").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/images/back").symlink_to(tmp_path / "train")
    assert boxes(read(tmp_path / "data.yaml")) == {"a.jpg": 1}


# What rows mean


POSE = "0 0.5 0.5 0.4 0.4 0.35 0.4 0.4 0.6 0.5 0.5 0.6 0.65"  # 4 keypoints of 2 values
POLYGON = "0 0.1 0.1 0.3 0.2 0.2 0.6"


def rows(root: Path, text: str, yaml: str = "") -> AnnotationIndex:
    write(root, "train/images/a.jpg", "train/labels/a.txt")
    (root / "train/labels/a.txt").write_text(text)
    (root / "data.yaml").write_text(f"train: train\nnames: [cat]\n{yaml}")
    return read(root / "data.yaml")


@pytest.mark.parametrize(("shape", "extra"), [("[4, 2]", ""), ("[4, 3]", " 2")])
def test_kpt_shape_says_that_rows_begin_with_a_box(tmp_path: Path, shape: str, extra: str) -> None:
    numbers = POSE.split()
    pairs = [" ".join(numbers[k : k + 2]) + extra for k in range(5, len(numbers), 2)]
    index = rows(tmp_path, " ".join([*numbers[:5], *pairs]) + "\n" + BOX + POLYGON, f"kpt_shape: {shape}")
    ((_, group),) = index.ordered()
    np.testing.assert_allclose([box[1:5] for box in group], [(0.3, 0.3, 0.7, 0.7), CORNERS])
    assert [row[3] for row in index.rejected()] == ["malformed box"]  # a row of another length
    assert notices(index) == {}


def test_rows_that_may_be_keypoints_are_counted_where_nothing_says_so(tmp_path: Path) -> None:
    index = rows(tmp_path, f"{POSE}\n{POLYGON}\n{BOX}")
    assert boxes(index) == {"a.jpg": 3}
    assert notices(index) == {"row-ambiguous": 1}
    with_visibility = "0 0.5 0.5 0.4 0.4 0.35 0.4 2 0.4 0.6 1"  # 2 keypoints of 3 values: 10 numbers
    assert notices(rows(tmp_path, with_visibility)) == {"row-ambiguous": 1}


def test_an_odd_number_of_values_is_listed_with_their_number(tmp_path: Path) -> None:
    index = rows(tmp_path, "0 0.5 0.5 0.4 0.4 0.35 0.4 2\n")
    assert [(row[3], row[4][:10]) for row in index.rejected()] == [("malformed box", "7 numbers:")]


# Texts


@pytest.mark.parametrize(
    "encoded", [codecs.BOM_UTF8 + BOX.encode(), BOX.encode("utf-16"), BOX.replace("\n", "\r\n").encode()]
)
def test_labels_of_windows_are_read(tmp_path: Path, encoded: bytes) -> None:
    write(tmp_path, "train/images/a.jpg", "train/labels/a.txt")
    (tmp_path / "train/labels/a.txt").write_bytes(encoded)
    assert boxes(read(tmp_path / "data.yaml")) == {"a.jpg": 1}


def test_labels_in_another_encoding_are_one_rejected_image(tmp_path: Path) -> None:
    write(tmp_path, "train/images/a.jpg", "train/images/b.jpg", "train/labels/a.txt", "train/labels/b.txt")
    (tmp_path / "train/labels/a.txt").write_bytes("0 0.5 0.5 0.2 0.4 # caf\u00e9".encode("latin-1"))
    index = read(tmp_path / "data.yaml")
    assert boxes(index) == {"b.jpg": 1}
    ((_, name, kind, reason, detail),) = index.rejected()
    assert (name, kind, reason) == ("train/images/a.jpg", "image", "unreadable labels")
    assert "labels/a.txt: not UTF-8 text" in detail


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"names: [caf\xe9]\ntrain: train", r"data\.yaml: not UTF-8 text"),
        (b"names: {0: }\ntrain: train", "class 0 has the name 'None'"),
        (b"names: [cat, [dog]]\ntrain: train", "class 1 has the name"),
        (b"names: [cat]\ntrain: 7", "train is 7; expected a path"),
        (b"names: [cat]\ntrain: [{a: b}]", "expected a path, or a list of paths"),
        (b"names: [cat]\ntrain: " + b"a" * 5000, "does not exist"),
        (b"names: [cat]\ntrain: train\nkpt_shape: 17", r"kpt_shape is 17; expected \[keypoints, 2 or 3\]"),
        (b"names: [cat]\ntrain: train\nkpt_shape: [17, 4]", "kpt_shape"),
        (b"names: 2020-99-99", "not valid YAML"),
        (b"names: [yes, no]\ntrain: train", "YAML reads class 0 as True; put the name in quotation marks"),
        (b"names: {0: cat, '0': dog}\ntrain: train", "a class number twice"),
        (b"names: [cat]\ntrain: train\npath: [a]", "path is .*expected a folder"),
        (b'names: [cat]\ntrain: train\npath: "a\\0b"', "path is 'a.*null byte"),
        (b"a: &a [*b, *a]\nnames: *a", "not valid YAML"),
        (b"a: &a [*a]\nnames: *a\ntrain: *a", "aliases"),
        ("names: [dog]\ntrain: train".encode("utf-16-be"), "seems to be unmarked UTF-16"),
        (b"[" * 3000, "not valid YAML"),
    ],
)
def test_a_data_yaml_that_cannot_be_used_is_one_sentence(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "data.yaml").write_bytes(content)
    write(tmp_path, "train/images/a.jpg", "train/labels/a.txt")
    with pytest.raises(SourceError, match=message):
        read(tmp_path / "data.yaml")


def test_odd_files_of_a_folder_are_listed_one_by_one(tmp_path: Path) -> None:
    write(tmp_path, "train/images/a.jpg", "train/labels/a.txt")
    for name in ("folder", "loop", "pipe"):
        write(tmp_path, f"train/images/{name}.jpg")
    (tmp_path / "train/labels/folder.txt").mkdir()
    (tmp_path / "train/labels/loop.txt").symlink_to("loop.txt")
    os.mkfifo(tmp_path / "train/labels/pipe.txt")
    index = read(tmp_path / "data.yaml")
    assert boxes(index) == {"a.jpg": 1}
    assert [(row.file_name, row.reason) for row in index.rejected()] == [
        (f"train/images/{name}.jpg", "unreadable labels") for name in ("folder", "loop", "pipe")
    ]


def test_names_that_are_not_utf8_are_listed_and_the_others_stay(tmp_path: Path) -> None:
    write(tmp_path, "train/images/a.jpg", "train/labels/a.txt")
    write(tmp_path, "train/images/caf\udce9.jpg", "train/labels/caf\udce9.txt", "train/labels/alone\udce9.txt")
    index = read(tmp_path / "data.yaml")
    assert boxes(index) == {"a.jpg": 1}
    assert [(row.file_name, row.reason) for row in index.rejected()] == [
        ("train/images/caf\\xe9.jpg", "unusable file name"),
        ("train/labels/alone\\xe9.txt", "label without an image"),
    ]


@pytest.mark.parametrize("written", ["caf\u00e9.jpg", "cafe\u0301.jpg", ".\\images\\caf\u00e9.jpg"])
def test_a_list_names_files_in_any_form(tmp_path: Path, written: str) -> None:
    write(tmp_path, "images/cafe\u0301.jpg", "labels/caf\u00e9.txt")
    lines = [
        "",
        f"  {written if 'images' in written else f'images/{written}'} \r",
        "n" * 400 + ".jpg",
        "http://host/b.jpg",
    ]
    (tmp_path / "list.txt").write_text("\n".join(lines))
    (tmp_path / "data.yaml").write_text("train: list.txt\nnames: [cat]")
    assert "cafe\u0301.jpg" in boxes(read(tmp_path / "data.yaml"))


def test_class_numbers_written_as_text_are_numbers(tmp_path: Path) -> None:
    (tmp_path / "data.yaml").write_text("train: train\nnames: {'0': cat, '1': dog}")
    write(tmp_path, "train/images/a.jpg", "train/labels/a.txt")
    assert boxes(read(tmp_path / "data.yaml")) == {"a.jpg": 1}


# The folder instead of its yaml


def test_a_folder_stands_for_its_yaml(tmp_path: Path) -> None:
    write(tmp_path, "train/images/a.jpg", "train/labels/a.txt")
    (tmp_path / "other.yaml").write_text("seed: 1")
    assert boxes(read(tmp_path)) == {"a.jpg": 1}
    assert (
        yolo_source(tmp_path, "train").description["labels_sha256"]
        == (yolo_source(tmp_path / "data.yaml", "train").description["labels_sha256"])
    )
    (tmp_path / "data.yaml").rename(tmp_path / "b.yaml")
    (tmp_path / "c.yaml").write_text("names: [cat]")
    with pytest.raises(SourceError, match=r"b\.yaml, c\.yaml have `names`; name one"):
        read(tmp_path)


@pytest.mark.parametrize(
    "layout", ["images/train/a.jpg labels/train/a.txt", "images/a.jpg labels/a.txt", "a.jpg a.txt"]
)
def test_a_folder_without_a_yaml_has_its_classes_in_a_text(tmp_path: Path, layout: str) -> None:
    write(tmp_path, *layout.split())
    (tmp_path / "data.yaml").unlink()
    with pytest.raises(SourceError, match=r"no YAML file with `names`, and no classes\.txt"):
        read(tmp_path)
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    assert boxes(read(tmp_path)) == {"a.jpg": 1}
    categories = yolo_source(tmp_path, "train").fill(AnnotationIndex())
    assert [category.name for category in categories] == ["cat", "dog"]


def test_valid_is_another_name_of_val(tmp_path: Path) -> None:
    write(tmp_path, "valid/images/a.jpg", "valid/labels/a.txt")
    (tmp_path / "data.yaml").write_text("val: ../valid/images\nnames: [cat]")
    assert boxes(read(tmp_path, "valid")) == boxes(read(tmp_path, "val")) == {"a.jpg": 1}
