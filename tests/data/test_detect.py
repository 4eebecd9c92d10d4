"""Folders as tools export them: the format and the splits are recognised."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pipeline.data.sources.detect import coco_in_folder, find_source
from pipeline.data.sources.index import AnnotationIndex, DatasetSource, SourceError

XML = (
    "<annotation><filename>{name}.jpg</filename><size><width>64</width><height>48</height></size><object><name>cat</name>"
    "<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>21</xmax><ymax>16</ymax></bndbox></object></annotation>"
)


def image(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (64, 48)).save(path)


def coco(path: Path, *names: str, **extra: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    images = [{"id": k, "file_name": name, "width": 64, "height": 48} for k, name in enumerate(names, start=1)]
    boxes = [{"id": k, "image_id": k, "category_id": 1, "bbox": [0, 0, 21, 16]} for k, _ in enumerate(names, start=1)]
    content = {"info": {}, "images": images, "categories": [{"id": 1, "name": "cat"}], "annotations": boxes, **extra}
    path.write_text(json.dumps(content))


def read(source: DatasetSource) -> list[str]:
    """Names of the images; each must exist and have one box of the same class."""
    index = AnnotationIndex(shuffle=False)
    assert [category.name for category in source.fill(index)] == ["cat"]
    index.finish()
    assert list(index.rejected()) == []
    for entry, boxes in index.ordered():
        assert Path(entry.uri).is_file(), entry.uri
        assert len(boxes) == 1
    return [entry.file_name for entry, _ in index.ordered()]


def roboflow_coco(root: Path) -> None:
    for split, name in (("train", "a.jpg"), ("valid", "b.jpg")):
        image(root / split / name)
        coco(root / split / "_annotations.coco.json", name)


def plain_coco(root: Path) -> None:
    for split, name in (("train", "a.jpg"), ("val", "b.jpg")):
        image(root / f"{split}2017" / name)
        coco(root / f"annotations/instances_{split}2017.json", name)
        coco(root / f"annotations/captions_{split}2017.json", name)


def cvat_coco(root: Path) -> None:
    image(root / "images/default/a.jpg")
    coco(root / "annotations/instances_default.json", "a.jpg")


def label_studio_coco(root: Path) -> None:
    image(root / "images/a.jpg")
    coco(root / "result.json", "images\\a.jpg")


def roboflow_yolo(root: Path) -> None:
    for split, name in (("train", "a"), ("valid", "b")):
        image(root / split / "images" / f"{name}.jpg")
        (root / split / "labels").mkdir()
        (root / split / f"labels/{name}.txt").write_text("0 0.5 0.5 0.2 0.4")
    (root / "data.yaml").write_text("train: ../train/images\nval: ../valid/images\nnames: [cat]\nnc: 1")


def label_studio_yolo(root: Path) -> None:
    image(root / "images/a.jpg")
    (root / "labels").mkdir()
    (root / "labels/a.txt").write_text("0 0.5 0.5 0.2 0.4")
    (root / "classes.txt").write_text("cat\n")
    (root / "notes.json").write_text('{"categories": [{"id": 0, "name": "cat"}], "info": {"year": 2026}}')


def label_img(root: Path) -> None:
    image(root / "a.jpg")
    (root / "a.xml").write_text(XML.format(name="a"))


def roboflow_voc(root: Path) -> None:
    for split, name in (("train", "a"), ("valid", "b")):
        image(root / split / f"{name}.jpg")
        (root / split / f"{name}.xml").write_text(XML.format(name=name))


def plain_voc(root: Path) -> None:
    for name in ("a", "b"):
        image(root / f"JPEGImages/{name}.jpg")
        (root / "Annotations").mkdir(exist_ok=True)
        (root / f"Annotations/{name}.xml").write_text(XML.format(name=name))
    (root / "ImageSets/Main").mkdir(parents=True)
    for split, text in (("train", "a\n"), ("val", "b\n"), ("trainval", "a\nb\n"), ("cat_train", "a 1\n")):
        (root / f"ImageSets/Main/{split}.txt").write_text(text)


@pytest.mark.parametrize(
    ("write", "kind", "splits"),
    [
        (roboflow_coco, "coco", {"train": "a", "val": "b"}),
        (plain_coco, "coco", {"train2017": "a", "val2017": "b"}),
        (cvat_coco, "coco", {"train": "a"}),
        (label_studio_coco, "coco", {"train": "a"}),
        (roboflow_yolo, "yolo", {"train": "a", "val": "b"}),
        (label_studio_yolo, "yolo", {"train": "a"}),
        (label_img, "voc", {"train": "a"}),
        (roboflow_voc, "voc", {"train": "a", "val": "b"}),
        (plain_voc, "voc", {"train": "a", "val": "b"}),
    ],
)
def test_exports_are_recognised_with_their_splits(
    tmp_path: Path, write: Callable[[Path], None], kind: str, splits: dict[str, str]
) -> None:
    write(tmp_path)
    found = find_source(tmp_path)
    assert found.kind == kind
    names = {
        split: [Path(name.replace("\\", "/")).stem for name in read(make())] for split, make in found.splits.items()
    }
    assert names == {split: [name] for split, name in splits.items()}


def test_a_folder_of_several_formats_or_of_none_is_refused_with_what_was_found(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no data set was recognised"):
        find_source(tmp_path)
    with pytest.raises(SourceError, match="no such folder"):
        find_source(tmp_path / "nowhere")
    roboflow_yolo(tmp_path)
    coco(tmp_path / "train/_annotations.coco.json", "a.jpg")
    with pytest.raises(SourceError, match=r"several things \(YOLO: data\.yaml; COCO: train/_annotations\.coco\.json\)"):
        find_source(tmp_path)


def test_a_file_that_cannot_be_read_is_named_and_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / "broken.yaml").write_text("names: [")
    (tmp_path / "old.json").write_bytes("{}".encode("utf-16"))
    with pytest.raises(SourceError, match=r"(?s)broken\.yaml: not valid YAML.*old\.json: it is UTF-16 text") as raised:
        find_source(tmp_path)
    assert "no data set was recognised" in str(raised.value)
    roboflow_yolo(tmp_path)
    assert find_source(tmp_path).kind == "yolo"


def test_a_byte_order_mark_hides_no_coco_file(tmp_path: Path) -> None:
    roboflow_coco(tmp_path)
    for path in tmp_path.rglob("*.json"):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert find_source(tmp_path).kind == "coco"


def test_two_files_for_one_split_are_named(tmp_path: Path) -> None:
    image(tmp_path / "a.jpg")
    coco(tmp_path / "one.json", "a.jpg")
    coco(tmp_path / "two.json", "a.jpg")
    with pytest.raises(SourceError, match=r"one\.json and two\.json both seem to be the split train"):
        find_source(tmp_path)


def test_a_coco_folder_is_read_by_its_split_wherever_the_file_is(tmp_path: Path) -> None:
    roboflow_coco(tmp_path)
    assert read(coco_in_folder(str(tmp_path), "train")) == ["a.jpg"]
    assert read(coco_in_folder(str(tmp_path), "valid")) == read(coco_in_folder(str(tmp_path), "val")) == ["b.jpg"]
    with pytest.raises(SourceError, match=r"instances_test\.json: no such file"):
        coco_in_folder(str(tmp_path), "test")
