"""Curves of a run over its steps."""

import numpy as np
from matplotlib.figure import Figure

from pipeline.evaluation.figures import BLUE, GREY
from pipeline.run_report.results import Curve

SMOOTHED_FROM = 40  # points; with fewer, the curve itself is read
WINDOW_SHARE = 20  # the smoothing window is this fraction of the curve


def curves_figure(curves: dict[str, Curve], best_step: int | None) -> Figure | None:
    """Plot every curve that has points, side by side; None if none has any."""
    plotted = {name: np.array(points, np.float64) for name, points in curves.items() if points}
    if not plotted:
        return None
    figure = Figure(figsize=(4.2 * len(plotted), 3.2), layout="constrained")
    for axes, (name, points) in zip(np.ravel(figure.subplots(1, len(plotted))).tolist(), plotted.items(), strict=True):
        steps, values = points.T
        few = len(points) < SMOOTHED_FROM
        axes.plot(steps, values, "o-" if few else "-", color=BLUE if few else GREY, lw=1.5 if few else 0.7, ms=4)
        if not few:
            window = max(len(points) // WINDOW_SHARE, 3)
            smooth = np.convolve(values, np.ones(window) / window, mode="valid")
            axes.plot(steps[window // 2 :][: len(smooth)], smooth, color=BLUE, lw=2)
        if name == "AP" and best_step is not None:
            axes.axvline(best_step, color=GREY, ls="--", lw=1)
            axes.annotate("best", (best_step, axes.get_ylim()[0]), (3, 4), textcoords="offset points", fontsize=8)
        axes.set_title(name, fontsize=10)
        axes.set_xlabel("step", fontsize=9)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    return figure
