"""What the doctor can find: for each kind how bad it is, what it means and what to do about it."""

from collections import Counter
from collections.abc import Iterable
from typing import Literal, NamedTuple

from pipeline.data.shards.manifest import Data

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")
EXAMPLES = 5  # of each finding
QUERIES = 300  # of the released models: the most objects that they can detect in an image
EDGE_TOLERANCE_PX = 1.0  # boxes that pass the edge by no more were rounded, or counted from 1
RARE_BOXES = 10  # fewer are called rare
UNBALANCED_RATIO = 100  # of the most to the least frequent class
TINY_SHARE = 1 / 3  # of all boxes; 0.41 in COCO by the area of masks


class Kind(NamedTuple):
    severity: Severity
    unit: str  # what is counted
    meaning: str
    advice: str


AGAIN = "Copy the folder again from where it was prepared, or prepare the split again."
AT_SOURCE = "Correct the annotation in the source and prepare the split again."
KINDS = {
    "shard-missing": Kind("error", "shard", "The manifest names a shard that is not in its folder.", AGAIN),
    "shard-size": Kind("error", "shard", "A shard is longer or shorter than its manifest says.", AGAIN),
    "shard-hash": Kind("error", "shard", "The bytes of a shard do not have the SHA-256 in the manifest.", AGAIN),
    "shard-unreadable": Kind("error", "shard", "A shard, or a row group of it, cannot be read as Parquet.", AGAIN),
    "shard-schema": Kind(
        "error",
        "shard",
        "The columns of a shard are not those of this format; its rows were not looked at.",
        "Prepare the split again with this version.",
    ),
    "shard-row-groups": Kind(
        "error", "shard", "A shard has other row groups than its manifest says: batches would get wrong rows.", AGAIN
    ),
    "value-missing": Kind(
        "error", "image", "A row lacks a value. It was not looked at any further.", "Prepare the split again."
    ),
    "list-lengths": Kind(
        "error",
        "image",
        "Boxes, labels, areas and crowd flags of an image differ in number. The row was not looked at any further.",
        "Prepare the split again.",
    ),
    "image-undecodable": Kind(
        "error",
        "image",
        "An image is broken or cut off. Training puts another in its place, evaluation stops at it.",
        "Prepare the split again with --verify, which is the default: it leaves such images out and lists them.",
    ),
    "image-size": Kind(
        "error",
        "image",
        "An image is not as large as its row says, so its boxes lie in other pixels than the objects.",
        "Look whether the image was resized or turned after it was annotated, and prepare the split again.",
    ),
    "image-id-repeated": Kind(
        "error",
        "image",
        "Several images of a split share an id: evaluation and augmentation would take them for one.",
        "Make the ids of the source unique and prepare the split again.",
    ),
    "image-in-splits": Kind(
        "error",
        "image",
        "The same file is in several splits: a model is tested on what it was trained on.",
        "Take it out of all splits but one.",
    ),
    "categories-differ": Kind(
        "error",
        "split",
        "The splits number their categories differently: a label means one thing here and another there.",
        "Prepare all splits with the same categories in the same order.",
    ),
    "label-unknown": Kind("error", "box", "A label is none of the manifest's categories.", "Prepare the split again."),
    "box-not-finite": Kind("error", "box", "A corner of a box is NaN or infinite.", AT_SOURCE),
    "box-degenerate": Kind("error", "box", "A box has no width or no height.", AT_SOURCE),
    "box-outside": Kind(
        "error", "box", "A box lies outside its image altogether: training drops it, evaluation misses it.", AT_SOURCE
    ),
    "statistics-differ": Kind(
        "error", "value", "The manifest's statistics are not those of its rows.", "Prepare the split again."
    ),
    "box-past-edge": Kind(
        "warning",
        "box",
        f"A box passes the edge of its image by more than {EDGE_TOLERANCE_PX:g} px. Training clips it, evaluation does not.",
        "Look at the pictures: a shift or a wrong scale shows here first. Clip it in the source if it is none.",
    ),
    "box-repeated": Kind(
        "warning",
        "box",
        "A box occurs twice in an image with the same label: one of the two is always counted as missed.",
        "Remove the copy in the source and prepare the split again.",
    ),
    "area-not-positive": Kind(
        "warning",
        "box",
        "The annotated area of a box is not a positive number, so evaluation counts it as small.",
        AT_SOURCE,
    ),
    "image-repeated": Kind(
        "warning",
        "image",
        "The same file is in the split more than once, perhaps with other boxes.",
        "Keep one of them, with the better boxes.",
    ),
    "image-crowded": Kind(
        "warning",
        "image",
        f"An image has more boxes than the {QUERIES} queries of a released model: the rest cannot be found.",
        "Raise num_queries above the largest number of boxes, or cut such images into tiles.",
    ),
    "class-empty": Kind(
        "warning",
        "class",
        "A category has not one box in this split: it is not learned, or not measured.",
        "Add examples, or take the category out.",
    ),
    "class-rare": Kind(
        "warning",
        "class",
        f"A category has fewer than {RARE_BOXES} boxes: too few to learn, and its AP means little.",
        "Add examples, merge it with a neighbour, or do not rely on its AP.",
    ),
    "rejected": Kind(
        "warning",
        "row",
        "Preparing left out images or boxes.",
        "rejected.parquet names each with its reason; --strict makes them an error of jobs.prepare.",
    ),
    "rejected-list": Kind(
        "warning",
        "split",
        "rejected.parquet cannot be read, or is not the list that the manifest counts.",
        AGAIN,
    ),
    "row-groups-large": Kind(
        "warning",
        "shard",
        "A shard has row groups of more than 64 rows: shuffled reading fetches more than it needs.",
        "Prepare the split again with a smaller --row-group-rows.",
    ),
    "box-rounded": Kind(
        "note",
        "box",
        f"A box passes the edge of its image by at most {EDGE_TOLERANCE_PX:g} px, as rounding makes it.",
        "Nothing; training clips it.",
    ),
    "class-unbalanced": Kind(
        "note",
        "split",
        f"The most frequent class has over {UNBALANCED_RATIO} times as many boxes as the least frequent one.",
        "Read AP class by class; consider more examples of the rare ones.",
    ),
    "objects-tiny": Kind(
        "note",
        "split",
        "Many boxes are below 32 x 32 px when the image is stretched to 640 x 640, where AP is lowest.",
        "Consider a larger input_size, or tiles.",
    ),
    "image-empty": Kind(
        "note", "image", "An image has no object to learn from.", "Nothing if it is meant: it teaches background."
    ),
}


