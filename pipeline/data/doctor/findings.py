"""Kinds of findings: severity, meaning and advice of each, and the tally that collects them."""

from collections import Counter
from collections.abc import Iterable
from typing import Literal, NamedTuple

from pipeline.data.shards.manifest import FrozenModel
from pipeline.wording import plural

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")
EXAMPLES = 5  # per finding
QUERIES = 300  # queries of the released models: the largest number of objects that they can detect in an image
EDGE_TOLERANCE_PX = 1.0  # smaller overshoots come from rounding, or from pixels counted from 1
RARE_BOXES = 10  # a class with fewer boxes is rare
UNBALANCED_RATIO = 100  # most to least frequent class
DARK_LEVEL = 15  # of 255: the brightest that 12 bits in 16 become
TINY_SHARE = 1 / 3  # fraction of all boxes; 0.41 in COCO, by mask area


class FindingKind(NamedTuple):
    """A kind of defect that the doctor can find."""

    severity: Severity
    unit: str  # singular noun of the counted things
    meaning: str
    advice: str


AGAIN = "Copy the folder again from where it was prepared, or prepare the split again."
AT_SOURCE = "Correct the annotation in the source and prepare the split again."
FINDING_KINDS = {
    "shard-missing": FindingKind("error", "shard", "The manifest lists a shard that is not in the folder.", AGAIN),
    "shard-size": FindingKind("error", "shard", "The size of a shard file differs from the manifest.", AGAIN),
    "shard-hash": FindingKind("error", "shard", "The SHA-256 of a shard file differs from the manifest.", AGAIN),
    "shard-unreadable": FindingKind(
        "error", "shard", "A shard, or a row group of it, cannot be read as Parquet.", AGAIN
    ),
    "shard-schema": FindingKind(
        "error",
        "shard",
        "The columns of a shard differ from this format; its rows were not checked.",
        "Prepare the split again with this version.",
    ),
    "shard-row-groups": FindingKind(
        "error", "shard", "The row groups of a shard differ from the manifest: batches would get wrong rows.", AGAIN
    ),
    "value-missing": FindingKind(
        "error", "image", "A row lacks a value. It was not checked further.", "Prepare the split again."
    ),
    "list-lengths": FindingKind(
        "error",
        "image",
        "An image has different numbers of boxes, labels, areas and crowd flags. The row was not checked further.",
        "Prepare the split again.",
    ),
    "image-undecodable": FindingKind(
        "error",
        "image",
        "An image is damaged or truncated. Training replaces it with another image; evaluation fails.",
        "Prepare the split again with --verify, the default, which rejects such images and lists them.",
    ),
    "image-size": FindingKind(
        "error",
        "image",
        "The size of an image differs from its row, so its boxes do not match the pixels.",
        "Check whether the image was resized or rotated after annotation, then prepare the split again.",
    ),
    "image-id-repeated": FindingKind(
        "error",
        "image",
        "Several images of a split share an id: evaluation and augmentation would treat them as one.",
        "Make the ids of the source unique and prepare the split again.",
    ),
    "image-in-splits": FindingKind(
        "error",
        "image",
        "The same file is in several splits: the model would be tested on training images.",
        "Remove it from all splits but one.",
    ),
    "categories-differ": FindingKind(
        "error",
        "split",
        "The splits number their categories differently: the same label means different classes.",
        "Prepare all splits with the same categories in the same order.",
    ),
    "label-unknown": FindingKind(
        "error", "box", "A label is not among the manifest's categories.", "Prepare the split again."
    ),
    "box-not-finite": FindingKind("error", "box", "A corner of a box is NaN or infinite.", AT_SOURCE),
    "box-degenerate": FindingKind("error", "box", "A box has no width or no height.", AT_SOURCE),
    "box-outside": FindingKind(
        "error",
        "box",
        "A box lies entirely outside its image: training drops it, evaluation counts it as missed.",
        AT_SOURCE,
    ),
    "statistics-differ": FindingKind(
        "error", "value", "The manifest's statistics differ from those of the rows.", "Prepare the split again."
    ),
    "box-past-edge": FindingKind(
        "warning",
        "box",
        f"A box extends beyond its image by more than {EDGE_TOLERANCE_PX:g} px. Training clips it, evaluation does not.",
        "Look at the images: a shift or a wrong scale shows here first. If there is none, clip the box in the source.",
    ),
    "box-repeated": FindingKind(
        "warning",
        "box",
        "A box with the same label occurs twice in an image: one of the two always counts as missed.",
        "Remove the copy in the source and prepare the split again.",
    ),
    "area-not-positive": FindingKind(
        "warning",
        "box",
        "The annotated area of a box is not a positive number, so evaluation counts it as small.",
        AT_SOURCE,
    ),
    "image-repeated": FindingKind(
        "warning",
        "image",
        "The same file is in the split more than once, perhaps with other boxes.",
        "Keep the copy with the better boxes.",
    ),
    "image-crowded": FindingKind(
        "warning",
        "image",
        f"An image has more boxes than the {QUERIES} queries of a released model: the rest cannot be detected.",
        "Raise num_queries above the largest number of boxes, or cut such images into tiles.",
    ),
    "class-empty": FindingKind(
        "warning",
        "class",
        "A category has no box in this split: it cannot be learned, or not measured.",
        "Add examples, or remove the category.",
    ),
    "class-rare": FindingKind(
        "warning",
        "class",
        f"A category has fewer than {RARE_BOXES} boxes: too few to learn, and its AP means little.",
        "Add examples, merge it with a neighbour, or do not rely on its AP.",
    ),
    "rejected": FindingKind(
        "warning",
        "row",
        "`dfine prepare` rejected images or boxes.",
        "rejected.parquet lists each with its reason; --strict turns rejections into an error.",
    ),
    "rejected-list": FindingKind(
        "warning",
        "split",
        "rejected.parquet cannot be read, or its number of rows differs from the manifest.",
        AGAIN,
    ),
    "exif-kept": FindingKind(
        "warning",
        "image",
        "An image is marked as turned (EXIF orientation), but its annotated size is that of the stored pixels. It was not"
        " turned: viewers and detectors in use show it upright, so its boxes may lie elsewhere.",
        "Look at the images. If the boxes lie right, --exif ignore says so; if not, annotate the upright image and its size.",
    ),
    "box-rotated": FindingKind(
        "warning",
        "box",
        "An annotation is rotated (CVAT's attributes.rotation); its box is that of the object before it was turned.",
        "Export such objects as polygons, or annotate them without rotation.",
    ),
    "box-from-zero": FindingKind(
        "warning",
        "box",
        "A VOC box begins below 1, while VOC counts pixels from 1: the XML seems to count from 0, which shifts boxes by a pixel.",
        "Prepare the split with --zero-based.",
    ),
    "box-fraction": FindingKind(
        "warning",
        "box",
        "A box lies between 0 and 1 pixel of the image's corner: it may be a fraction of the image instead of pixels.",
        "Multiply such boxes by the width and height of their image, in the source.",
    ),
    "class-name-repeated": FindingKind(
        "warning",
        "class",
        "Several categories have one name, apart from case and blanks. Evaluation and transfer of classes go by names.",
        "Merge the categories in the source, or give each a name of its own.",
    ),
    "row-ambiguous": FindingKind(
        "warning",
        "row",
        "A row of numbers reads as a polygon, and also as a box with keypoints in it. It was read as a polygon.",
        "If the labels have keypoints, state kpt_shape: [NUMBER, 2 or 3] in the data.yaml and prepare the split again.",
    ),
    "image-dark": FindingKind(
        "warning",
        "image",
        f"An image is nearly black: no level is above {DARK_LEVEL} of 255. 10 or 12 bits stored in 16 look like this.",
        "Scale the levels to the full range of 16 bits, or to 8 bits, and prepare the split again.",
    ),
    "row-groups-large": FindingKind(
        "warning",
        "shard",
        "A shard has row groups of more than 64 rows: shuffled reading fetches more than it needs.",
        "Prepare the split again with a smaller --row-group-rows.",
    ),
    "box-rounded": FindingKind(
        "note",
        "box",
        f"A box extends beyond its image by at most {EDGE_TOLERANCE_PX:g} px, probably from rounding.",
        "No action needed; training clips it.",
    ),
    "file-passed-over": FindingKind(
        "note",
        "file",
        "A file beside the images was passed over, because its ending is that of something else.",
        "No action needed, unless it is an image.",
    ),
    "label-file-missing": FindingKind(
        "note",
        "image",
        "An image has no label file. It was taken as an image without objects.",
        "No action needed if intended: it teaches background.",
    ),
    "class-placeholder": FindingKind(
        "note",
        "class",
        "A category was left out: number 0, the parent of all others and without boxes, as Roboflow writes it.",
        "No action needed.",
    ),
    "file-names-read": FindingKind(
        "note",
        "split",
        "The file names of the annotations are not those of the folder as they are written; another reading of them is.",
        "No action needed.",
    ),
    "exif-turned": FindingKind(
        "note",
        "image",
        "An image was turned upright by its EXIF orientation, as its annotated size is that of the upright image.",
        "No action needed.",
    ),
    "exif-undecided": FindingKind(
        "note",
        "image",
        "An image was turned upright by its EXIF orientation, as labelling tools show it; no annotated size could decide.",
        "Look at such an image. If its boxes were drawn on the stored pixels, prepare the split with --exif ignore.",
    ),
    "tile-box-cut": FindingKind(
        "note",
        "box",
        "A box reaches over the border of a tile. It was kept, cut off there, as enough of it is visible.",
        "No action needed.",
    ),
    "tile-box-ignored": FindingKind(
        "note",
        "box",
        "Little of a box is visible in a tile. That part is ignored: it teaches neither object nor background.",
        "No action needed, unless most boxes are larger than the overlap: then take larger tiles.",
    ),
    "tile-empty": FindingKind(
        "note", "tile", "A tile without boxes was left out.", "No action needed: --empty-tiles asked for it."
    ),
    "pseudo-label": FindingKind(
        "note",
        "box",
        "A detection became a label, with its score as weight.",
        "Look at some of them: what the teacher has missed or confused is learned from it.",
    ),
    "pseudo-ignored": FindingKind(
        "note", "box", "A detection is ignored, as its score is too low for a label.", "No action needed."
    ),
    "pseudo-unseen": FindingKind(
        "note",
        "image",
        "An image without boxes was not among the teacher's images. It was taken as an image without objects.",
        "No action needed if intended: it teaches background. Otherwise predict in it, too.",
    ),
    "class-unbalanced": FindingKind(
        "note",
        "split",
        f"The most frequent class has more than {UNBALANCED_RATIO} times as many boxes as the least frequent one.",
        "Look at AP per class; consider more examples of the rare classes.",
    ),
    "objects-tiny": FindingKind(
        "note",
        "split",
        "Many boxes are smaller than 32 x 32 px once the image is stretched to 640 x 640, where AP is lowest.",
        "Consider a larger input_size, or tiles.",
    ),
    "image-empty": FindingKind(
        "note", "image", "An image has no object to learn from.", "No action needed if intended: it teaches background."
    ),
}


