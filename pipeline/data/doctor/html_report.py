"""The doctor's report as text for a terminal, and as an HTML page with plots and images."""

import base64
import io
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, PercentFormatter

from pipeline import html_pages
from pipeline.data.doctor.examine import DoctorReport, SplitReport
from pipeline.data.doctor.findings import QUERIES, SEVERITIES, Finding
from pipeline.data.doctor.row_checks import SIDE_EDGES, TINY_SIDE
from pipeline.data.doctor.thumbnails import Thumbnail, sample_rows, thumbnail
from pipeline.data.shards.manifest import ShardSet
from pipeline.drawing import font, shortened
from pipeline.wording import plural

SHEET_IMAGES = 24
IMAGES_PER_FINDING = 4
MOST_CLASS_NAMES = 100  # more do not fit below a plot
LEAST_BARS = 6  # a plot of fewer has room for as many
NAME_WIDTH, ROW_WIDTH = 110, 650  # points of a name below its bar, and of all names in one row
COLOURS = ("#2f6fb5", "#e07b28", "#3b9b5a", "#b04a8f", "#7a6a58")  # one per split


def severity_counts(report: DoctorReport) -> str:
    """Number of findings of each severity."""
    counts = ", ".join(plural(report.count(severity), severity) for severity in SEVERITIES)
    return counts if report.decoded else f"{counts}; images were not decoded"


def doctor_text(report: DoctorReport) -> str:
    """Format the report for a terminal."""
    blocks = [*map(_split_text, report.splits), *map(_finding_text, report.findings), severity_counts(report)]
    return "\n\n".join(blocks)


def _split_text(split: SplitReport) -> str:
    return "\n    ".join([f"{split.title}: {split.uri}, digest {split.digest}", *split_facts(split)])


def split_facts(split: SplitReport) -> list[str]:
    """Contents of a split, one fact per line."""
    facts = [
        f"{plural(split.images, 'image')}, {plural(split.boxes, 'box')} of {plural(len(split.categories), 'class')} in"
        f" {plural(split.shards, 'shard')} of {split.bytes / 1e6:,.1f} MB; {split.rejected} rejected"
    ]
    if (counted := split.statistics) is not None:
        per_image, fullest = counted.boxes_per_image, counted.most_crowded
        empty, crowds = plural(counted.images_without_boxes, "image"), plural(counted.crowd_boxes, "crowd region")
        width, height = counted.width, counted.height
        facts += [
            f"{per_image.mean:.1f} boxes per image, at most {per_image.max} (image {fullest.image_id},"
            f" {fullest.file_name}); {empty} without boxes, {crowds}",
            f"{split.tiny_share:.0%} of the boxes are tiny: smaller than {TINY_SIDE} x {TINY_SIDE} px at 640 x 640",
            f"images are {width.min} to {width.max} px wide and {height.min} to {height.max} px high",
        ]
    if split.images_counted < split.images:
        facts.append(f"counted over the {split.images_counted} images whose rows can be read")
    return facts


def _finding_text(finding: Finding) -> str:
    lines = [f"{finding.severity.upper():8}{finding.title}"]
    lines += textwrap.wrap(finding.meaning, 110, initial_indent=" " * 8, subsequent_indent=" " * 8)
    for example in example_texts(finding):
        lines += textwrap.wrap(example, 108, initial_indent=" " * 10, subsequent_indent=" " * 12)
    lines += textwrap.wrap(finding.advice, 110, initial_indent=" " * 6 + "> ", subsequent_indent=" " * 8)
    return "\n".join(lines)


def example_texts(finding: Finding) -> list[str]:
    """One line per example, and the number of further cases."""
    texts = [": ".join(part for part in (example.location, example.detail) if part) for example in finding.examples]
    more = finding.count - len(texts) if finding.examples[0].row is not None else 0
    return [text for text in texts if text] + [f"and {more:,} more"] * (more > 0)


@dataclass(frozen=True)
class Plot:
    """A figure of the page."""

    title: str
    source: str  # a data URI
    wide: bool = False


def doctor_page(report: DoctorReport, shard_sets: Sequence[ShardSet], *, seed: int = 0) -> str:
    """Render one self-contained page.

    Args:
        shard_sets: the checked sets, in the order of the report.
        seed: seed of the sampled images.
    """
    sheet = [thumbnail(shard_sets[n], shard, row) for n, shard, row in sample_rows(shard_sets, SHEET_IMAGES, seed)]
    return html_pages.render(
        "pipeline.data.doctor",
        "doctor.html.j2",
        report=report,
        severity_counts=severity_counts(report),
        splits=[
            (split, split_facts(split), colour) for split, colour in zip(report.splits, _colours(report), strict=True)
        ],
        findings=[(finding, _thumbnails_of(finding, report, shard_sets)) for finding in report.findings],
        plots=_plots(report),
        classes=_class_table(report),
        sheet=[image for image in sheet if image is not None],
        seed=seed,
        example_texts=example_texts,
    )


def _thumbnails_of(finding: Finding, report: DoctorReport, shard_sets: Sequence[ShardSet]) -> list[Thumbnail]:
    """Thumbnails of the examples, each image once, with the boxes in question highlighted."""
    if finding.code == "image-empty":
        return []  # there is nothing to see
    marks: dict[tuple[str, str | None, int], list[int | None]] = {}
    for example in finding.examples:
        for image in (example, example.same_as):
            if image is not None and image.row is not None:
                marks.setdefault((image.split, image.shard, image.row), []).append(image.box)
    thumbnails = []
    for (title, file, row), boxes in list(marks.items())[:IMAGES_PER_FINDING]:
        shards = next(s for split, s in zip(report.splits, shard_sets, strict=True) if split.title == title)
        number = next(n for n, shard in enumerate(shards.manifest.shards) if shard.file == file)
        thumbnails.append(thumbnail(shards, number, row, boxes))
    return [image for image in thumbnails if image is not None]