class Example(Data):
    """Where something was found, as far as it has a place."""

    split: str
    shard: str | None = None
    row: int | None = None  # of the shard
    image_id: int | None = None
    file_name: str | None = None
    box: int | None = None  # of the image
    detail: str = ""
    magnitude: float = 0.0  # the examples with the largest are shown

    @property
    def place(self) -> str:
        if self.image_id is None:
            return self.shard or ""
        return f"{self.shard} row {self.row}, image {self.image_id} ({self.file_name})"


class Finding(Data):
    code: str  # of KINDS
    severity: Severity
    splits: tuple[str, ...]
    count: int
    unit: str
    meaning: str
    advice: str
    examples: tuple[Example, ...]

    @property
    def title(self) -> str:
        counted = "" if self.unit == "split" else f"{plural(self.count, self.unit)} "
        return f"{self.code}: {counted}in {', '.join(self.splits)}"


class Tally:
    """How often each kind of thing was found, with the worst few examples."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.examples: dict[str, list[Example]] = {}

    def add(self, code: str, examples: Iterable[Example], count: int) -> None:
        """`count` more, some of which are the examples."""
        if count:
            self.counts[code] += count
            known = [*self.examples.get(code, []), *examples]
            self.examples[code] = sorted(known, key=lambda example: -example.magnitude)[:EXAMPLES]

    def merge(self, other: "Tally") -> None:
        for code, count in other.counts.items():
            self.add(code, other.examples[code], count)

    def findings(self, splits: tuple[str, ...]) -> list[Finding]:
        return [
            Finding(code=code, splits=splits, count=count, examples=tuple(self.examples[code]), **KINDS[code]._asdict())
            for code, count in self.counts.items()
        ]


def plural(count: int, unit: str) -> str:
    ending = "" if count == 1 else "es" if unit.endswith(("x", "s")) else "s"
    return f"{count:,} {unit}{ending}"
