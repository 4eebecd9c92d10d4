"""Figures of a calibration."""

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter
from numpy.typing import NDArray
from torch import Tensor

from pipeline.calibration.fit import EDGES, Reliability
from pipeline.evaluation.figures import BLUE, GREY


def width_figure(reliability: Reliability) -> Figure:
    """Plot error over predicted width, in bins of equal count."""
    figure = Figure(figsize=(4.6, 4.2), layout="constrained")
    axes = figure.subplots()
    predicted, error = reliability.width_bins.numpy().T
    span = min(predicted.min(), error.min()) * 0.8, max(predicted.max(), error.max()) * 1.25
    axes.plot(span, span, color=GREY, ls="--", lw=1, label="as predicted")
    axes.plot(predicted, error, "o-", color=BLUE, label="measured")
    axes.set(xscale="log", yscale="log", xlim=span, ylim=span, aspect="equal")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FormatStrFormatter("%g"))
        axis.set_minor_formatter(FormatStrFormatter("%g"))
        axis.set_tick_params(which="both", labelsize=7)
    axes.set_xlabel("predicted standard deviation, px")
    axes.set_ylabel("root mean square error, px")
    axes.legend(frameon=False)
    axes.grid(alpha=0.3, which="both")
    return figure


def coverage_figure(reliability: Reliability) -> Figure:
    """Plot the share of true edges inside over the wanted share: the distributions' own intervals, and conformal ones."""
    figure = Figure(figsize=(4.6, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color=GREY, ls="--", lw=1)
    wanted = list(reliability.own_coverage)
    held = np.array(list(reliability.own_coverage.values()))  # [masses, 4]
    for edge, name in enumerate(EDGES):
        axes.plot(wanted, held[:, edge], lw=0.8, alpha=0.6, label=name)
    axes.plot(wanted, held.mean(1), "o-", color="black", lw=1.5, label="own intervals")
    axes.plot(
        list(reliability.conformal), list(reliability.conformal.values()), "s", color=BLUE, label="conformal, each edge"
    )
    axes.plot(
        list(reliability.conformal_boxes),
        list(reliability.conformal_boxes.values()),
        "D",
        mfc="none",
        color=BLUE,
        label="conformal, whole boxes",
    )
    axes.set(xlim=(0.4, 1.01), ylim=(0.3, 1.01), xlabel="wanted share inside", ylabel="measured share inside")
    axes.legend(frameon=False, fontsize=8)
    axes.grid(alpha=0.3)
    return figure


def score_figure(reliability: Reliability) -> Figure:
    """Plot precision over score, before and after calibration; the area of a dot is its number of detections."""
    figure = Figure(figsize=(4.6, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color=GREY, ls="--", lw=1)
    for bins, colour, label in zip(reliability.score_bins, (GREY, BLUE), ("raw", "calibrated"), strict=True):
        score, precision, count = _filled(bins)
        axes.plot(score, precision, color=colour, lw=1)
        axes.scatter(score, precision, s=8 + 200 * count / count.sum(), color=colour, label=label, alpha=0.8)
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="mean score", ylabel="share of true detections", aspect="equal")
    axes.legend(frameon=False, loc="upper left", scatterpoints=1, markerscale=0.5)
    axes.grid(alpha=0.3)
    return figure


def _filled(bins: Tensor) -> NDArray[np.float64]:
    filled: NDArray[np.float64] = bins[bins[:, 2] > 0].numpy().T
    return filled
