"""The doctor's checks of one row group, and the summary that adds up from there to a split."""

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.data.augment.decode import UndecodableImageError, decode_rgb, image_size
from pipeline.data.doctor.findings import EDGE_TOLERANCE_PX, EXAMPLES, QUERIES, Example, Tally
from pipeline.data.shards.manifest import Statistics
from pipeline.data.shards.records import SHARD_SCHEMA
from pipeline.data.shards.set_statistics import add_up, count_rows

ROUNDING_PX = 0.01  # what float32 may do to a corner
INPUT_SIDE, TINY_SIDE = 640, 32  # px
SIDE_EDGES = np.array([0, *2 ** (np.arange(39) / 4)])  # px, four bins per octave up to 724; TINY_SIDE is one of them
SIZE_CELL = 32  # px; image sizes are counted rounded to this
LISTS = ("boxes", "labels", "areas", "crowd")


@dataclass(frozen=True)
class Place:
    """Where a row group lies."""

    split: str  # its name in examples
    shard: int
    file: str  # of the shard
    first_row: int = 0  # in the shard


@dataclass(frozen=True)
class RowIndex:
    """What is kept of every image until the end, about 70 bytes, to find those that occur twice."""

    shard: NDArray[np.int32]  # [N]
    row: NDArray[np.int32]  # [N] of the shard
    image_id: NDArray[np.int64]  # [N]
    content: NDArray[np.void]  # [N] hash of the encoded image, 16 bytes
    file_name: pa.StringArray  # [N]


@dataclass(frozen=True)
class Summary:
    """What was found in some rows, and counts over those of them that are whole."""

    tally: Tally
    index: RowIndex
    statistics: Statistics | None  # of the rows that can be counted; None if there are none
    counted: int  # such rows
    scaled_sides: NDArray[np.int64]  # boxes to learn by sqrt(area) at 640x640, between SIDE_EDGES
    image_sizes: Counter[tuple[int, int]]  # images by (width, height) in units of SIZE_CELL


def summary_of(tally: Tally) -> Summary:
    """No rows, only what was found."""
    rows = np.empty(0, np.int32)
    none = RowIndex(rows, rows, np.empty(0, np.int64), np.empty(0, "V16"), pa.array([], pa.string()))
    return Summary(tally, none, None, 0, np.zeros(len(SIDE_EDGES) - 1, np.int64), Counter())


def merged(parts: Sequence[Summary]) -> Summary:
    """The summary of all rows together; at least one part."""
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


def check_rows(rows: pa.Table, place: Place, *, num_classes: int, decode: bool) -> Summary:
    """Everything about the rows of one row group. A row that lacks values or mixes its lists up is not looked into.

    Args:
        rows: [I] of SHARD_SCHEMA, their values unchecked.
        decode: decode every image; otherwise only its header is read.
    """
    rows = rows.set_column(rows.column_names.index("file_name"), "file_name", _readable(rows["file_name"]))
    found = _Found(rows, place, np.arange(len(rows)))
    incomplete = _lacks_a_value(rows)
    lengths = {name: pc.fill_null(pc.list_value_length(rows[name]), 0).to_numpy() for name in LISTS}
    groups = [lengths["boxes"] / 4, lengths["labels"], lengths["areas"], lengths["crowd"]]
    unequal = ~incomplete & (np.ptp(groups, axis=0) > 0)
    found.add("value-missing", incomplete)
    found.add("list-lengths", unequal, lambda i: ", ".join(f"{lengths[name][i]} {name}" for name in LISTS))

    sound = np.flatnonzero(~incomplete & ~unequal)
    if len(sound) == 0:
        return summary_of(found.tally)
    rows = rows.take(sound).combine_chunks() if len(sound) < len(rows) else rows
    found = _Found(rows, place, sound, found.tally)
    _check_images(rows, found, decode)
    countable = _check_boxes(rows, found, num_classes)
    return Summary(
        tally=found.tally,
        index=RowIndex(
            shard=np.full(len(sound), place.shard, np.int32),
            row=found.numbers.astype(np.int32),
            image_id=rows["image_id"].to_numpy(),
            content=_content_hashes(rows),
            file_name=found.names,
        ),
        statistics=count_rows(rows.filter(pa.array(countable)), num_classes) if countable.any() else None,
        counted=int(countable.sum()),
        scaled_sides=_scaled_sides(rows),
        image_sizes=_image_sizes(rows),
    )


