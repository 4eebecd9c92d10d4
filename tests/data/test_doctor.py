"""Realistic damage to shards, and the findings of the doctor for each."""

import hashlib
import io
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import simplejpeg
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from jobs.doctor import main
from pipeline.data.doctor.examine import DoctorReport, examine, groups_of_equal
from pipeline.data.doctor.findings import FINDING_KINDS, Finding
from pipeline.data.doctor.html_report import doctor_page, doctor_text
from pipeline.data.doctor.thumbnails import thumbnail
from pipeline.data.prepare.prepare import prepare
from pipeline.data.prepare.shard_writer import PrepareOptions
from pipeline.data.shards.manifest import MANIFEST_NAME, ShardSet, load_shards
from pipeline.data.shards.records import REJECTED_SCHEMA, SHARD_SCHEMA, ImageRecord
from pipeline.data.sources.synthetic import CLASSES, synthetic_source
from pipeline.ray_cluster import start_ray
from tests.support.synthetic_shards import stored_rows, synthetic_records, write_shards

ROWS, GROUP_ROWS, SHARD_ROWS = 24, 4, 12
BROKEN_ROW, BROKEN_ID, BROKEN_NAME = 5, 6, "00000005.jpg"  # of the first shard; it has boxes

Row = dict[str, Any]


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    start_ray(num_cpus=2)
    yield
    ray.shutdown()


@pytest.fixture
def shards(tmp_path: Path) -> ShardSet:
    return written(tmp_path / "train", synthetic_records(ROWS))


def written(folder: Path, records: Sequence[ImageRecord]) -> ShardSet:
    return write_shards(folder, records, group_rows=GROUP_ROWS, shard_rows=SHARD_ROWS)


def with_manifest(shards: ShardSet, change: Callable[[Row], None]) -> ShardSet:
    path = Path(shards.uri) / MANIFEST_NAME
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    return load_shards(shards.uri)


def with_table(shards: ShardSet, table: pa.Table) -> ShardSet:
    """Replace the first shard, with the hash and size of the new file: only its content shows that it is wrong."""
    path = Path(shards.shard_uri(0))
    pq.write_table(table, path, row_group_size=GROUP_ROWS, compression="none")
    content = path.read_bytes()

    def update(manifest: Row) -> None:
        manifest["shards"][0] |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}

    return with_manifest(shards, update)


def with_row(shards: ShardSet, change: Callable[[Row], None]) -> ShardSet:
    rows = pq.read_table(shards.shard_uri(0)).to_pylist()
    assert (rows[BROKEN_ROW]["image_id"], rows[BROKEN_ROW]["file_name"]) == (BROKEN_ID, BROKEN_NAME)
    assert len(rows[BROKEN_ROW]["labels"]) >= 2
    change(rows[BROKEN_ROW])
    return with_table(shards, pa.Table.from_pylist(rows, schema=SHARD_SCHEMA))


def serious(report: DoctorReport) -> set[str]:
    """Codes of errors and warnings; the sets here are too small for all classes to be frequent."""
    return {f.code for f in report.findings if f.severity != "note"} - {"class-rare", "class-empty"}


def only(report: DoctorReport, code: str) -> Finding:
    (finding,) = [finding for finding in report.findings if finding.code == code]
    return finding


def locations(finding: Finding) -> list[tuple[str | None, int | None, int | None, str | None]]:
    return [(e.shard, e.row, e.image_id, e.file_name) for e in finding.examples]


UNREADABLE = ("list-lengths", "value-missing")
BROKEN_LOCATION = [("part-00000.parquet", BROKEN_ROW, BROKEN_ID, BROKEN_NAME)]


def test_a_prepared_set_has_no_errors(tmp_path: Path) -> None:
    options = PrepareOptions(shard_mib=0.02, row_group_rows=8)
    source = synthetic_source(30, longest_side=64, max_shapes=6)
    shards = prepare(source, str(tmp_path / "train"), split="train", options=options)
    assert len(shards.manifest.shards) > 1
    report = examine([shards])
    assert not serious(report)
    (split,) = report.splits
    assert split.statistics == shards.manifest.statistics
    assert split.images_counted == split.images == 30


