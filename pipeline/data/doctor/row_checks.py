"""Checks of the rows of one row group, and summaries that merge from row groups up to a split."""

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.data.augment.decode import UndecodableImageError, decode_rgb, exif_orientation, image_size
from pipeline.data.doctor.findings import DARK_LEVEL, EDGE_TOLERANCE_PX, EXAMPLES, QUERIES, Example, Tally
from pipeline.data.shards.manifest import Statistics
from pipeline.data.shards.records import SHARD_SCHEMA
from pipeline.data.shards.set_statistics import add_up, count_rows

ROUNDING_PX = 0.01  # float32 rounding of a corner
INPUT_SIDE, TINY_SIDE = 640, 32  # px
SIDE_EDGES = np.array([0, *2 ** (np.arange(39) / 4)])  # px, four bins per octave up to 724; TINY_SIDE is one of them
SIZE_CELL = 32  # px; image sizes are rounded to multiples of this
LISTS = ("boxes", "labels", "areas", "crowd")


@dataclass(frozen=True)
class RowGroupLocation:
    """Location of a row group."""

    split: str  # name in examples
    shard: int
    file: str  # name of the shard
    first_row: int = 0  # within the shard


@dataclass(frozen=True)
class RowIndex:
    """About 70 bytes per image, kept until the end to find images that occur twice."""

    shard: NDArray[np.int32]  # [N]
    row: NDArray[np.int32]  # [N] within the shard
    image_id: NDArray[np.int64]  # [N]
    content: NDArray[np.void]  # [N] hash of the encoded image, 16 bytes
    file_name: pa.StringArray  # [N]


@dataclass(frozen=True)
class Summary:
    """Findings in some rows, and counts over the intact ones."""

    tally: Tally
    index: RowIndex
    statistics: Statistics | None  # over the rows that can be counted; None if there are none
    counted: int  # rows in `statistics`
    scaled_sides: NDArray[np.int64]  # boxes to learn by sqrt(area) at 640x640, between SIDE_EDGES
    image_sizes: Counter[tuple[int, int]]  # images by (width, height) in units of SIZE_CELL


def empty_summary(tally: Tally) -> Summary:
    """Summary of no rows, with the given findings."""
    rows = np.empty(0, np.int32)
    none = RowIndex(rows, rows, np.empty(0, np.int64), np.empty(0, "V16"), pa.array([], pa.string()))
    return Summary(tally, none, None, 0, np.zeros(len(SIDE_EDGES) - 1, np.int64), Counter())


def merge_summaries(parts: Sequence[Summary]) -> Summary:
    """Merge the summaries of at least one part."""
    tally, image_sizes = Tally(), Counter[tuple[int, int]]()
    for part in parts:
        tally.merge(part.tally)
        image_sizes.update(part.image_sizes)
    statistics = [part.statistics for part in parts if part.statistics]
    return Summary(
        tally=tally,
        index=RowIndex(
            shard=np.concatenate([part.index.shard for part in parts]),
            row=np.concatenate([part.index.row for part in parts]),
            image_id=np.concatenate([part.index.image_id for part in parts]),
            content=np.concatenate([part.index.content for part in parts]),
            file_name=pa.concat_arrays([part.index.file_name for part in parts]),
        ),
        statistics=add_up(statistics) if statistics else None,
        counted=sum(part.counted for part in parts),
        scaled_sides=np.sum([part.scaled_sides for part in parts], axis=0),
        image_sizes=image_sizes,
    )


def check_rows(
    rows: pa.Table, location: RowGroupLocation, *, num_classes: int, decode: bool, marks: bool = False
) -> Summary:
    """Check the rows of one row group. A row with missing values or unequal lists is not checked further.

    Args:
        rows: [I] rows of SHARD_SCHEMA, with unchecked values.
        decode: decode every image; otherwise only headers are read.
        marks: look for EXIF orientation, in sets that were prepared when it was mostly ignored.
    """
    # Rows whose structure is broken are reported and left out.
    rows = rows.set_column(rows.column_names.index("file_name"), "file_name", _readable(rows["file_name"]))
    findings = _RowFindings(rows, location, np.arange(len(rows)))
    incomplete = _lacks_a_value(rows)
    lengths = {name: pc.fill_null(pc.list_value_length(rows[name]), 0).to_numpy() for name in LISTS}
    groups = [lengths["boxes"] / 4, lengths["labels"], lengths["areas"], lengths["crowd"]]
    unequal = ~incomplete & (np.ptp(groups, axis=0) > 0)
    findings.add("value-missing", incomplete)
    findings.add("list-lengths", unequal, lambda i: ", ".join(f"{lengths[name][i]} {name}" for name in LISTS))

    # All other checks see intact rows only.
    intact = np.flatnonzero(~incomplete & ~unequal)
    if len(intact) == 0:
        return empty_summary(findings.tally)
    rows = rows.take(intact).combine_chunks() if len(intact) < len(rows) else rows
    findings = _RowFindings(rows, location, intact, findings.tally)
    _check_images(rows, findings, decode, marks)
    countable = _check_boxes(rows, findings, num_classes)
    return Summary(
        tally=findings.tally,
        index=RowIndex(
            shard=np.full(len(intact), location.shard, np.int32),
            row=findings.numbers.astype(np.int32),
            image_id=rows["image_id"].to_numpy(),
            content=_content_hashes(rows),
            file_name=findings.names,
        ),
        statistics=count_rows(rows.filter(pa.array(countable)), num_classes) if countable.any() else None,
        counted=int(countable.sum()),
        scaled_sides=_scaled_sides(rows),
        image_sizes=_image_sizes(rows),
    )


