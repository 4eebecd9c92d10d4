"""Every source against files written by hand, read back from the index in the order of the shards."""

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
from PIL import Image, ImageDraw

from pipeline.data.shards.manifest import Category
from pipeline.data.sources.coco import coco_source
from pipeline.data.sources.index import AnnotationIndex, BoxEntry, DatasetSource, ImageEntry, SourceError
from pipeline.data.sources.objects365 import VAL_ID_OFFSET, objects365_source
from pipeline.data.sources.synthetic import (
    CLASSES,
    Scene,
    render_scene,
    render_uri,
    synthetic_image,
    synthetic_scene,
    synthetic_source,
)
from pipeline.data.sources.voc import voc_source
from pipeline.data.sources.yolo import yolo_source

Row = tuple[ImageEntry, list[BoxEntry]]


def read(source: DatasetSource) -> tuple[tuple[Category, ...], list[Row], list[tuple[Any, ...]]]:
    """Categories, rows by image id, and what was rejected without its id."""
    index = AnnotationIndex(shuffle=False)
    categories = source.fill(index)
    images = index.finish()
    rows = list(index.ordered())
    assert len(rows) == images
    return categories, rows, [row[1:] for row in index.rejected()]


def corners(boxes: list[BoxEntry]) -> list[tuple[float, ...]]:
    return [box[1:5] for box in boxes]


# The index


def filled(ids: list[int], *, seed: int = 0, shuffle: bool = True) -> AnnotationIndex:
    index = AnnotationIndex(seed=seed, shuffle=shuffle)
    index.add_images(ImageEntry(number, f"/{number}", f"{number}", 8, 8) for number in ids)
    index.add_boxes(BoxEntry(number, 0, 0, k + 1, 1, k, 1, False) for k in range(3) for number in ids if number % 2)
    return index


def order(index: AnnotationIndex) -> list[int]:
    return [entry.image_id for entry, _ in index.ordered()]


def test_the_order_depends_on_seed_and_ids_alone() -> None:
    ids = list(range(1, 400))
    shuffled = order(filled(ids))
    assert shuffled != ids
    assert sorted(shuffled) == ids
    assert order(filled(ids[::-1])) == shuffled
    assert order(filled(ids, seed=1)) != shuffled
    assert order(filled(ids[::-1], shuffle=False)) == ids
    # The position of an image depends on itself alone: leaving others out does not move it.
    assert order(filled(ids[::3])) == [number for number in shuffled if number in set(ids[::3])]


def test_shuffled_neighbours_are_unrelated() -> None:
    steps = np.diff(order(filled(list(range(2000)))))
    # Of two numbers drawn from 0..n-1 the mean distance is n / 3.
    assert abs(np.abs(steps).mean() - 2000 / 3) < 30


def test_boxes_come_with_their_image_in_the_order_they_were_added() -> None:
    for entry, boxes in filled([5, 2, 9, 4]).ordered():
        assert [box.label for box in boxes] == ([0, 1, 2] if entry.image_id % 2 else [])
        assert {box.image_id for box in boxes} <= {entry.image_id}


def test_ids_must_be_unique() -> None:
    with pytest.raises(SourceError, match="image id 3 occurs twice"):
        filled([1, 3, 2, 3])
    index = filled([1])
    index.add_boxes(BoxEntry(1, 0, 0, 1, 1, 0, 1, False, annotation_id=7) for _ in range(2))
    with pytest.raises(SourceError, match="annotation id 7 occurs 2 times"):
        index.finish()


def test_a_sample_covers_the_whole_index() -> None:
    sampled = [entry.image_id for entry in filled(list(range(1000)), shuffle=False).sample(100)]
    assert len(set(sampled)) == 100
    assert 400 < np.mean(sampled) < 600


# COCO


def coco_content() -> dict[str, Any]:
    return {
        "annotations": [  # before the images, and in no order
            {"id": 4, "image_id": 20, "category_id": 90, "bbox": [1, 2, 3, 4], "area": 11.5, "iscrowd": 0},
            {"id": 2, "image_id": 10, "category_id": 3, "bbox": [0.5, 0.25, 10, 20], "iscrowd": 1, "area": 7},
            {"id": 9, "image_id": 20, "category_id": 3, "bbox": [-5, 0, 200, 10]},
        ],
        "images": [
            {"id": 20, "file_name": "b.jpg", "width": 64, "height": 48},
            {"id": 10, "file_name": "sub/a.jpg", "width": 32, "height": 16},
            {"id": 30, "file_name": "c.jpg", "width": 8, "height": 9},
        ],
        "categories": [{"id": 90, "name": "toothbrush"}, {"id": 3, "name": " car "}],
    }


