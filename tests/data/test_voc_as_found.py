"""VOC folders as annotation tools and people leave them."""

from pathlib import Path

import pytest
from PIL import Image

from pipeline.data.sources.index import AnnotationIndex, SourceError
from pipeline.data.sources.voc import voc_source

OBJECT = (
    "<object><name>{name}</name><bndbox><xmin>{x}</xmin><ymin>1</ymin><xmax>21</xmax><ymax>16</ymax></bndbox></object>"
)
SIZE = "<size><width>64</width><height>48</height></size>"


def xml(*, name: str = "cat", size: str = SIZE, filename: str = "a.jpg", x: float = 1, head: str = "") -> str:
    return f"{head}<annotation><filename>{filename}</filename>{size}{OBJECT.format(name=name, x=x)}</annotation>"


def write(root: Path, *names: str, **values: str) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".xml"):
            path.write_text(xml(**values))
        elif name.endswith(".txt"):
            path.write_text("")
        else:
            Image.new("RGB", (64, 48)).save(path)


def read(root: Path, split: str = "train", **options: object) -> AnnotationIndex:
    index = AnnotationIndex(shuffle=False)
    voc_source(root, split, **options).fill(index)  # type: ignore[arg-type]
    index.finish()
    return index


def images(index: AnnotationIndex) -> list[str]:
    """File names; each image must exist and have its one box."""
    for entry, boxes in index.ordered():
        assert Path(entry.uri).is_file(), entry.uri
        assert [box[1:5] for box in boxes] == [(0, 0, 21, 16)]
    return [entry.file_name for entry, _ in index.ordered()]


# Layouts


@pytest.mark.parametrize(
    "layout",
    [
        "Annotations/a.xml JPEGImages/a.jpg ImageSets/Main/train.txt",
        "Annotations/a.xml JPEGImages/a.jpg ImageSets/train.txt",
        "Annotations/a.xml JPEGImages/a.jpg",
        "annotations/a.xml images/a.jpg",
        "images/a.xml images/a.jpg",
        "a.xml a.jpg",
        "train/a.xml train/a.jpg",
        "train/annotations/a.xml train/images/a.jpg",
        "annotations/train/a.xml images/train/a.jpg",
        "training/a.xml training/a.jpg",
        "Annotations/deep/a.xml JPEGImages/deep/a.jpg",
        "Annotations/a.xml JPEGImages/a.png",
        "Annotations/a.xml JPEGImages/a.JPG",
    ],
)
def test_usual_layouts_are_found(tmp_path: Path, layout: str) -> None:
    write(tmp_path, *layout.split())
    for listing in tmp_path.rglob("train.txt"):
        listing.write_text("a\n")
    assert [Path(name).stem for name in images(read(tmp_path))] == ["a"]


def test_folders_of_splits_are_kept_apart_and_have_the_same_classes(tmp_path: Path) -> None:
    write(tmp_path, "train/a.xml", "train/a.jpg")
    write(tmp_path, "valid/b.xml", "valid/b.jpg", name="dog")
    assert (images(read(tmp_path)), images(read(tmp_path, "val"))) == (["a.jpg"], ["b.jpg"])
    for split in ("train", "val"):
        assert voc_source(tmp_path, split).description["classes"] == ["cat", "dog"]
    with pytest.raises(SourceError, match="no such folder, and no list of that name; available: train, valid"):
        read(tmp_path, "test")


def test_an_image_may_have_the_name_that_the_xml_gives(tmp_path: Path) -> None:
    write(tmp_path, "Annotations/000001.xml", "JPEGImages/photo.jpg", filename="C:\\data\\photo.jpg")
    assert images(read(tmp_path)) == ["photo.jpg"]


@pytest.mark.parametrize(
    ("line", "stem"),
    [
        ("my photo", "my photo"),
        ("my photo.jpg", "my photo"),
        ("my photo.xml", "my photo"),
        ("JPEGImages/my photo.jpg", "my photo"),
        ("sub\\my photo.jpg", "my photo"),
        ("plain -1", "plain"),
        ("my photo  1", "my photo"),
        ("v1.2", "v1.2"),
        ("caf\u00e9", "cafe\u0301"),
    ],
)
def test_lines_of_a_list_are_names_with_blanks_endings_and_folders(tmp_path: Path, line: str, stem: str) -> None:
    write(tmp_path, f"Annotations/{stem}.xml", f"JPEGImages/{stem}.jpg", "Annotations/my.xml", "JPEGImages/my.jpg")
    (tmp_path / "ImageSets/Main").mkdir(parents=True)
    (tmp_path / "ImageSets/Main/train.txt").write_bytes(b"\xef\xbb\xbf" + f"{line}\r\n".encode())
    assert images(read(tmp_path)) == [f"{stem}.jpg"]


def test_a_folder_without_annotations_is_named(tmp_path: Path) -> None:
    write(tmp_path, "a.jpg")
    with pytest.raises(SourceError, match="no XML files; expected them beside the images"):
        read(tmp_path)
    with pytest.raises(SourceError, match="no such folder"):
        read(tmp_path / "nowhere")


# Sizes, encodings, classes


