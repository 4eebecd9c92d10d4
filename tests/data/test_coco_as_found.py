"""COCO files as tools write them: what is taken, what is listed, what is refused."""

import codecs
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pipeline.data.prepare.image_files import BadImageError, read_image_file
from pipeline.data.shards.classes import repeated_names
from pipeline.data.shards.manifest import Category
from pipeline.data.sources.coco import coco_source
from pipeline.data.sources.index import AnnotationIndex, SourceError
from pipeline.data.sources.objects365 import objects365_source

Row = tuple[str | None, str, str, str]


def read(folder: Path, content: object) -> tuple[tuple[Category, ...], AnnotationIndex]:
    path = folder / "instances.json"
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    index = AnnotationIndex(shuffle=False)
    categories = coco_source(str(folder / "images"), str(path)).fill(index)
    index.finish()
    return categories, index


def rejected(index: AnnotationIndex) -> list[Row]:
    return [row[1:] for row in index.rejected()]


def notices(index: AnnotationIndex) -> dict[str, tuple[int, str]]:
    return {notice.code: (notice.count, notice.example) for notice in index.notices}


def boxes(index: AnnotationIndex) -> list[tuple[float, ...]]:
    return [tuple(box[1:5]) for _, group in index.ordered() for box in group]


def content(*annotations: Any, **others: Any) -> dict[str, Any]:
    return {
        "images": [{"id": 1, "file_name": "a.jpg", "width": 64, "height": 48}],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
        "annotations": list(annotations),
        **others,
    }