def coco(folder: Path, content: dict[str, Any]) -> DatasetSource:
    path = folder / "instances.json"
    path.write_text(json.dumps(content))
    return coco_source(str(folder / "images"), str(path))


def test_coco_is_read_whatever_the_order_of_its_file(tmp_path: Path) -> None:
    categories, rows, rejected = read(coco(tmp_path, coco_content()))
    assert categories == (
        Category(label=0, original_id=3, name="car"),
        Category(label=1, original_id=90, name="toothbrush"),
    )
    images = [entry for entry, _ in rows]
    assert images == [
        ImageEntry(10, f"{tmp_path}/images/sub/a.jpg", "sub/a.jpg", 32, 16),
        ImageEntry(20, f"{tmp_path}/images/b.jpg", "b.jpg", 64, 48),
        ImageEntry(30, f"{tmp_path}/images/c.jpg", "c.jpg", 8, 9),
    ]
    (_, first), (_, second), (_, third) = rows
    assert [box[1:8] for box in first] == [(0.5, 0.25, 10.5, 20.25, 0, 7.0, 1)]
    # Over the edge as annotated; without an area it is that of the box.
    assert [box[1:8] for box in second] == [(1, 2, 4, 6, 1, 11.5, 0), (-5, 0, 195, 10, 0, 2000.0, 0)]
    assert third == []
    assert rejected == []


def test_a_compressed_coco_file_is_read(tmp_path: Path) -> None:
    plain = coco(tmp_path, coco_content())
    packed = tmp_path / "instances.json.gz"
    packed.write_bytes(gzip.compress((tmp_path / "instances.json").read_bytes()))
    assert read(coco_source(str(tmp_path / "images"), str(packed))) == read(plain)


def test_coco_annotations_that_cannot_be_used_are_listed(tmp_path: Path) -> None:
    content = coco_content()
    bad: list[dict[str, Any]] = [
        {"id": 100, "image_id": 10, "category_id": 5, "bbox": [1, 2, 3, 4]},
        {"id": 101, "image_id": 10, "category_id": 3, "bbox": [1, 2, 3]},
        {"id": 102, "image_id": 10, "category_id": 3},
        {"id": 103, "image_id": 77, "category_id": 3, "bbox": [1, 2, 3, 4]},
    ]
    content["annotations"] += bad
    _, rows, rejected = read(coco(tmp_path, content))
    assert rejected == [
        ("sub/a.jpg", "box", "unknown category", "annotation 100: category_id 5"),
        ("sub/a.jpg", "box", "malformed box", "annotation 101: bbox [1, 2, 3]"),
        ("sub/a.jpg", "box", "malformed box", "annotation 102: bbox None"),
        (None, "box", "unknown image", "annotation 103"),
    ]
    assert sum(len(boxes) for _, boxes in rows) == 3


@pytest.mark.parametrize(
    ("key", "item", "message"),
    [
        ("images", {"id": "one", "file_name": "a.jpg", "width": 1, "height": 1}, "id is 'one'"),
        ("images", {"id": 10, "file_name": "a.jpg", "width": 1, "height": 1}, "image id 10 occurs twice"),
        ("categories", {"id": 3, "name": "bus"}, "category id 3 occurs twice"),
        ("annotations", {"id": 4, "image_id": 20, "category_id": 3, "bbox": [0, 0, 1, 1]}, "annotation id 4 occurs 2"),
    ],
)
def test_a_wrong_coco_file_is_refused(tmp_path: Path, key: str, item: dict[str, Any], message: str) -> None:
    content = coco_content()
    content[key].append(item)
    with pytest.raises(SourceError, match=message):
        read(coco(tmp_path, content))


def test_a_file_that_is_not_coco_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "instances.json"
    path.write_text('{"images": [')
    with pytest.raises(SourceError, match="not valid JSON"):
        read(coco_source(str(tmp_path), str(path)))
    path.write_text("[1, 2]")
    with pytest.raises(SourceError, match="no `categories`"):
        read(coco_source(str(tmp_path), str(path)))
    with pytest.raises(SourceError, match="no such file"):
        coco_source(str(tmp_path), str(tmp_path / "nothing.json"))