@pytest.mark.parametrize(
    "size",
    [
        "",
        "<size><width></width><height></height></size>",
        "<size><width>0</width><height>0</height></size>",
        "<size><width>wide</width><height>48</height></size>",
        "<size><width>64px</width><height>48px</height></size>",
        "<size><width>64.0</width><height>48.0</height></size>",
        "<size><width>inf</width><height>nan</height></size>",
    ],
)
def test_a_size_that_the_xml_lacks_is_that_of_the_image(tmp_path: Path, size: str) -> None:
    write(tmp_path, "a.xml", "a.jpg", size=size)
    ((entry, _),) = read(tmp_path).ordered()
    assert (entry.width, entry.height) == (64, 48)


def test_without_any_size_the_image_is_listed(tmp_path: Path) -> None:
    write(tmp_path, "a.xml", "b.xml", "b.jpg", size="")
    (tmp_path / "a.jpg").write_bytes(b"not an image")
    index = read(tmp_path)
    assert images(index) == ["b.jpg"]
    assert [row[1:4] for row in index.rejected()] == [("a.jpg", "image", "unusable size")]


def test_a_size_from_an_image_marked_as_turned_is_upright(tmp_path: Path) -> None:
    write(tmp_path, "a.xml", size="")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (64, 48)).save(tmp_path / "a.jpg", exif=exif)
    ((entry, _),) = read(tmp_path).ordered()
    assert (entry.width, entry.height) == (48, 64)


@pytest.mark.parametrize("encoding", ["gb2312", "big5", "shift_jis", "latin-1", "utf-16", "utf-8"])
def test_declared_encodings_are_decoded(tmp_path: Path, encoding: str) -> None:
    name = "caf\u00e9" if encoding == "latin-1" else "\u4e2d"
    write(tmp_path, "a.jpg")
    text = xml(name=name, head=f'<?xml version="1.0" encoding="{encoding}"?>')
    (tmp_path / "a.xml").write_bytes(text.encode(encoding))
    assert voc_source(tmp_path, "train").description["classes"] == [name]


@pytest.mark.parametrize(
    "head", ['<?xml version="1.0" encoding="nonsense"?>', '<?xml version="1.0" encoding="gb2312"?>']
)
def test_an_encoding_that_is_not_so_is_one_sentence(tmp_path: Path, head: str) -> None:
    (tmp_path / "a.xml").write_bytes(head.encode() + b"<annotation>\xff\xff")
    with pytest.raises(SourceError, match=r"a\.xml: not valid XML"):
        voc_source(tmp_path, "train")


def test_one_broken_annotation_is_one_listed_image(tmp_path: Path) -> None:
    write(tmp_path, "a.xml", "a.jpg", "b.jpg", "c.jpg")
    (tmp_path / "b.xml").write_bytes(b"<annotation>\xff")
    (tmp_path / "c.xml").symlink_to("c.xml")
    index = read(tmp_path)
    assert images(index) == ["a.jpg"]
    assert [(row.file_name, row.reason) for row in index.rejected()] == [
        ("b", "unreadable annotation"),
        ("c", "unreadable annotation"),
    ]


def test_a_line_that_is_given_twice_is_one_image(tmp_path: Path) -> None:
    write(tmp_path, "Annotations/a.xml", "JPEGImages/a.jpg", "ImageSets/Main/train.txt")
    (tmp_path / "ImageSets/Main/train.txt").write_text("a 1\na.jpg\na -1\n")
    assert images(read(tmp_path)) == ["a.jpg"]


@pytest.mark.parametrize(("written", "crowd"), [("1", True), ("true", True), ("0", False), ("Unspecified", False)])
def test_difficult_objects_are_marked_in_every_form(tmp_path: Path, written: str, crowd: bool) -> None:
    write(tmp_path, "a.jpg", "a.xml")
    (tmp_path / "a.xml").write_text(xml().replace("<bndbox>", f"<difficult>{written}</difficult><bndbox>"))
    ((_, ((*_, flag, _id, _weight),)),) = read(tmp_path).ordered()
    assert bool(flag) == crowd


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (["cat", "cat"], "'cat' given twice"),
        (["cat", " cat"], "'cat' given twice"),
        (["cat", " "], "a name is blank"),
        (["Cat"], "no object is called 'Cat'; did you mean 'cat'"),
        (["elefant"], "no object is called 'elefant'; did you mean 'elephant'"),
        (["cta"], "no object is called 'cta'; did you mean 'cat'"),
        (["cat,dogs"], "no object is called 'cat,dogs'; the objects are 'cat', 'elephant'. Separate names by blanks"),
    ],
)
def test_classes_that_cannot_be_meant_are_refused_at_once(tmp_path: Path, classes: list[str], message: str) -> None:
    write(tmp_path, "a.xml", "a.jpg")
    write(tmp_path, "b.xml", "b.jpg", name="elephant")
    with pytest.raises(SourceError, match=message):
        voc_source(tmp_path, "train", classes=classes)
    voc_source(tmp_path, "train", classes=["elephant", "cat", "zebra"])  # a class that only other splits have


def test_boxes_that_begin_below_one_hint_at_zero_based_coordinates(tmp_path: Path) -> None:
    write(tmp_path, "a.jpg")
    (tmp_path / "a.xml").write_text(xml(x=0))
    (notice,) = read(tmp_path).notices
    assert (notice.code, notice.count) == ("box-from-zero", 1)
    assert read(tmp_path, one_based=False).notices == ()
