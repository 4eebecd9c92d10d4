"""Figures of a sweep, for light and dark pages: text and axes have the colour `INK`, which the page replaces."""

import io
import math
import re
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from pipeline.tuning.analysis.effects import COLLAPSED, Effect
from pipeline.tuning.analysis.factors import Factor, short_names, value_text
from pipeline.tuning.analysis.importance import Importance
from pipeline.tuning.analysis.noise import Noise
from pipeline.tuning.analysis.verdict import pareto_front
from pipeline.tuning.space import Domain, Point, Space, equal_values
from pipeline.tuning.trial_records import TrialRecord

INK, PAPER = "#1a1b1c", "#fdfcfb"  # placeholders for the page's colours of text and background
BLUE, ORANGE, GREEN, RED, GREY = "#3d85c6", "#e0872d", "#2f9e68", "#cf4a3d", "#9aa3ad"
WORD_COLOURS = {"better": GREEN, "worse": RED, "not distinguishable": GREY}
MANY = 150  # trials; above it, lines are thinner and rasterized
MAX_EFFECTS = 60  # per figure
SHADES = LinearSegmentedColormap.from_list("shades", colormaps["viridis"](np.linspace(0.08, 0.88, 64)))
STYLE: dict[Any, Any] = {
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    "legend.frameon": False,
    "legend.fontsize": 8,
    "svg.fonttype": "none",
    "text.parse_math": False,  # names are not formulas, even with a $ in them
}


def svg(figure: Figure, name: str) -> str:
    """SVG of a figure, to be embedded in a page: text stays text, in the page's colour.

    Args:
        name: makes the ids of this figure differ from those of the other figures on the page.
    """
    buffer = io.StringIO()
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, dpi=130, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor").replace(PAPER, "var(--card)")
    text = re.sub(r' id="[\w.]+_\d+"', "", text)  # ids that nothing refers to
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"font: ([\d.]+)px '[^']*'[^;\"]*", r"font: \1px system-ui, sans-serif", text)
    return re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', 'role="img"', text, count=1)