class Example(FrozenModel):
    """One case of a finding, with its location where it has one."""

    split: str
    shard: str | None = None
    row: int | None = None  # within the shard
    image_id: int | None = None
    file_name: str | None = None
    box: int | None = None  # within the image
    detail: str = ""
    same_as: "Example | None" = None  # the image that this one repeats
    magnitude: float = 0.0  # the largest ones are kept as examples

    @property
    def location(self) -> str:
        """Shard, row and image, as text; empty where there is none."""
        if self.image_id is None:
            return self.shard or ""
        return f"{self.shard} row {self.row}, image {self.image_id} ({self.file_name})"


class Finding(FrozenModel):
    """All cases of one kind in one split, or between several."""

    code: str  # key of FINDING_KINDS
    severity: Severity
    splits: tuple[str, ...]
    count: int
    unit: str
    meaning: str
    advice: str
    examples: tuple[Example, ...]

    @property
    def title(self) -> str:
        """Headline, such as `box-outside: 3 boxes in train`."""
        counted = "" if self.unit == "split" else f"{plural(self.count, self.unit)} "
        return f"{self.code}: {counted}in {', '.join(self.splits)}"


class Tally:
    """Number of cases of each kind, with the worst few as examples."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.examples: dict[str, list[Example]] = {}

    def add(self, code: str, examples: Iterable[Example], count: int) -> None:
        """Count `count` more cases, some of which are the examples."""
        if count:
            self.counts[code] += count
            known = [*self.examples.get(code, []), *examples]
            self.examples[code] = sorted(known, key=lambda example: -example.magnitude)[:EXAMPLES]

    def merge(self, other: "Tally") -> None:
        """Add all cases of another tally."""
        for code, count in other.counts.items():
            self.add(code, other.examples[code], count)

    def findings(self, splits: tuple[str, ...]) -> list[Finding]:
        """One finding for each kind with a case."""
        return [
            Finding(
                code=code,
                splits=splits,
                count=count,
                examples=tuple(self.examples[code]),
                **FINDING_KINDS[code]._asdict(),
            )
            for code, count in self.counts.items()
        ]