def annotation(**values: Any) -> dict[str, Any]:
    return {"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 21, 16]} | values


# Boxes


@pytest.mark.parametrize(
    ("flag", "crowd"),
    [(0, 0), (1, 1), ("0", 0), ("1", 1), (False, 0), (True, 1), ("false", 0), ("", 0), (None, 0), (0.0, 0)],
)
def test_iscrowd_is_read_in_every_form(tmp_path: Path, flag: object, crowd: int) -> None:
    _, index = read(tmp_path, content(annotation(iscrowd=flag)))
    ((_, [box]),) = index.ordered()
    assert box.crowd == crowd


@pytest.mark.parametrize(
    ("entry", "reason", "detail"),
    [
        (None, "malformed entry", "annotation number 1: None"),
        ([1, 2], "malformed entry", "annotation number 1: [1, 2]"),
        (annotation(iscrowd="maybe"), "malformed iscrowd", "annotation 1: iscrowd 'maybe'"),
        (annotation(iscrowd=[0]), "malformed iscrowd", "annotation 1: iscrowd [0]"),
        (annotation(image_id="x"), "unknown image", "annotation 1: image_id 'x'"),
        (annotation(image_id=None), "unknown image", "annotation 1: image_id None"),
        (annotation(category_id=[1]), "unknown category", "annotation 1: category_id [1]"),
        (annotation(category_id=True), "unknown category", "annotation 1: category_id True"),
        (annotation(bbox=[0, 0, True, 5]), "malformed box", "annotation 1: bbox [0, 0, True, 5]"),
        (annotation(bbox=["0", 0, 1, 5]), "malformed box", "annotation 1: bbox ['0', 0, 1, 5]"),
        (annotation(bbox=[0, 0, 5, 5, 45]), "malformed box", "annotation 1: bbox [0, 0, 5, 5, 45]"),
        (annotation(bbox={"x": 0}), "malformed box", "annotation 1: bbox {'x': 0}"),
    ],
)
def test_an_annotation_that_cannot_be_used_is_listed_and_the_others_stay(
    tmp_path: Path, entry: Any, reason: str, detail: str
) -> None:
    _, index = read(tmp_path, content(entry, annotation(id=2)))
    assert [row[1:] for row in rejected(index)] == [("box", reason, detail)]
    assert boxes(index) == [(0, 0, 21, 16)]


@pytest.mark.parametrize("number", ["ann-1", 2**70 // 2**8, 1.5, [1], None])
def test_annotation_ids_need_only_differ(tmp_path: Path, number: object) -> None:
    _, index = read(tmp_path, content(annotation(id=number), annotation(id=2)))
    assert len(boxes(index)) == 2
    if number is not None:
        with pytest.raises(SourceError, match="occurs 2 times"):
            read(tmp_path, content(annotation(id=number), annotation(id=number)))


def test_ids_written_as_text_are_numbers(tmp_path: Path) -> None:
    images = [{"id": "1", "file_name": "a.jpg", "width": "64", "height": 48.0}]
    entry = annotation(image_id="1", category_id="2")
    _, index = read(tmp_path, content(entry, images=images))
    ((image, [box]),) = index.ordered()
    assert (image.image_id, image.width, image.height, box.label) == (1, 64, 48, 1)


@pytest.mark.parametrize("area", ["12", [12], None, True])
def test_an_area_that_is_no_number_is_that_of_the_box(tmp_path: Path, area: object) -> None:
    _, index = read(tmp_path, content(annotation(area=area)))
    ((_, [box]),) = index.ordered()
    assert box.area == 21 * 16


def test_boxes_in_fractions_are_refused_if_all_are_and_counted_if_some_are(tmp_path: Path) -> None:
    fractions = [annotation(id=k, bbox=[0.1, 0.2, 0.5, 0.25 + k / 100]) for k in range(3)]
    with pytest.raises(SourceError, match=r"all 3 boxes lie between 0 and 1 pixel, such as in a\.jpg.*multiply"):
        read(tmp_path, content(*fractions))
    _, index = read(tmp_path, content(*fractions, annotation(id=9)))
    assert notices(index) == {"box-fraction": (3, "a.jpg")}
    read(tmp_path, content(annotation(bbox=[0, 0, 1, 1])))  # one pixel


@pytest.mark.parametrize(
    ("rotation", "counted"), [(45.0, True), (0, False), (360.0, False), ("x", False), (None, False)]
)
def test_rotated_annotations_are_counted(tmp_path: Path, rotation: object, counted: bool) -> None:
    _, index = read(tmp_path, content(annotation(attributes={"rotation": rotation}), annotation(id=2, attributes=[])))
    expected = {"box-rotated": (1, "annotation 1 of image 1")} if counted else {}
    assert notices(index) == expected


# Arrays, categories, encodings


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"annotations": {"0": annotation()}}, "`annotations` is not an array"),
        ({"annotations": None}, "`annotations` is not an array"),
        ({"annotations": "none"}, "`annotations` is not an array"),
        (
            {"annotations": ..., "Annotations": [annotation()]},
            "no `annotations`: its keys are images, categories, Annot",
        ),
        ({"images": {}}, "`images` is not an array"),
        ({"categories": ["cat"]}, "categories: 'cat': expected an object with an integer `id`"),
        ({"categories": [{"id": 1, "name": None}]}, "category 1 has the name None"),
        ({"categories": [{"id": 1, "name": " "}]}, "category 1 has the name ' '"),
        ({"categories": [{"id": None, "name": "cat"}]}, "categories: {'id': None, 'name': 'cat'}: expected"),
        ({"images": [None]}, "images: None; expected an object"),
        ({"images": [{"file_name": "a.jpg"}]}, "images: id is None in"),
    ],
)
def test_a_file_that_is_not_coco_is_refused_with_its_name(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    changed = {key: value for key, value in (content(annotation()) | change).items() if value is not ...}
    with pytest.raises(SourceError, match=rf"instances\.json: {message}"):
        read(tmp_path, changed)


def test_no_annotations_are_fine_where_the_list_says_so(tmp_path: Path) -> None:
    _, index = read(tmp_path, content())
    assert boxes(index) == []


def test_a_byte_order_mark_is_skipped_and_utf16_is_named(tmp_path: Path) -> None:
    text = json.dumps(content(annotation()))
    assert boxes(read(tmp_path, codecs.BOM_UTF8 + text.encode())[1]) == [(0, 0, 21, 16)]
    for mark in ("utf-16-le", "utf-16-be"):
        encoded = ("\ufeff" + text).encode(mark)
        with pytest.raises(SourceError, match="it is UTF-16 text; save it as UTF-8"):
            read(tmp_path, encoded)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace("[0, 0, 21, 16]", "[0, 0, NaN, 16]"), "JSON has no NaN.*write null"),
        (lambda text: text.replace("[0, 0, 21, 16]", "[0, 0, 1e400, 16]"), "write null"),
        (lambda text: text.replace("cat", "caf\udce9"), "invalid bytes in UTF8 string.*save it as UTF-8"),
        (lambda text: f'{{"deep": {"[" * 3000}{"]" * 3000}, {text[1:]}', "nested too deeply"),
        (
            lambda text: text.replace('"cat"', '"cat", "deep": ' + '{"a": ' * 3000 + "1" + "}" * 3000),
            "nested too deeply",
        ),
    ],
)
def test_json_that_is_none_says_how_to_write_it(tmp_path: Path, change: Callable[[str], str], message: str) -> None:
    text = change(json.dumps(content(annotation())))
    with pytest.raises(SourceError, match=rf"instances\.json: .*{message}"):
        read(tmp_path, text.encode(errors="surrogateescape"))