def _axes(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def effects_figure(effects: Sequence[Effect], metric: str) -> Figure | None:
    """Effect of every setting that could be compared, with its interval."""
    known = [effect for effect in effects if not math.isnan(effect.effect)]
    known = sorted(known, key=lambda effect: effect.p)[:MAX_EFFECTS]
    known = [effect for effect in effects if effect in known]
    if not known:
        return None
    with matplotlib.rc_context(STYLE):
        figure, axes = _axes(10, 1.0 + 0.25 * len(known))
        axes.axvline(0, color=INK, lw=0.8)
        reach = _reach(known)
        for row, effect in enumerate(known):
            colour = WORD_COLOURS[effect.verdict]
            axes.plot([effect.low, effect.high], [row, row], color=colour, lw=2, solid_capstyle="round")
            outside = abs(effect.effect) > reach
            shape = "o" if not outside else "<" if effect.effect < 0 else ">"
            axes.plot(min(max(effect.effect, -0.98 * reach), 0.98 * reach), row, shape, color=colour, ms=5)
            if outside:
                # An arrow with the value marks an effect outside the axis.
                where = (math.copysign(0.94 * reach, effect.effect), row)
                axes.annotate(f"{effect.effect:+.3f}", where, va="center", ha="left" if effect.effect < 0 else "right")
        axes.set_xlim(-reach, reach)
        names = short_names(list(dict.fromkeys(effect.key for effect in known)))
        labels = [f"{names[e.key]} = {e.setting}  vs.  {e.reference}   ({e.runs} runs)" for e in known]
        axes.set_yticks(range(len(known)), labels)
        axes.set_ylim(len(known) - 0.4, -0.6)
        axes.set_xlabel(f"change of {metric}, with the 95 % interval of each comparison")
        axes.grid(axis="x", alpha=0.25)
        words = [Line2D([], [], color=colour, marker="o", lw=2, label=word) for word, colour in WORD_COLOURS.items()]
        figure.legend(handles=words, loc="outside upper right", ncols=3)
        return figure


def _reach(effects: Sequence[Effect]) -> float:
    """Half-width of the axis. One setting that broke everything must not flatten all others."""
    sizes = [max(abs(effect.low), abs(effect.high)) for effect in effects]
    usual = 10 * float(np.median(sizes))
    return 1.08 * max(size for size in sizes if size <= usual) or 1.0


def cost_figure(records: Sequence[TrialRecord], metric: str, rungs: Sequence[int], unit: str) -> Figure | None:
    """Metric of each trial over its cost, with points at the rungs and crosses at the end of pruned trials.

    Args:
        rungs: numbers of evaluations after which trials are compared.
        unit: "GPU" or "CPU".
    """
    started = [record for record in records if record.curve]
    if not started:
        return None
    seconds, time = _scale(max(record.curve[-1].cost_s for record in started))
    floor = _floor(np.array([r.metrics.get(metric, math.nan) for record in started for r in record.curve]))
    many = len(started) > MANY
    with matplotlib.rc_context(STYLE):
        figure, axes = _axes(10, 4.4)
        for label, colour, chosen in _kinds(started):
            curves = [_curve(record, metric, seconds, floor) for record in chosen]
            lines = LineCollection(curves, colors=colour, linewidths=0.6 if many else 1.2, alpha=0.45 if many else 0.8)
            lines.set_rasterized(many)
            axes.add_collection(lines)
            marked = [c[n - 1] for c in curves for n in rungs if n <= len(c)]
            _plot_marks(axes, marked, ".", colour, 3 if many else 6, many)
            stopped = [c[-1] for c, record in zip(curves, chosen, strict=True) if record.status == "pruned"]
            _plot_marks(axes, stopped, "x", colour, 4 if many else 6, many)
            axes.plot([], [], color=colour, marker="x" if label == "stopped early" else None, label=label)
        axes.autoscale_view()
        axes.set_xlabel(f"{unit}-{time} of the trial" + ("; points: rungs" if rungs else ""))
        axes.set_ylabel(metric)
        axes.grid(alpha=0.25)
        figure.legend(loc="outside upper right", ncols=5)
        return figure


def _kinds(records: Sequence[TrialRecord]) -> list[tuple[str, str, list[TrialRecord]]]:
    """(label, colour, trials) of each kind of trial. The most interesting kind comes last, on top."""
    kinds: dict[str, tuple[str, list[TrialRecord]]] = {
        "stopped early": (ORANGE, []),
        "not ended": (GREY, []),
        "finished": (BLUE, []),
        "confirmation": (GREEN, []),
        "replicates of the default": (INK, []),
    }
    for record in records:
        label = "finished" if record.status == "finished" else "not ended"
        if record.status == "pruned":
            label = "stopped early"
        elif record.phase != "search":
            label = "confirmation" if record.phase == "confirm" else "replicates of the default"
        kinds[label][1].append(record)
    return [(label, colour, chosen) for label, (colour, chosen) in kinds.items() if chosen]


def _curve(record: TrialRecord, metric: str, seconds: float, floor: float) -> NDArray[np.float64]:
    """[evaluations, 2] cost and metric."""
    return np.array([(r.cost_s / seconds, max(r.metrics.get(metric, floor), floor)) for r in record.curve], np.float64)


def _floor(values: NDArray[np.float64]) -> float:
    """Lower end of the axis. Collapsed trials run along it, so that they do not compress all others."""
    known = values[np.isfinite(values)]
    healthy = known[known >= COLLAPSED * np.median(known)]
    low = float(healthy.min())
    return float(known.min()) if len(healthy) == len(known) else low - 0.06 * (float(healthy.max()) - low)


def _plot_marks(
    axes: Axes, points: Sequence[NDArray[np.float64]], marker: str, colour: str, size: float, many: bool
) -> None:
    if points:
        across, up = np.array(points).T
        axes.plot(across, up, marker, color=colour, ms=size, alpha=0.6 if many else 1, rasterized=many)


def _scale(longest: float) -> tuple[float, str]:
    """Suitable unit for a duration: its seconds and its name."""
    if longest >= 2 * 3600:
        return 3600.0, "hours"
    return (60.0, "minutes") if longest >= 120 else (1.0, "seconds")


def importance_figure(importances: Sequence[Importance]) -> Figure | None:
    """Importance of each key, with its interval and the threshold of chance."""
    if not importances:
        return None
    with matplotlib.rc_context(STYLE):
        figure, axes = _axes(6, 1.2 + 0.3 * len(importances))
        rows = range(len(importances))
        colours = [BLUE if one.counts else GREY for one in importances]
        axes.barh(rows, [one.share for one in importances], color=colours, height=0.6)
        for row, one in enumerate(importances):
            axes.plot([one.low, one.high], [row, row], color=INK, lw=1.2)
            axes.plot([one.chance, one.chance], [row - 0.42, row + 0.42], color=ORANGE, lw=2.2)
        axes.set_yticks(rows, [one.key for one in importances])
        axes.set_ylim(len(importances) - 0.4, -0.6)
        axes.set_xlim(0, min(1.0, 1.08 * max(max(one.high, one.chance) for one in importances)) or 1)
        axes.set_xlabel("share of being among the best quarter that the key explains, 95 % interval")
        axes.plot([], [], color=ORANGE, lw=2.2, label="95th percentile of chance")
        figure.legend(loc="outside upper right")
        axes.grid(axis="x", alpha=0.25)
        return figure


def parallel_figure(
    records: Sequence[TrialRecord], space: Space, default: Point, metric: str, evaluation: int
) -> Figure | None:
    """Parallel coordinates: one line per trial through its values to its result at a common evaluation; the default is dashed."""
    rows = sorted(
        ((value, r) for r in records if (value := r.at(evaluation, metric)) is not None), key=lambda row: row[0]
    )
    if not rows:
        return None
    many = len(rows) > MANY
    results = np.array([value for value, _ in rows])
    low, high = _floor(results), float(results.max())
    spread = high - low or 1.0
    generator = np.random.default_rng(0)
    with matplotlib.rc_context(STYLE):
        # 1. One line per trial. Listed values are jittered, so that lines do not cover each other.
        figure, axes = _axes(min(14, 2 + 1.6 * (len(space) + 1)), 4.4)
        lines = []
        for value, record in rows:
            heights = [_height(domain, record.point.get(key)) for key, domain in space.items()]
            jittered = [
                h + generator.uniform(-0.012, 0.012) if d.listed else h
                for h, d in zip(heights, space.values(), strict=True)
            ]
            lines.append(np.column_stack([np.arange(len(space) + 1), [*jittered, max(0.0, (value - low) / spread)]]))
        collection = LineCollection(lines, cmap=SHADES, linewidths=0.6 if many else 1.1, alpha=0.5 if many else 0.8)
        collection.set_norm(Normalize(low, low + spread))
        collection.set_array(results)
        collection.set_rasterized(many)
        axes.add_collection(collection)

        # 2. The default.
        own = [_height(domain, default.get(key)) for key, domain in space.items()]
        axes.plot(range(len(space)), own, color=INK, lw=1.4, ls="--", label="default")

        # 3. One axis per key, and one for the metric.
        names = short_names(list(space))
        for column, (key, domain) in enumerate(space.items()):
            axes.axvline(column, color=INK, lw=0.8)
            for height, label in _ticks(domain):
                _label(axes, label, column, height)
            axes.text(column, 1.06, names[key], ha="center", va="bottom", fontweight="bold")
        axes.axvline(len(space), color=INK, lw=0.8)
        for height in (0.0, 0.5, 1.0):
            _label(axes, f"{low + height * spread:.3f}", len(space), height)
        axes.text(len(space), 1.06, metric, ha="center", va="bottom", fontweight="bold")
        if any(key not in record.point for _, record in rows for key in space):
            axes.annotate("inactive", (0, INACTIVE), (-4, 0), textcoords="offset points", ha="right", va="center")
        axes.set(xlim=(-0.5, len(space) + 0.5), ylim=(INACTIVE - 0.05, 1.16))
        axes.axis("off")
        figure.legend(loc="outside lower right")
        return figure


def _label(axes: Axes, text: str, across: float, up: float) -> None:
    box = {"facecolor": PAPER, "edgecolor": "none", "alpha": 0.8, "pad": 0.8}
    axes.annotate(text, (across, up), (5, 0), textcoords="offset points", va="center", fontsize=8, bbox=box)


INACTIVE = -0.1  # height of a line at a key without a value


def _height(domain: Domain, value: object) -> float:
    """Height of a value, 0 to 1; `INACTIVE` without a value, slightly outside for a default that is no candidate."""
    if value is None:
        return INACTIVE
    if domain.listed:
        indices = [n for n, candidate in enumerate(domain.values) if equal_values(candidate, value)]
        return indices[0] / max(1, len(domain.values) - 1) if indices else 1.03
    low, high = (float(end) for end in domain.values[:2])
    if not isinstance(value, int | float):
        return INACTIVE
    if domain.kind == "loguniform":
        low, high, value = math.log(low), math.log(high), math.log(max(value, 1e-300))
    return min(max((value - low) / (high - low), -0.03), 1.03)


def _ticks(domain: Domain) -> list[tuple[float, str]]:
    if domain.listed:
        return [(_height(domain, value), value_text(value)) for value in domain.values]
    low, high = (float(end) for end in domain.values[:2])
    middle = math.sqrt(low * high) if domain.kind == "loguniform" else (low + high) / 2
    return [(_height(domain, value), f"{value:.3g}") for value in (low, middle, high)]


def map_figure(
    records: Sequence[TrialRecord], across: Factor, up: Factor, default: Point, metric: str, evaluation: int
) -> Figure | None:
    """Map of the metric over two keys: median and number of the trials in each cell."""
    cells: dict[tuple[int, int], list[float]] = {}
    for record in records:
        value = record.at(evaluation, metric)
        if value is not None:
            point = {**default, **record.point}
            cells.setdefault((up.level(point[up.key]), across.level(point[across.key])), []).append(value)
    if not cells:
        return None
    table = np.full((len(up.labels), len(across.labels)), np.nan)
    for cell, values in cells.items():
        table[cell] = np.median(values)
    with matplotlib.rc_context(STYLE):
        figure, axes = _axes(2.2 + 1.15 * len(across.labels), 1.4 + 0.62 * len(up.labels))
        low = _floor(table.ravel())
        image = axes.imshow(table, cmap=SHADES, vmin=low, vmax=float(np.nanmax(table)), aspect="auto", origin="lower")
        middle = (low + float(np.nanmax(table))) / 2
        for (row, column), values in cells.items():
            colour = "white" if table[row, column] < middle else "black"
            label = f"{table[row, column]:.3f}\n{len(values)} run{'s' * (len(values) != 1)}"
            axes.text(column, row, label, ha="center", va="center", fontsize=8, color=colour)
        corner = (across.reference - 0.48, up.reference - 0.48)
        axes.add_patch(Rectangle(corner, 0.96, 0.96, fill=False, ec=ORANGE, lw=2.5))
        axes.set_xticks(range(len(across.labels)), across.labels)
        axes.set_yticks(range(len(up.labels)), up.labels)
        axes.set_xlabel(across.key)
        axes.set_ylabel(up.key)
        axes.spines[:].set_visible(False)
        figure.colorbar(image, ax=axes, label=metric, shrink=0.8)
        return figure


def pareto_figure(records: Sequence[TrialRecord], metric: str, noise: Noise) -> Figure | None:
    """Metric over latency of finished trials, with the Pareto front as a step line."""
    finished = [
        r for r in records if r.status == "finished" and r.result(metric) is not None and r.latency_ms is not None
    ]
    if not finished:
        return None
    latencies = np.array([r.latency_ms for r in finished], np.float64)
    results = np.array([r.result(metric) for r in finished], np.float64)
    front = pareto_front(latencies, results)
    with matplotlib.rc_context(STYLE):
        figure, axes = _axes(10, 3.8)
        for label, colour, chosen in _kinds(finished):
            ids = {record.id for record in chosen}
            kept = [record.id in ids for record in finished]
            axes.plot(latencies[kept], results[kept], "o", color=colour, ms=5, alpha=0.75, label=label)
        axes.step(latencies[front], results[front], where="post", color=GREY, lw=1.5, zorder=0)
        if noise.df:
            band = noise.band(1, 1)
            axes.errorbar(latencies[front], results[front], yerr=band, fmt="none", ecolor=GREY, lw=1, zorder=0)
        for index in front:
            where = (latencies[index], results[index])
            axes.annotate(f"#{finished[index].number}", where, (5, -10), textcoords="offset points", fontsize=8)
        axes.set_xlabel("milliseconds per image")
        axes.set_ylabel(metric)
        axes.grid(alpha=0.25)
        figure.legend(loc="outside upper right", ncols=4)
        return figure