class _RowFindings:
    """Adds findings of some rows of a row group to a tally, with their locations."""

    def __init__(
        self, rows: pa.Table, location: RowGroupLocation, rows_of_group: NDArray[Any], tally: Tally | None = None
    ) -> None:
        self.tally = tally or Tally()
        self.numbers = rows_of_group + location.first_row  # [I] in the shard
        self.names: pa.StringArray = rows["file_name"].combine_chunks()
        self._image_ids = rows["image_id"].to_pylist()
        self._location = location

    def add(
        self,
        code: str,
        where: NDArray[np.bool_],
        detail: Callable[[int], str] = lambda _: "",
        *,
        magnitude: NDArray[Any] | None = None,
        image: NDArray[np.int64] | None = None,
    ) -> None:
        """Count the cases; those of largest magnitude become examples.

        Args:
            where: mask of the cases, [I] over images or [G] over boxes.
            detail: describes case number i.
            magnitude: severity of each entry of `where`.
            image: [G] image of each box, ascending; None if `where` is over images.
        """
        cases = np.flatnonzero(where)
        if magnitude is not None:
            cases = cases[np.argsort(-magnitude[cases], kind="stable")]
        examples = []
        for case in cases[:EXAMPLES].tolist():
            i = case if image is None else int(image[case])
            examples.append(
                Example(
                    split=self._location.split,
                    shard=self._location.file,
                    row=int(self.numbers[i]),
                    image_id=self._image_ids[i],
                    file_name=self.names[i].as_py(),
                    box=None if image is None else case - int(np.searchsorted(image, i)),
                    detail=detail(case),
                    magnitude=0.0 if magnitude is None else float(magnitude[case]),
                )
            )
        self.tally.add(code, examples, len(cases))


def _lacks_a_value(rows: pa.Table) -> NDArray[np.bool_]:
    """Mask [I] of rows in which a column, or an element of a list, is null."""
    lacking = np.zeros(len(rows), np.bool_)
    for name in SHARD_SCHEMA.names:
        column = rows[name].combine_chunks()
        lacking |= column.is_null().to_numpy(zero_copy_only=False)
        if name in LISTS and (elements := column.flatten()).null_count:
            is_null = elements.is_null().to_numpy(zero_copy_only=False)
            lacking[pc.list_parent_indices(column).to_numpy()[is_null]] = True
    return lacking


def _readable(names: pa.ChunkedArray) -> pa.StringArray:
    """Decode file names; damaged ones may not be UTF-8."""
    return pa.array([name and name.decode(errors="replace") for name in names.cast("binary").to_pylist()], pa.string())


def _check_images(rows: pa.Table, findings: _RowFindings, decode: bool, marks: bool) -> None:
    codes = ("image-undecodable", "image-size", "image-dark", "exif-kept")
    problems: dict[str, dict[int, str]] = {code: {} for code in codes}
    annotated = zip(rows["width"].to_pylist(), rows["height"].to_pylist(), strict=True)
    for i, (image, size) in enumerate(zip(rows["image"], annotated, strict=True)):
        encoded = image.as_py()
        try:
            stored = image_size(encoded)
            if marks and (mark := exif_orientation(encoded)) != 1:
                problems["exif-kept"][i] = f"orientation {mark}"
            # An eighth of the size still reads the whole file, in less than half the time.
            if decode and decode_rgb(encoded, *stored, divisor=8).max() <= DARK_LEVEL:
                brightest = int(decode_rgb(encoded, *stored).max())
                if brightest <= DARK_LEVEL:
                    problems["image-dark"][i] = f"its brightest level is {brightest}"
        except UndecodableImageError as error:
            problems["image-undecodable"][i] = str(error)
        else:
            if stored != size:
                hint = ", as if rotated by 90 degrees" if stored == size[::-1] else ""
                problems["image-size"][i] = "the image is {} x {}, its row says {} x {}".format(*stored, *size) + hint
    for code, cases in problems.items():
        findings.add(code, np.isin(np.arange(len(rows)), list(cases)), cases.__getitem__)