def test_equal_files_have_equal_descriptions_wherever_they_lie(tmp_path: Path) -> None:
    sources = []
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        sources.append(coco(tmp_path / name, coco_content()))
    assert sources[0].description == sources[1].description
    assert sources[0].description != coco(tmp_path, coco_content() | {"info": {}}).description


# Objects365


def objects365(root: Path, layout: str = "{part}/images/v1/{patch}/{name}") -> Path:
    """8 validation and 5 training images with one box each; ids begin at 1 in both files, as do annotations'."""
    (root / "annotations").mkdir()
    for part, count in (("val", 8), ("train", 5)):
        images, annotations = [], []
        for number in range(count, 0, -1):  # file order is not the order of ids
            patch, name = f"patch{number % 2}", f"objects365_v1_{part}_{number}.jpg"
            images.append({"id": number, "file_name": f"images/v1/{patch}/{name}", "width": 20, "height": 10})
            box = [number, 0, 1, 1]
            annotations.append({"id": number, "image_id": number, "category_id": 1 + number % 2, "bbox": box})
            path = root / layout.format(part=part, patch=patch, name=name)
            path.parent.mkdir(parents=True, exist_ok=True)
            if number > 1:  # one is missing, as some are
                path.write_bytes(b"")
        categories = [{"id": 1, "name": "Person"}, {"id": 2, "name": "Table Tennis "}]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (root / "annotations" / f"zhiyuan_objv2_{part}.json").write_text(json.dumps(content))
    return root


def test_objects365_divides_the_released_validation_set(tmp_path: Path) -> None:
    root = str(objects365(tmp_path))
    categories, val, _ = read(objects365_source(root, "val", val_images=3))
    _, train, rejected = read(objects365_source(root, "train", val_images=3))
    assert [category.name for category in categories] == ["Person", "Table Tennis"]
    # The first three of the file are 8, 7 and 6.
    assert [entry.image_id - VAL_ID_OFFSET for entry, _ in val] == [6, 7, 8]
    assert [entry.image_id for entry, _ in train] == [1, 2, 3, 4, 5] + [VAL_ID_OFFSET + k for k in (1, 2, 3, 4, 5)]
    assert rejected == []
    for entry, boxes in val + train:  # ids of both files are the same: each image still has its own box
        number = entry.image_id % VAL_ID_OFFSET
        assert corners(boxes) == [(number, 0, number + 1, 1)]
        part = "val" if entry.image_id >= VAL_ID_OFFSET else "train"
        assert entry.file_name.endswith(f"_{part}_{number}.jpg")
        assert Path(entry.uri).exists() == (number > 1)


@pytest.mark.parametrize(
    "layout",
    ["{part}/{patch}/{name}", "images/{part}/{patch}/{name}", "images/{part}/{name}", "images/v1/{patch}/{name}"],
)
def test_objects365_is_found_however_it_was_unpacked(tmp_path: Path, layout: str) -> None:
    _, rows, _ = read(objects365_source(str(objects365(tmp_path, layout)), "train", val_images=3))
    assert sum(Path(entry.uri).exists() for entry, _ in rows) == len(rows) - 2


def test_objects365_without_its_images_is_an_error_with_the_paths_that_were_tried(tmp_path: Path) -> None:
    root = objects365(tmp_path, "elsewhere/{part}/{patch}/{name}")
    with pytest.raises(SourceError, match=r"none of its first 8 images exists; tried\n  .*/val/images/v1/patch0/"):
        read(objects365_source(str(root), "val"))


# Pascal VOC


def voc(root: Path, objects: str) -> Path:
    for folder in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (root / folder).mkdir(parents=True)
    size = "<size><width>100</width><height>50</height><depth>3</depth></size>"
    other = voc_object("bus", 1, 1, 2, 2)
    for name, content in (("b", objects), ("a", ""), ("unlisted", other)):
        text = f"<annotation><filename>{name}.png</filename>{size}{content}</annotation>"
        (root / "Annotations" / f"{name}.xml").write_text(text)
    (root / "ImageSets/Main/train.txt").write_text("b\na  1\n\n")
    return root


def voc_object(name: str, *box: float | str, difficult: int = 0) -> str:
    sides = "".join(f"<{key}>{side}</{key}>" for key, side in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True))
    part = "<part><bndbox><xmin>7</xmin></bndbox></part>"
    return f"<object><name>{name}</name>{part}<difficult>{difficult}</difficult><bndbox>{sides}</bndbox></object>"