def test_brackets_in_names_are_not_nesting(tmp_path: Path) -> None:
    names = ["[" * 100, '\\"[{[' * 30, "]" * 100, "\\"]
    many = content(*(annotation(id=n, note=names[n % 4], text="x" * 500) for n in range(8000)))  # several blocks
    assert len(boxes(read(tmp_path, many)[1])) == 8000


def test_a_damaged_archive_and_a_folder_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.json.gz").write_bytes(b"\x1f\x8b not gzip")
    with pytest.raises(SourceError, match=r"a\.json\.gz: cannot be read"):
        coco_source(str(tmp_path), str(tmp_path / "a.json.gz")).fill(AnnotationIndex())
    with pytest.raises(SourceError, match="cannot be read"):
        coco_source(str(tmp_path), str(tmp_path))


def test_names_that_several_categories_have_are_found() -> None:
    names = ["cat", "dog", "Cat", "stop sign", "Stop  Sign "]
    categories = [Category(label=k, original_id=10 + k, name=name) for k, name in enumerate(names)]
    assert repeated_names(categories) == ["cat (10, 12)", "stop sign (13, 14)"]


def test_the_placeholder_of_roboflow_is_left_out_unless_it_has_boxes(tmp_path: Path) -> None:
    categories = [
        {"id": 0, "name": "pets", "supercategory": "none"},
        {"id": 1, "name": "cat", "supercategory": "pets"},
        {"id": 2, "name": "dog", "supercategory": "pets"},
    ]
    found, index = read(tmp_path, content(annotation(category_id=2), categories=categories))
    assert [(category.label, category.original_id, category.name) for category in found] == [
        (0, 1, "cat"),
        (1, 2, "dog"),
    ]
    ((_, [box]),) = index.ordered()
    assert box.label == 1
    assert notices(index) == {"class-placeholder": (1, "pets (category 0)")}
    found, _ = read(tmp_path, content(annotation(category_id=0), categories=categories))
    assert len(found) == 3
    found, _ = read(tmp_path, content(annotation(), categories=[{"id": 0, "name": "pets"}, {"id": 1, "name": "cat"}]))
    assert len(found) == 2


# Images and their names


@pytest.mark.parametrize(
    "change",
    [
        {"file_name": "../../etc/passwd"},
        {"file_name": "/etc/passwd"},
        {"file_name": "https://example.org/b.jpg"},
        {"file_name": None},
        {"file_name": 7},
        {"file_name": "\0.jpg"},
        {"width": None},
        {"width": 0},
        {"width": -5},
        {"height": 2**33},
        {"height": "tall"},
        {"height": [48]},
    ],
)
def test_one_unusable_image_is_one_rejected_row(tmp_path: Path, change: dict[str, Any]) -> None:
    bad = {"id": 2, "file_name": "b.jpg", "width": 64, "height": 48} | change
    entries = [content()["images"][0], bad]
    _, index = read(tmp_path, content(annotation(), annotation(id=2, image_id=2), images=entries))
    assert [entry.image_id for entry, _ in index.ordered()] == [1]
    ((image_id, _, kind, reason, detail),) = index.rejected()
    assert (image_id, kind) == (2, "image")
    assert reason == ("unusable file name" if "file_name" in change else "unusable size")
    assert repr(next(iter(change.values()))) in detail