class _Found:
    """Takes down what is found in some rows of a row group, by their places in it."""

    def __init__(self, rows: pa.Table, place: Place, rows_of_group: NDArray[Any], tally: Tally | None = None) -> None:
        self.tally = tally or Tally()
        self.numbers = rows_of_group + place.first_row  # [I] in the shard
        self.names: pa.StringArray = rows["file_name"].combine_chunks()
        self._image_ids = rows["image_id"].to_pylist()
        self._place = place

    def add(
        self,
        code: str,
        where: NDArray[np.bool_],
        detail: Callable[[int], str] = lambda i: "",
        *,
        magnitude: NDArray[Any] | None = None,
        image: NDArray[np.int64] | None = None,
    ) -> None:
        """Count where it is so; the cases of largest magnitude become examples.

        Args:
            where: [I] images, or [G] boxes.
            image: [G] of each box, ascending.
        """
        which = np.flatnonzero(where)
        if magnitude is not None:
            which = which[np.argsort(-magnitude[which], kind="stable")]
        examples = []
        for case in which[:EXAMPLES].tolist():
            i = case if image is None else int(image[case])
            examples.append(
                Example(
                    split=self._place.split,
                    shard=self._place.file,
                    row=int(self.numbers[i]),
                    image_id=self._image_ids[i],
                    file_name=self.names[i].as_py(),
                    box=None if image is None else case - int(np.searchsorted(image, i)),
                    detail=detail(case),
                    magnitude=0.0 if magnitude is None else float(magnitude[case]),
                )
            )
        self.tally.add(code, examples, len(which))


def _lacks_a_value(rows: pa.Table) -> NDArray[np.bool_]:
    """[I] whether a column is null, or an element of a list."""
    lacking = np.zeros(len(rows), np.bool_)
    for name in SHARD_SCHEMA.names:
        column = rows[name].combine_chunks()
        lacking |= column.is_null().to_numpy(zero_copy_only=False)
        if name in LISTS and (elements := column.flatten()).null_count:
            is_null = elements.is_null().to_numpy(zero_copy_only=False)
            lacking[pc.list_parent_indices(column).to_numpy()[is_null]] = True
    return lacking


def _readable(names: pa.ChunkedArray) -> pa.StringArray:
    """A damaged name need not be UTF-8."""
    return pa.array([name and name.decode(errors="replace") for name in names.cast("binary").to_pylist()], pa.string())


def _check_images(rows: pa.Table, found: _Found, decode: bool) -> None:
    trouble: dict[str, dict[int, str]] = {"image-undecodable": {}, "image-size": {}}
    annotated = zip(rows["width"].to_pylist(), rows["height"].to_pylist(), strict=True)
    for i, (image, size) in enumerate(zip(rows["image"], annotated, strict=True)):
        encoded = image.as_py()
        try:
            stored = image_size(encoded)
            if decode:
                decode_rgb(encoded, *stored, divisor=8)  # reads all of the file, for less than half the time
        except UndecodableImageError as error:
            trouble["image-undecodable"][i] = str(error)
        else:
            if stored != size:
                hint = ", as if it lay on its side" if stored == size[::-1] else ""
                trouble["image-size"][i] = "the image is {} x {}, its row says {} x {}".format(*stored, *size) + hint
    for code, cases in trouble.items():
        found.add(code, np.isin(np.arange(len(rows)), list(cases)), cases.__getitem__)