def _check_boxes(rows: pa.Table, findings: _RowFindings, num_classes: int) -> NDArray[np.bool_]:
    """Check all boxes; return a mask [I] of the images whose labels are all known, so that their boxes can be counted."""
    image, boxes, sizes = _flat_boxes(rows)
    labels, areas, crowd = (_flat(rows, name) for name in ("labels", "areas", "crowd"))
    finite: NDArray[np.bool_] = np.all(np.isfinite(boxes), axis=1)
    has_area: NDArray[np.bool_] = np.all(boxes[:, 2:] > boxes[:, :2], axis=1)
    outside: NDArray[np.bool_] = np.any((boxes[:, :2] >= sizes) | (boxes[:, 2:] <= 0), axis=1)
    touches = finite & has_area & ~outside
    beyond = np.concatenate([-boxes[:, :2], boxes[:, 2:] - sizes], axis=1).max(1, initial=0)  # px over the edge
    copies = finite & _seen_before(np.column_stack([image, labels, boxes]))
    known = (labels >= 0) & (labels < num_classes)
    learned = np.bincount(image[~crowd], minlength=len(rows))  # [I]

    # Texts of the examples.
    def corners(g: int) -> str:
        return "xyxy " + ", ".join(f"{corner:.6g}" for corner in boxes[g])

    def over_the_edge(g: int) -> str:
        return f"{corners(g)} extends beyond {sizes[g, 0]} x {sizes[g, 1]} by {beyond[g]:.3g} px"

    # Each box gets at most one of the first five findings.
    findings.add("box-not-finite", ~finite, corners, image=image)
    findings.add("box-degenerate", finite & ~has_area, corners, image=image)
    findings.add("box-outside", finite & has_area & outside, corners, image=image)
    past = touches & (beyond > EDGE_TOLERANCE_PX)
    findings.add("box-past-edge", past, over_the_edge, magnitude=beyond, image=image)
    rounded = touches & (beyond > ROUNDING_PX) & ~past
    findings.add("box-rounded", rounded, over_the_edge, magnitude=beyond, image=image)
    findings.add("box-repeated", copies, corners, image=image)
    findings.add("label-unknown", ~known, lambda g: f"label {labels[g]}, known are 0..{num_classes - 1}", image=image)
    no_area = ~(np.isfinite(areas) & (areas > 0))
    findings.add("area-not-positive", no_area, lambda g: f"area {areas[g]:g}, {corners(g)}", image=image)
    findings.add("image-crowded", learned > QUERIES, lambda i: f"{learned[i]} boxes", magnitude=learned)
    findings.add("image-empty", learned == 0)
    return np.bincount(image[~known], minlength=len(rows)) == 0


def _flat_boxes(rows: pa.Table) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.int32]]:
    """Image index [G] of each box, corners [G, 4] xyxy in pixels, and width and height [G, 2] of the image."""
    image = np.repeat(np.arange(len(rows)), pc.list_value_length(rows["labels"]).to_numpy())
    sizes = np.stack([rows["width"].to_numpy(), rows["height"].to_numpy()], axis=1)
    return image, _flat(rows, "boxes").reshape(-1, 4), sizes[image]


def _flat(rows: pa.Table, name: str) -> NDArray[Any]:
    return pc.list_flatten(rows[name]).to_numpy()


def _seen_before(rows: NDArray[Any]) -> NDArray[np.bool_]:
    """Mask [G] of rows that equal an earlier one."""
    _, first = np.unique(rows, axis=0, return_index=True)
    seen = np.ones(len(rows), np.bool_)
    seen[first] = False
    return seen


def _content_hashes(rows: pa.Table) -> NDArray[np.void]:
    """Hash [I] of the encoded bytes; an image that was re-encoded counts as another one."""
    hashes = [hashlib.blake2b(image.as_buffer(), digest_size=16).digest() for image in rows["image"]]
    return np.frombuffer(b"".join(hashes), "V16")


def _scaled_sides(rows: pa.Table) -> NDArray[np.int64]:
    """Histogram of sqrt(area) of the boxes to learn, once the image is stretched to 640x640."""
    _, boxes, sizes = _flat_boxes(rows)
    learned = np.isfinite(boxes).all(1) & ~_flat(rows, "crowd")
    corners, size = boxes[learned].reshape(-1, 2, 2), sizes[learned]  # [G, 2, 2], [G, 2]
    sides = np.diff(corners.clip(0, size[:, None]), axis=1)[:, 0].clip(0) / size.clip(1) * INPUT_SIDE
    return np.histogram(np.sqrt(sides.prod(1)), SIDE_EDGES)[0]


def _image_sizes(rows: pa.Table) -> Counter[tuple[int, int]]:
    sizes = np.stack([rows["width"].to_numpy(), rows["height"].to_numpy()], axis=1)
    return Counter((width, height) for width, height in np.rint(sizes / SIZE_CELL).astype(int).tolist())