@pytest.mark.parametrize(
    ("written", "reading"),
    [
        ("sub\\a.jpg", "with slashes for back-slashes"),
        ("images/sub/a.jpg", "without the folder's own name"),
        ("C:\\data\\images\\sub\\a.jpg", "without the folder's own name"),
        ("project-7/sub/a.jpg", "without its first folder"),
        ("/data/upload/7/top.jpg", "by the last part of its path"),
        ("https://example.org/files/top.jpg?x=1", "by the last part of its path"),
    ],
)
def test_names_with_the_paths_of_another_machine_are_read(tmp_path: Path, written: str, reading: str) -> None:
    (tmp_path / "images/sub").mkdir(parents=True)
    for name in ("sub/a.jpg", "top.jpg"):
        Image.new("RGB", (64, 48)).save(tmp_path / "images" / name)
    images = [content()["images"][0] | {"file_name": written}]
    _, index = read(tmp_path, content(annotation(), images=images))
    ((image, _),) = index.ordered()
    assert Path(image.uri).is_file()
    assert image.file_name == written
    assert notices(index) == {"file-names-read": (1, f"{written}, {reading}")}


def test_unicode_forms_of_a_name_are_the_same(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images/caf\u00e9.jpg").write_bytes(b"x")
    images = [content()["images"][0] | {"file_name": "cafe\u0301.jpg"}]
    ((image, _),) = read(tmp_path, content(images=images))[1].ordered()
    assert Path(image.uri).is_file()


def test_two_names_never_become_one_file(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    Image.new("RGB", (64, 48)).save(tmp_path / "images/a.jpg")
    images = [{"id": n, "file_name": name, "width": 64, "height": 48} for n, name in enumerate(("a.jpg", "x/a.jpg"), 1)]
    first_there = read(tmp_path, content(annotation(), images=images))[1]
    assert [entry.file_name for entry, _ in first_there.ordered() if Path(entry.uri).is_file()] == ["a.jpg"]
    images[0]["file_name"] = "y/a.jpg"
    _, neither = read(tmp_path, content(annotation(), images=images))
    assert [row[:3] for row in rejected(neither)] == [
        ("y/a.jpg", "image", "unusable file name"),
        ("x/a.jpg", "image", "unusable file name"),
    ]


def test_names_as_written_win_where_most_files_have_them(tmp_path: Path) -> None:
    (tmp_path / "images/images").mkdir(parents=True)
    for name in ("images/a.jpg", "a.jpg"):
        (tmp_path / "images" / name).write_bytes(b"x")
    images = [content()["images"][0] | {"file_name": "images/a.jpg"}]
    _, index = read(tmp_path, content(images=images))
    ((image, _),) = index.ordered()
    assert (image.uri, notices(index)) == (f"{tmp_path}/images/images/a.jpg", {})


def test_a_file_that_cannot_be_opened_is_a_rejected_image(tmp_path: Path) -> None:
    (tmp_path / "loop.jpg").symlink_to(tmp_path / "loop.jpg")
    for uri in (f"{tmp_path}/loop.jpg", f"{tmp_path}/{'a' * 300}.jpg", f"{tmp_path}/a\0.jpg", "ftp://host/a.jpg"):
        with pytest.raises(BadImageError, match="unreadable file"):
            read_image_file(uri)
    with pytest.raises(BadImageError, match="missing file"):
        read_image_file(f"{tmp_path}/none.jpg")


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_what_never_ends_is_not_read(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.jpg"
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    with pytest.raises(BadImageError, match="not a regular file"):
        read_image_file(str(path))


def test_objects365_lists_an_unusable_name_too(tmp_path: Path) -> None:
    (tmp_path / "annotations").mkdir()
    (tmp_path / "val").mkdir()
    (tmp_path / "val/a.jpg").write_bytes(b"x")
    images = [{"id": k, "file_name": name, "width": 8, "height": 8} for k, name in enumerate(("a.jpg", "../b.jpg"))]
    (tmp_path / "annotations/zhiyuan_objv2_val.json").write_text(json.dumps(content(images=images)))
    index = AnnotationIndex()
    objects365_source(str(tmp_path), "val").fill(index)
    assert [row[2] for row in rejected(index)] == ["unusable file name"]
