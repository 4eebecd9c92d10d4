"""Folders as tools export them: `fit` finds what to train on and what to validate on, without a word about the format."""

from collections import Counter
from pathlib import Path

import pytest

from pipeline.data.shards.records import ImageRecord
from pipeline.data.sources.index import AnnotationIndex, DatasetSource, SourceError
from pipeline.data.sources.synthetic import CLASSES
from pipeline.fit.prepared import FitError, find_splits
from tests.support.exported_layouts import LAYOUTS, WITHOUT_SPLITS, drawn_splits, images, yolo_labels

Box = tuple[str, int, int, int, int]  # class, and corners in pixels, rounded


def boxes_of(source: DatasetSource) -> Counter[tuple[Box, ...]]:
    """Boxes of every image of a source, read as `prepare` reads them."""
    index = AnnotationIndex(shuffle=False)
    names = [category.name for category in source.fill(index)]
    index.finish()
    assert list(index.rejected()) == []
    found = []
    for entry, boxes in index.ordered():
        assert Path(entry.uri).is_file()
        assert entry.width is None or (entry.width, entry.height) == _size(entry.uri)  # its own, not one of that name
        width, height = (1, 1) if entry.width is not None else _size(entry.uri)
        rows = [
            (names[box.label], *(round(v) for v in (box.x1 * width, box.y1 * height, box.x2 * width, box.y2 * height)))
            for box in boxes
        ]
        found.append(tuple(sorted(rows)))
    return Counter(found)


def _size(uri: str) -> tuple[int, int]:
    from PIL import Image

    with Image.open(uri) as image:
        return image.size


def expected(records: list[ImageRecord]) -> Counter[tuple[Box, ...]]:
    return Counter(
        tuple(
            sorted(
                (CLASSES[label], *(round(value) for value in box))
                for box, label in zip(record.boxes.tolist(), record.labels.tolist(), strict=True)
            )
        )
        for record in records
    )


@pytest.mark.parametrize("layout", sorted(set(LAYOUTS) - WITHOUT_SPLITS))
def test_both_parts_of_an_export_are_found_with_their_boxes(layout: str, tmp_path: Path) -> None:
    splits = drawn_splits(train=6, val=3, test=2)
    LAYOUTS[layout](tmp_path, splits)
    parts = find_splits(tmp_path, None).parts(seed=0)
    assert {name: boxes_of(source) for name, source in parts.items()} == {
        name: expected(splits[name]) for name in ("train", "val")
    }


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_a_part_to_validate_on_is_split_off_where_there_is_none(layout: str, tmp_path: Path) -> None:
    splits = drawn_splits(train=12)
    LAYOUTS[layout](tmp_path, splits)
    parts = find_splits(tmp_path, None).parts(seed=0)
    train, val = boxes_of(parts["train"]), boxes_of(parts["val"])
    assert train + val == expected(splits["train"])
    assert val.total() == 2  # a fifth


def test_a_share_can_be_split_off_although_there_is_a_validation_split(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    splits = drawn_splits(train=12, val=3)
    LAYOUTS["YOLO"](tmp_path, splits)
    parts = find_splits(tmp_path, "val=0.5").parts(seed=0)
    assert boxes_of(parts["val"]).total() == 6
    assert "val: left alone" in capsys.readouterr().out


def test_a_folder_without_a_training_split_is_refused_with_its_splits(tmp_path: Path) -> None:
    records = drawn_splits(val=3)["val"]
    images(tmp_path / "images/val", records)
    yolo_labels(tmp_path / "labels/val", records)
    (tmp_path / "data.yaml").write_text(f"val: images/val\nnames: [{', '.join(CLASSES)}]")
    with pytest.raises(FitError, match=r"no split is called train \(there are val\)"):
        find_splits(tmp_path, None)
    with pytest.raises(SourceError, match="no data set was recognised"):
        find_splits(tmp_path / "images", None)