def test_voc_pixels_count_from_one_and_include_both_ends(tmp_path: Path) -> None:
    objects = voc_object("dog", 1, 1, 100, 50) + voc_object("cat", 48.5, 2, 60, 3, difficult=1)
    categories, rows, rejected = read(voc_source(voc(tmp_path, objects), "train"))
    assert [category.name for category in categories] == ["bus", "cat", "dog"]  # also those of other lists
    (b, boxes), (a, none) = rows
    assert b == ImageEntry(1, f"{tmp_path}/JPEGImages/b.png", "b.png", 100, 50)
    assert (a.file_name, none) == ("a.png", [])
    # The whole image is 1..100 x 1..50, that is 0..100 x 0..50 on a continuous axis.
    assert [box[1:8] for box in boxes] == [(0, 0, 100, 50, 2, 5000, 0), (47.5, 1, 60, 3, 1, 25, 1)]
    assert rejected == []


def test_voc_with_ordinary_coordinates(tmp_path: Path) -> None:
    _, rows, _ = read(voc_source(voc(tmp_path, voc_object("dog", 0, 0, 100, 50)), "train", one_based=False))
    assert corners(rows[0][1]) == [(0, 0, 100, 50)]


def test_voc_boxes_that_are_none_are_listed_and_the_image_stays(tmp_path: Path) -> None:
    objects = (
        voc_object("dog", 5, 5, 5, 5)  # as in BCCD
        + voc_object("dog", 9, 5, 4, 8)
        + voc_object("dog", "x", 5, 6, 7)
        + voc_object("cow", 1, 2, 3, 4)
    )
    root = voc(tmp_path, objects)
    (root / "ImageSets/Main/train.txt").write_text("b\nlost\n")
    _, rows, rejected = read(voc_source(root, "train", classes=["dog"]))
    assert [(entry.file_name, boxes) for entry, boxes in rows] == [("b.png", [])]
    assert rejected == [
        ("b.png", "box", "degenerate box", "dog 5, 5, 5, 5"),
        ("b.png", "box", "degenerate box", "dog 9, 5, 4, 8"),
        ("b.png", "box", "malformed box", "dog x, 5, 6, 7"),
        ("b.png", "box", "unknown category", "cow 1, 2, 3, 4"),
        ("lost", "image", "missing annotation", "lost.xml does not exist"),
    ]


def test_a_wrong_voc_folder_is_refused(tmp_path: Path) -> None:
    root = voc(tmp_path, "")
    with pytest.raises(SourceError, match=r"no such list; available: train"):
        voc_source(root, "val")
    for path in (root / "Annotations").glob("*.xml"):
        path.write_text("<annotation>")
    with pytest.raises(SourceError, match=r"a\.xml: not valid XML"):
        voc_source(root, "train")


# YOLO


def yolo(root: Path, *, data: str) -> Path:
    for folder in ("images/train", "labels/train"):
        (root / folder).mkdir(parents=True)
    for name in ("b.jpg", "a.PNG", "empty.jpg", "notes.txt"):
        (root / "images/train" / name).write_bytes(b"")
    (root / "labels/train/a.txt").write_text("1 0.5 0.5 0.2 0.4\n\n0 0.1 0.1 0.3 0.2 0.2 0.6\n")
    (root / "labels/train/b.txt").write_text("5 0.5 0.5 0.2 0.4\n0 0.5 0.5\n0 x 1 1 1\n1 0.9 0.5 0.4 0.2\n")
    (root / "data.yaml").write_text(data)
    return root / "data.yaml"