def test_classes_sizes_and_empty_images_are_those_that_a_loop_counts(tmp_path: Path) -> None:
    records = synthetic_records(40, longest_side=320)
    report = examine([written(tmp_path / "train", records)])
    boxes, tiny, empty = Counter[str](), 0, []
    for record in records:
        learned = [g for g in range(len(record.labels)) if not record.crowd[g]]
        boxes.update(CLASSES[record.labels[g]] for g in learned)
        for left, top, right, bottom in record.boxes[learned].tolist():
            width, height = (right - left) * 640 / record.width, (bottom - top) * 640 / record.height
            tiny += width * height < 32**2
        if not learned:
            empty.append(record.image_id)
    assert tiny
    assert empty
    (split,) = report.splits
    assert split.tiny_boxes == tiny
    assert sum(split.scaled_sides) == boxes.total()
    assert sum(cell.images for cell in split.image_sizes) == len(records)
    rare = sorted((count, name) for name, count in boxes.items() if count < 10)
    assert rare
    assert only(report, "class-rare").examples[0].detail == ", ".join(f"{name} {count}" for count, name in rare)
    assert [example.image_id for example in only(report, "image-empty").examples] == empty
    assert "class-empty" not in serious(report)


def flip(path: Path, inside: bytes) -> str:
    """Flip the highest bit of the byte in the middle of `inside`; the new SHA-256."""
    content = bytearray(path.read_bytes())
    content[content.index(inside) + len(inside) // 2] ^= 0x80
    path.write_bytes(content)
    return hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("column", ["image", "file_name"])
def test_a_flipped_bit_is_found_by_its_hash(shards: ShardSet, column: str) -> None:
    value = pq.read_table(shards.shard_uri(1))[column][0].as_py()
    sha256 = flip(Path(shards.shard_uri(1)), value if column == "image" else value.encode())
    report = examine([shards])
    (example,) = only(report, "shard-hash").examples
    assert example.shard == "part-00012.parquet"
    assert sha256 in example.detail
    assert report.splits[0].images_counted == ROWS  # the rows are looked at all the same


def cut_off(row: Row) -> None:
    row["image"] = row["image"][: len(row["image"]) * 2 // 3]


def widen(row: Row) -> None:
    row["width"] += 1


def corners(*box: float) -> Callable[[Row], None]:
    def change(row: Row) -> None:
        row["boxes"][4:8] = box

    return change


def past_the_right_edge(row: Row) -> None:
    row["boxes"][6] = row["width"] + 7.5


def label(value: int) -> Callable[[Row], None]:
    def change(row: Row) -> None:
        row["labels"][1] = value

    return change


def area(value: float) -> Callable[[Row], None]:
    def change(row: Row) -> None:
        row["areas"][1] = value

    return change


def repeat_a_box(row: Row) -> None:
    row["boxes"][4:8] = row["boxes"][:4]
    row["labels"][1] = row["labels"][0]


def lose_a_label(row: Row) -> None:
    row["labels"].pop()


def lose(column: str) -> Callable[[Row], None]:
    def change(row: Row) -> None:
        row[column] = None

    return change


def lose_a_corner(row: Row) -> None:
    row["boxes"][3] = None


@pytest.mark.parametrize(
    ("change", "code", "detail"),
    [
        (cut_off, "image-undecodable", "truncated"),
        (lambda row: row.update(image=b""), "image-undecodable", "cannot be opened: cannot identify"),
        (widen, "image-size", "the image is 35 x 48, its row says 36 x 48"),
        (corners(3, float("nan"), 5, 6), "box-not-finite", "xyxy 3, nan, 5, 6"),
        (corners(3, 4, float("inf"), 6), "box-not-finite", "xyxy 3, 4, inf, 6"),
        (corners(3, 4, 3, 9), "box-degenerate", "xyxy 3, 4, 3, 9"),
        (corners(9, 4, 3, 9), "box-degenerate", "xyxy 9, 4, 3, 9"),
        (corners(48, 4, 60, 9), "box-outside", "xyxy 48, 4, 60, 9"),
        (corners(3, -9, 6, 0), "box-outside", "xyxy 3, -9, 6, 0"),
        (past_the_right_edge, "box-past-edge", "by 7.5 px"),
        (label(99), "label-unknown", "label 99"),
        (label(-1), "label-unknown", "label -1"),
        (area(float("nan")), "area-not-positive", "area nan"),
        (repeat_a_box, "box-repeated", "xyxy"),
        (lose_a_label, "list-lengths", "labels"),
        (lose("image"), "value-missing", ""),
        (lose("boxes"), "value-missing", ""),
        (lose_a_corner, "value-missing", ""),
    ],
)
def test_a_damaged_row_is_found_and_named(
    shards: ShardSet, change: Callable[[Row], None], code: str, detail: str
) -> None:
    damaged = with_row(shards, change)
    report = examine([damaged])
    finding = only(report, code)
    assert finding.count == 1
    assert locations(finding) == BROKEN_LOCATION
    assert detail in finding.examples[0].detail
    if code.startswith(("box", "label", "area")):
        assert finding.examples[0].box == 1
    assert serious(report) - {"statistics-differ"} == {code}
    assert BROKEN_NAME in doctor_text(report)
    assert thumbnail(damaged, 0, BROKEN_ROW) or code in UNREADABLE


def test_a_rotated_image_is_reported_as_rotated(shards: ShardSet) -> None:
    turned = with_row(shards, lambda row: row.update(width=row["height"], height=row["width"]))
    detail = "the image is 35 x 48, its row says 48 x 35, as if rotated by 90 degrees"
    assert only(examine([turned]), "image-size").examples[0].detail == detail


def test_without_decoding_a_truncated_image_is_not_found_and_the_report_states_that(shards: ShardSet) -> None:
    report = examine([with_row(shards, cut_off)], decode=False)
    assert not serious(report)
    assert "images were not decoded" in doctor_text(report)


def test_without_decoding_a_wrong_size_is_found(shards: ShardSet) -> None:
    assert "image-size" in serious(examine([with_row(shards, widen)], decode=False))


def test_rounding_at_the_edge_is_only_noted(shards: ShardSet) -> None:
    report = examine([with_row(shards, lambda row: row["boxes"].__setitem__(4, -0.5))])
    assert only(report, "box-rounded").severity == "note"
    assert not serious(report)


def test_the_worst_boxes_are_the_examples(tmp_path: Path) -> None:
    def reaching_over(record: ImageRecord, by: float) -> ImageRecord:
        boxes = record.boxes.copy()
        boxes[0, 2] = record.width + by
        return replace(record, boxes=boxes)

    overshoot = [2.0 + 7 * n % 23 for n in range(ROWS)]  # px, in no order
    records = [reaching_over(record, px) for record, px in zip(synthetic_records(ROWS), overshoot, strict=True)]
    finding = only(examine([written(tmp_path / "train", records)]), "box-past-edge")
    worst = np.argsort(overshoot, kind="stable")[::-1][:5]
    assert finding.count == ROWS
    assert [example.magnitude for example in finding.examples] == [overshoot[n] for n in worst]


def test_more_boxes_than_queries_are_a_warning(tmp_path: Path) -> None:
    image = simplejpeg.encode_jpeg(np.zeros((400, 400, 3), np.uint8))
    left, top = (grid.ravel() * 20.0 for grid in np.mgrid[:20, :20])
    boxes = np.stack([left, top, left + 10, top + 10], axis=1).astype(np.float32)

    def crowded(image_id: int, count: int) -> ImageRecord:
        rest = np.zeros(count, np.int32), np.full(count, 100, np.float32), np.zeros(count, np.bool_)
        return ImageRecord(image_id, f"{image_id}.jpg", 400, 400, image + bytes([image_id]), boxes[:count], *rest)

    report = examine([written(tmp_path / "train", [crowded(1, 300), crowded(2, 301), crowded(3, 400)])])
    finding = only(report, "image-crowded")
    assert [(e.image_id, e.detail) for e in finding.examples] == [(3, "400 boxes"), (2, "301 boxes")]


def test_a_repeated_id_names_both_images(tmp_path: Path) -> None:
    records = synthetic_records(ROWS)
    records[20] = replace(records[20], image_id=records[3].image_id)
    report = examine([written(tmp_path / "train", records)])
    finding = only(report, "image-id-repeated")
    assert serious(report) == {"image-id-repeated"}
    assert locations(finding) == [("part-00000.parquet", 3, 4, "00000003.jpg")]
    assert finding.examples[0].detail == "the same in part-00012.parquet row 8, image 4 (00000020.jpg)"


def test_a_file_that_occurs_twice_in_a_split_is_a_warning(tmp_path: Path) -> None:
    records = synthetic_records(ROWS)
    twin = records[3]
    records[20] = replace(twin, image_id=21, file_name="twin.jpg")
    report = examine([written(tmp_path / "train", records)])
    assert serious(report) == {"image-repeated"}
    assert "twin.jpg" in only(report, "image-repeated").examples[0].detail


def test_an_image_in_two_splits_is_an_error(tmp_path: Path, shards: ShardSet) -> None:
    others = synthetic_records(5, seed=1)
    others[2] = replace(synthetic_records(ROWS)[14], image_id=77, file_name="seen.jpg")
    val = with_manifest(written(tmp_path / "val", others), lambda manifest: manifest.update(split="val"))
    report = examine([shards, val])
    finding = only(report, "image-in-splits")
    assert finding.splits == ("synthetic", "val")
    assert locations(finding) == [("part-00012.parquet", 2, 15, "00000014.jpg")]
    assert finding.examples[0].detail == "also in val: part-00000.parquet row 2, image 77 (seen.jpg)"
    assert serious(report) == {"image-in-splits"}


def test_splits_with_other_categories_are_an_error(tmp_path: Path, shards: ShardSet) -> None:
    def rename(manifest: Row) -> None:
        manifest["categories"][2]["name"] = "tricorn"

    other = with_manifest(written(tmp_path / "val", synthetic_records(5, seed=1)), rename)
    finding = only(examine([shards, other]), "categories-differ")
    assert "2 is 'triangle' and 'tricorn'" in finding.examples[0].detail


def delete(path: Path) -> None:
    path.unlink()


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(("damage", "codes"), [(delete, {"shard-missing"}), (cut, {"shard-size", "shard-unreadable"})])
def test_the_other_shards_are_checked_although_one_is_lost(
    shards: ShardSet, damage: Callable[[Path], None], codes: set[str]
) -> None:
    damage(Path(shards.shard_uri(1)))
    report = examine([shards])
    assert serious(report) == codes
    assert all(only(report, code).examples[0].shard == "part-00012.parquet" for code in codes)
    assert report.splits[0].images_counted == SHARD_ROWS
    assert doctor_page(report, [shards])


def test_a_row_group_that_cannot_be_read_does_not_hide_the_others(shards: ShardSet) -> None:
    path = Path(shards.shard_uri(0))
    content = bytearray(path.read_bytes())
    page = pq.read_metadata(path).row_group(1).column(SHARD_SCHEMA.get_field_index("image")).data_page_offset
    content[page : page + 16] = bytes(range(240, 256))
    path.write_bytes(content)
    report = examine([shards])
    assert serious(report) == {"shard-hash", "shard-unreadable"}
    assert only(report, "shard-unreadable").examples[0].detail.startswith("1 of 3 row groups; row group 1:")
    assert report.splits[0].images_counted == ROWS - GROUP_ROWS


def test_row_groups_that_differ_from_the_manifest_are_an_error(shards: ShardSet) -> None:
    def change(manifest: Row) -> None:
        manifest["shards"][0]["row_groups"] = [4, 5, 3]

    finding = only(examine([with_manifest(shards, change)]), "shard-row-groups")
    assert finding.examples[0].detail == "row groups: 4, 4, 4; the manifest says 4, 5, 3"


def test_another_schema_is_an_error(shards: ShardSet) -> None:
    table = pq.read_table(shards.shard_uri(0)).drop_columns("crowd")
    finding = only(examine([with_table(shards, table)]), "shard-schema")
    assert finding.examples[0].detail == "crowd is missing, not list<item: bool>"


def test_statistics_that_are_not_those_of_the_rows_are_an_error(shards: ShardSet) -> None:
    counts = list(shards.manifest.statistics.class_counts)

    def change(manifest: Row) -> None:
        manifest["statistics"]["class_counts"][3] += 2

    report = examine([with_manifest(shards, change)])
    assert serious(report) == {"statistics-differ"}
    detail = f"class_counts.3 is {counts[3] + 2} in the manifest, {counts[3]} counted"
    assert [example.detail for example in only(report, "statistics-differ").examples] == [detail]


def test_rejected_rows_are_counted_by_reason(shards: ShardSet) -> None:
    rows = [
        {"image_id": 1, "file_name": "a.jpg", "kind": "box", "reason": "degenerate box", "detail": "xyxy 1, 1, 1, 1"},
        {"image_id": 2, "file_name": "b.jpg", "kind": "image", "reason": "missing file", "detail": "/b.jpg"},
        {"image_id": 3, "file_name": "c.jpg", "kind": "image", "reason": "missing file", "detail": "/c.jpg"},
    ]
    shards = with_manifest(shards, lambda manifest: manifest.update(rejected=3))
    assert serious(examine([shards])) == {"rejected-list"}  # there is none yet
    pq.write_table(pa.Table.from_pylist(rows, schema=REJECTED_SCHEMA), Path(shards.uri) / "rejected.parquet")
    finding = only(examine([shards]), "rejected")
    assert finding.count == 3
    assert [example.detail for example in finding.examples] == [
        "image, missing file: 2, such as b.jpg: /b.jpg",
        "box, degenerate box: 1, such as a.jpg: xyxy 1, 1, 1, 1",
    ]


# The command


def test_the_exit_code_is_1_if_there_are_errors(
    shards: ShardSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([f"{shards.uri}/{MANIFEST_NAME}"]) == 0
    assert "0 errors" in capsys.readouterr().out
    Path(shards.shard_uri(0)).unlink()
    assert main([shards.uri, "--json"]) == 1
    printed = json.loads(capsys.readouterr().out)
    assert "shard-missing" in {finding["code"] for finding in printed["findings"]}
    with pytest.raises(SystemExit) as nothing_to_check:
        main([str(tmp_path / "nowhere")])
    assert nothing_to_check.value.code == 2
    assert "dfine prepare" in capsys.readouterr().err
    with pytest.raises(SystemExit) as bad_usage:
        main(["--no-such-option"])
    assert bad_usage.value.code == 2


def test_the_same_set_twice_is_bad_usage(shards: ShardSet, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as bad_usage:
        main([shards.uri, f"{shards.uri}/{MANIFEST_NAME}"])
    assert bad_usage.value.code == 2
    assert "twice" in capsys.readouterr().err


class Page(HTMLParser):
    """Tags with their attributes, and the texts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_the_page_stands_alone_and_shows_every_box(shards: ShardSet, tmp_path: Path) -> None:
    assert main([shards.uri, "--html", str(tmp_path / "page.html")]) == 0
    page = Page((tmp_path / "page.html").read_text())
    linked = [value for _, tag in page.tags for name in ("src", "href") if (value := tag.get(name))]
    assert len(linked) == ROWS + 4  # thumbnails, plots
    assert all(value.startswith("data:image/") for value in linked)
    drawn = sorted(
        tuple(float(tag[name] or 0) for name in ("x", "y", "width", "height"))
        for kind, tag in page.tags
        if kind == "rect" and str(tag["class"]).startswith("box")
    )
    boxes = [box for row in stored_rows(shards)["boxes"].to_pylist() for box in np.reshape(row, (-1, 4)).tolist()]
    np.testing.assert_allclose(drawn, sorted((x, y, right - x, bottom - y) for x, y, right, bottom in boxes), rtol=1e-6)


def test_names_from_the_data_are_text_on_the_page(shards: ShardSet) -> None:
    evil = "<script>alert('&')</script>"

    def rename(manifest: Row) -> None:
        for category in manifest["categories"]:
            category["name"] = evil

    shards = with_manifest(shards, rename)
    page = Page(doctor_page(examine([shards]), [shards]))
    assert "script" not in {tag for tag, _ in page.tags}
    assert evil in page.texts


def test_a_name_that_several_categories_have_is_found(shards: ShardSet) -> None:
    def rename(manifest: Row) -> None:
        manifest["categories"][1]["name"] = manifest["categories"][0]["name"].upper()

    found = only(examine([with_manifest(shards, rename)]), "class-name-repeated")
    assert (found.severity, found.count, found.examples[0].detail) == ("warning", 1, f"{CLASSES[0]} (0, 1)")


def test_marks_of_turned_images_are_found_in_sets_that_were_prepared_without_a_rule_for_them(shards: ShardSet) -> None:
    exif = Image.Exif()
    exif[0x0112] = 3

    def mark(row: Row) -> None:
        stream = io.BytesIO()
        Image.new("RGB", (row["width"], row["height"]), "red").save(stream, "JPEG", exif=exif)
        row["image"] = stream.getvalue()

    marked = with_row(shards, mark)
    for options, found in (({"seed": 0}, True), ({"seed": 0, "exif": "upright"}, False)):
        report = examine([with_manifest(marked, lambda manifest, options=options: manifest.update(options=options))])
        assert ("exif-kept" in serious(report)) == found
        if found:
            assert locations(only(report, "exif-kept")) == BROKEN_LOCATION
            assert only(report, "exif-kept").examples[0].detail == "orientation 3"


def test_twelve_bits_stored_in_sixteen_are_found_as_dark_images(tmp_path: Path) -> None:
    levels = np.random.default_rng(0).integers(0, 4096, (48, 40)).astype(np.uint16)
    records = synthetic_records(ROWS)
    for k, image in enumerate((levels, levels << 4, np.full((48, 40), 20, np.uint8))):
        stream = io.BytesIO()
        Image.fromarray(image).save(stream, "PNG")
        records[k] = replace(records[k], image=stream.getvalue(), width=40, height=48)
    found = only(examine([written(tmp_path / "train", records)]), "image-dark")
    assert (found.count, found.examples[0].detail) == (1, "its brightest level is 15")
    assert found.examples[0].image_id == records[0].image_id


def test_every_kind_of_finding_has_advice() -> None:
    assert FINDING_KINDS
    assert all(kind.meaning.endswith(".") and kind.advice.endswith(".") for kind in FINDING_KINDS.values())


@given(st.lists(st.integers(0, 6)))
def test_groups_of_equal_are_those_of_a_loop(values: list[int]) -> None:
    positions: dict[int, list[int]] = {}
    for n, value in enumerate(values):
        positions.setdefault(value, []).append(n)
    several = [positions[value] for value in sorted(positions) if len(positions[value]) > 1]
    assert [group.tolist() for group in groups_of_equal(np.array(values, np.int64))] == several
    as_bytes = np.frombuffer(np.array([[0, value] for value in values], np.int64).tobytes(), "V16")
    assert sorted(group.tolist() for group in groups_of_equal(as_bytes)) == sorted(several)