def _check_boxes(rows: pa.Table, found: _Found, num_classes: int) -> NDArray[np.bool_]:
    """[I] whether the boxes of an image can be counted: their labels are known."""
    image, boxes, sizes = _boxes(rows)
    labels, areas, crowd = (_flat(rows, name) for name in ("labels", "areas", "crowd"))
    finite: NDArray[np.bool_] = np.all(np.isfinite(boxes), axis=1)
    has_area: NDArray[np.bool_] = np.all(boxes[:, 2:] > boxes[:, :2], axis=1)
    outside: NDArray[np.bool_] = np.any((boxes[:, :2] >= sizes) | (boxes[:, 2:] <= 0), axis=1)
    touches = finite & has_area & ~outside
    beyond = np.concatenate([-boxes[:, :2], boxes[:, 2:] - sizes], axis=1).max(1, initial=0)  # px over the edge
    copies = finite & _seen_before(np.column_stack([image, labels, boxes]))
    known = (labels >= 0) & (labels < num_classes)
    learned = np.bincount(image[~crowd], minlength=len(rows))  # [I]

    def corners(g: int) -> str:
        return "xyxy " + ", ".join(f"{corner:.6g}" for corner in boxes[g])

    def over_the_edge(g: int) -> str:
        return f"{corners(g)} passes the edge of {sizes[g, 0]} x {sizes[g, 1]} by {beyond[g]:.3g} px"

    found.add("box-not-finite", ~finite, corners, image=image)
    found.add("box-degenerate", finite & ~has_area, corners, image=image)
    found.add("box-outside", finite & has_area & outside, corners, image=image)
    past = touches & (beyond > EDGE_TOLERANCE_PX)
    found.add("box-past-edge", past, over_the_edge, magnitude=beyond, image=image)
    rounded = touches & (beyond > ROUNDING_PX) & ~past
    found.add("box-rounded", rounded, over_the_edge, magnitude=beyond, image=image)
    found.add("box-repeated", copies, corners, image=image)
    found.add("label-unknown", ~known, lambda g: f"label {labels[g]}, known are 0..{num_classes - 1}", image=image)
    no_area = ~(np.isfinite(areas) & (areas > 0))
    found.add("area-not-positive", no_area, lambda g: f"area {areas[g]:g}, {corners(g)}", image=image)
    found.add("image-crowded", learned > QUERIES, lambda i: f"{learned[i]} boxes", magnitude=learned)
    found.add("image-empty", learned == 0)
    return np.bincount(image[~known], minlength=len(rows)) == 0


def _boxes(rows: pa.Table) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.int32]]:
    """[G] place of the image of each box, [G, 4] xyxy in pixels, [G, 2] width and height of the image."""
    image = np.repeat(np.arange(len(rows)), pc.list_value_length(rows["labels"]).to_numpy())
    sizes = np.stack([rows["width"].to_numpy(), rows["height"].to_numpy()], axis=1)
    return image, _flat(rows, "boxes").reshape(-1, 4), sizes[image]


def _flat(rows: pa.Table, name: str) -> NDArray[Any]:
    return pc.list_flatten(rows[name]).to_numpy()


def _seen_before(rows: NDArray[Any]) -> NDArray[np.bool_]:
    """[G] whether a row equals one before it."""
    _, first = np.unique(rows, axis=0, return_index=True)
    seen = np.ones(len(rows), np.bool_)
    seen[first] = False
    return seen


def _content_hashes(rows: pa.Table) -> NDArray[np.void]:
    """[I] of the encoded bytes: an image that was encoded again is another one."""
    hashes = [hashlib.blake2b(image.as_buffer(), digest_size=16).digest() for image in rows["image"]]
    return np.frombuffer(b"".join(hashes), "V16")


def _scaled_sides(rows: pa.Table) -> NDArray[np.int64]:
    """Boxes to learn by the side of a square as large, once the image is stretched to 640x640."""
    _, boxes, sizes = _boxes(rows)
    learned = np.isfinite(boxes).all(1) & ~_flat(rows, "crowd")
    corners, size = boxes[learned].reshape(-1, 2, 2), sizes[learned]  # [G, 2, 2], [G, 2]
    sides = np.diff(corners.clip(0, size[:, None]), axis=1)[:, 0].clip(0) / size.clip(1) * INPUT_SIDE
    return np.histogram(np.sqrt(sides.prod(1)), SIDE_EDGES)[0]


def _image_sizes(rows: pa.Table) -> Counter[tuple[int, int]]:
    sizes = np.stack([rows["width"].to_numpy(), rows["height"].to_numpy()], axis=1)
    return Counter((width, height) for width, height in np.rint(sizes / SIZE_CELL).astype(int).tolist())