@pytest.mark.parametrize(
    "data",
    [
        "train: images/train\nnames: [cat, dog]",
        "path: .\ntrain: [images/train/]\nnames: {0: cat, 1: dog}\nnc: 2",
        "train: ../images/train\nnames: [cat, dog]",
        "train: list.txt\nnames: [cat, dog]",
    ],
)
def test_yolo_is_read_in_every_form_of_its_yaml(tmp_path: Path, data: str) -> None:
    path = yolo(tmp_path, data=data)
    names = [f"./images/train/{name}" for name in ("empty.jpg", "a.PNG", "b.jpg")]
    (tmp_path / "list.txt").write_text("\n".join(names))
    categories, rows, rejected = read(yolo_source(path, "train"))
    assert [(category.original_id, category.name) for category in categories] == [(0, "cat"), (1, "dog")]
    assert [entry.file_name for entry, _ in rows] == [
        f"images/train/{name}" for name in ("a.PNG", "b.jpg", "empty.jpg")
    ]
    assert {entry.width for entry, _ in rows} == {None}  # so boxes are fractions
    (_, a), (_, b), (_, empty) = rows
    np.testing.assert_allclose(corners(a), [(0.4, 0.3, 0.6, 0.7), (0.1, 0.1, 0.3, 0.6)])  # the second is a polygon's
    np.testing.assert_allclose([box.area for box in a], [0.08, 0.1])
    assert [box.label for box in a] == [1, 0]
    np.testing.assert_allclose(corners(b), [(0.7, 0.4, 1.1, 0.6)])
    assert empty == []
    assert Counter(row[2] for row in rejected) == {"unknown category": 1, "malformed box": 2}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("names: [cat, dog]\nval: images/train", "no split 'train'; available: val"),
        ("train: images/train", "names is None"),
        ("train: images/train\nnames: {1: cat, 2: dog}", r"class numbers \[1, 2\]; expected 0\.\.1"),
        ("train: images/nothing\nnames: [cat]", "does not exist"),
        ("train: labels/train\nnames: [cat]", "no images"),
        ("train: [", "not valid YAML"),
        ("- 1", "expected keys such as `names`"),
    ],
)
def test_a_wrong_data_yaml_is_refused(tmp_path: Path, data: str, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        yolo_source(yolo(tmp_path, data=data), "train")


# Synthetic


def test_a_synthetic_image_depends_on_seed_and_index_alone() -> None:
    assert synthetic_image(7).image == synthetic_image(7).image
    assert (
        len({synthetic_image(index, seed=seed, longest_side=64).image for index in range(4) for seed in range(3)}) == 12
    )


def test_synthetic_boxes_are_tight_around_the_rendered_shapes() -> None:
    checked = 0
    for index in range(60):
        scene = synthetic_scene(index, longest_side=128)
        ground = render_scene(Scene(scene.width, scene.height, (), (), scene.texture_seed)).astype(int)
        for shape in scene.shapes[:1]:
            alone = render_scene(Scene(scene.width, scene.height, (shape,), (), scene.texture_seed))
            rows, columns = np.nonzero(np.abs(alone - ground).max(2) > 6)
            edges = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            np.testing.assert_allclose(shape.box, edges, atol=2.01)  # a corner of a star fades into its pixel

            # The area by another library's rasteriser, at eight times the size.
            mask = Image.new("1", (8 * scene.width, 8 * scene.height))
            for value, contour in enumerate(shape.contours):
                ImageDraw.Draw(mask).polygon([tuple(point) for point in contour * 8], fill=1 - value)
            assert np.asarray(mask).sum() / 64 == pytest.approx(shape.area, rel=0.1)
            checked += 1
    assert checked > 40


def test_synthetic_images_have_what_detectors_meet() -> None:
    scenes = [synthetic_scene(index) for index in range(400)]
    labels = np.concatenate([scene.labels for scene in scenes])
    sides = np.concatenate([scene.boxes for scene in scenes])
    assert set(labels) == set(range(len(CLASSES)))
    assert 20 < sum(not len(scene.boxes) for scene in scenes) < 70  # empty: a tenth
    assert 5 < sum(bool(scene.is_crowd.any()) for scene in scenes) < 40
    assert (np.concatenate([scene.areas for scene in scenes]) < 15**2).mean() > 0.1
    assert (sides >= 0).all()
    assert all((scene.boxes[:, 2:] <= (scene.width, scene.height)).all() for scene in scenes)
    occluded = 0
    for scene in scenes:
        for k, box in enumerate(scene.boxes):
            over = scene.boxes[k + 1 :]
            occluded += bool(len(over)) and bool(
                (np.minimum(over[:, 2:], box[2:]) > np.maximum(over[:, :2], box[:2])).all(1).any()
            )
    assert occluded > 100


def test_the_synthetic_source_indexes_what_it_will_render() -> None:
    _, rows, _ = read(synthetic_source(12, seed=3, longest_side=64))
    assert len(rows) == 12
    for index, (entry, boxes) in enumerate(rows):
        expected = synthetic_image(index, seed=3, longest_side=64)
        image = render_uri(entry.uri)
        assert image == expected.image
        assert simplejpeg.decode_jpeg(image).shape == (entry.height, entry.width, 3)
        np.testing.assert_array_equal(np.float32(corners(boxes)).reshape(-1, 4), expected.boxes)
        assert [box.label for box in boxes] == expected.labels.tolist()