def _class_table(report: DoctorReport) -> list[tuple[str, list[int | None]]]:
    """Number of boxes per class and split, the most frequent class first; classes of all splits, in case they differ."""
    names = dict.fromkeys(name for split in report.splits for name in split.categories)
    counts = [
        dict(zip(split.categories, split.statistics.class_counts, strict=True)) if split.statistics else {}
        for split in report.splits
    ]
    table = [(name, [split_counts.get(name) for split_counts in counts]) for name in names]
    return sorted(table, key=lambda row: [-(boxes or 0) for boxes in row[1]])


def _colours(report: DoctorReport) -> list[str]:
    return [COLOURS[n % len(COLOURS)] for n in range(len(report.splits))]


def _plots(report: DoctorReport) -> list[Plot]:
    if all(split.statistics is None for split in report.splits):
        return []
    return [
        _plot("Boxes per class", report, _plot_classes, wide=True),
        _plot("Box size at 640 x 640", report, _plot_box_sizes),
        _plot("Boxes per image", report, _plot_boxes_per_image),
        _plot("Image size", report, _plot_image_sizes),
    ]


def _plot(title: str, report: DoctorReport, plot: Callable[[Axes, DoctorReport], None], *, wide: bool = False) -> Plot:
    figure = Figure(figsize=(11, 3.6) if wide else (4.6, 3.4), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    plot(axes, report)
    if len(report.splits) > 1:  # above the axes, and as squares: a dot or a line would look like data
        titles = [split.title for split in report.splits]
        handles = [Patch(color=colour, label=title) for title, colour in zip(titles, _colours(report), strict=True)]
        figure.legend(handles=handles, loc="outside upper right", ncols=4, frameon=False, fontsize=8, handlelength=1)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=160)
    return Plot(title, "data:image/png;base64," + base64.b64encode(png.getvalue()).decode(), wide)


def _plot_classes(axes: Axes, report: DoctorReport) -> None:
    table = _class_table(report)
    position = np.arange(len(table))
    width = 0.85 / len(report.splits)
    for n, colour in enumerate(_colours(report)):
        boxes = [counts[n] or 0 for _, counts in table]
        axes.bar(position + (n - (len(report.splits) - 1) / 2) * width, boxes, width, color=colour)
    axes.set_yscale("log")
    axes.set_ylim(bottom=0.7)  # a bar of one box stays visible
    axes.set_ylabel("boxes")
    room = max(0.1, (LEAST_BARS - len(table)) / 2)  # the bar of a single class does not fill the plot
    axes.set_xlim(-0.5 - room, len(table) - 0.5 + room)
    if len(table) <= MOST_CLASS_NAMES:
        size = 9 if len(table) < 50 else 6.5
        names = [shortened(name, NAME_WIDTH, font(9)) for name, _ in table]
        fits = sum(font(9).getlength(name) + 10 for name in names) < ROW_WIDTH
        axes.set_xticks(position, names, rotation=0 if fits else 90, fontsize=size, parse_math=False)
    else:
        axes.set_xlabel("classes, the most frequent first")


def _plot_box_sizes(axes: Axes, report: DoctorReport) -> None:
    for split, colour in zip(report.splits, _colours(report), strict=True):
        share = np.array(split.scaled_sides) / max(1, sum(split.scaled_sides))
        axes.stairs(share, SIDE_EDGES, color=colour, fill=len(report.splits) == 1, lw=1.5)
    axes.axvline(TINY_SIDE, color="grey", lw=1, ls=":")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlim(2, SIDE_EDGES[-1])
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_xlabel("square root of the area, px (tiny left of the line)")
    axes.set_ylabel("share of boxes")


def _plot_boxes_per_image(axes: Axes, report: DoctorReport) -> None:
    largest = 0
    for split, colour in zip(report.splits, _colours(report), strict=True):
        if split.statistics is not None:
            histogram = np.array(split.statistics.boxes_per_image.histogram)
            edges = np.arange(len(histogram) + 1) - 0.5
            largest = max(largest, len(histogram) - 1)
            share = histogram / histogram.sum()
            axes.stairs(share, edges, color=colour, fill=len(report.splits) == 1, lw=1.5)
    if largest > QUERIES / 2:
        axes.axvline(QUERIES, color="grey", lw=1, ls=":")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_xlabel("boxes")
    axes.set_ylabel("share of images")


def _plot_image_sizes(axes: Axes, report: DoctorReport) -> None:
    for split, colour in zip(report.splits, _colours(report), strict=True):
        sizes = split.image_sizes
        images = np.array([cell.images for cell in sizes])
        area = 10 + 500 * images / max(1, images.sum())
        across, down = [cell.width for cell in sizes], [cell.height for cell in sizes]
        axes.scatter(across, down, s=area, color=colour, alpha=0.45, lw=0, clip_on=False)
    axes.margins(0.12)
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.set_aspect("equal", adjustable="box")
    axes.set_xlabel("width, px (larger dots: more images)")
    axes.set_ylabel("height, px")
