"""Drift of a prediction: the values of its images beside those of the calibration images, with a test.

drift.json    for each value: number of images, medians, the test, and histograms over the same bins; [calibration, prediction]
drift.png     the histograms
"""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dfine_core.uncertainty.drift import LEVEL, NAMES, DriftReference, DriftTest, ImageValues, drift_tests
from pipeline import storage
from pipeline.predict.plan import PredictPlan
from pipeline.predict.predicted_images import record_batches

DRIFT_FILE, DRIFT_FIGURE = "drift.json", "drift.png"
BINS = 20
TITLES = {
    "score": "mean raw score of an image",
    "width": "median deviation of its edges, share of the side",
    "number": "its detections",
}


def write_drift(out: str, plan: PredictPlan, reference: DriftReference) -> tuple[str, ...]:
    """Compare all images of a finished prediction with the calibration images; returns lines for the console."""
    new: list[ImageValues] = []
    for batch in record_batches(out, plan, ("drift",)):
        new += [
            ImageValues(*row[first : first + len(NAMES)])  # the detector sees each tile as an image
            for row in batch.column("drift").to_pylist()
            for first in range(0, len(row or ()), len(NAMES))
        ]
    tests = drift_tests(reference.images, new)
    histograms = {name: _histogram(*_values(reference.images, new, name)) for name in NAMES}
    content = {
        "level": LEVEL,
        "least_score": reference.least_score,
        "moved": any(test.moved for test in tests),
        "tests": {test.name: _plain(test) for test in tests},
        "histograms": histograms,
    }
    storage.write_atomic(storage.join(out, DRIFT_FILE), json.dumps(content, indent=1).encode())
    storage.write_atomic(storage.join(out, DRIFT_FIGURE), _figure(histograms, tests))
    return drift_lines(tests)


def drift_lines(tests: Sequence[DriftTest]) -> tuple[str, ...]:
    """Verdict for the console."""
    moved = [test for test in tests if test.moved]
    if all(np.isnan(test.p_value) for test in tests):
        return ("drift: too few images to compare with those of the calibration",)
    method = f"Kolmogorov-Smirnov over images, level {LEVEL:g}"
    if not moved:
        return (f"drift: none found against the calibration images ({method})",)
    changes = (
        f"{TITLES[test.name]}: {test.medians[0]:.3g} to {test.medians[1]:.3g} (p = {test.p_value:.1g})"
        for test in moved
    )
    return (
        f"drift: these images are not like those of the calibration ({method}), so its numbers may not hold;"
        f" see {DRIFT_FIGURE}",
        *(f"  {change}" for change in changes),
    )


def _plain(test: DriftTest) -> dict[str, Any]:
    values = {
        "images": test.images,
        "medians": test.medians,
        "distance": test.distance,
        "p_value": test.p_value,
        "moved": test.moved,
    }
    return {name: _without_nan(value) for name, value in values.items()}


def _without_nan(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_without_nan(each) for each in value]
    return None if isinstance(value, float) and np.isnan(value) else value


def _values(
    reference: Sequence[ImageValues], new: Sequence[ImageValues], name: str
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    index = NAMES.index(name)
    old, now = (np.array([row[index] for row in rows], np.float64) for rows in (reference, new))
    return old[~np.isnan(old)], now[~np.isnan(now)]


def _histogram(old: NDArray[np.float64], new: NDArray[np.float64]) -> dict[str, list[float]]:
    edges = np.histogram_bin_edges(np.concatenate([old, new]), BINS)
    return {
        "edges": edges.tolist(),
        "calibration": np.histogram(old, edges)[0].tolist(),
        "prediction": np.histogram(new, edges)[0].tolist(),
    }


def _figure(histograms: dict[str, dict[str, list[float]]], tests: Sequence[DriftTest]) -> bytes:
    from matplotlib.figure import Figure  # slow to import, and predictions without a calibration need none of it

    from pipeline.evaluation.figures import BLUE, GREY, png

    figure = Figure(figsize=(11, 3.2), layout="constrained")
    for axes, test in zip(figure.subplots(1, len(tests)), tests, strict=True):
        found = histograms[test.name]
        for name, colour in (("calibration", GREY), ("prediction", BLUE)):
            counts = np.array(found[name])
            axes.stairs(counts / max(1, counts.sum()), found["edges"], color=colour, fill=True, alpha=0.5, label=name)
        verdict = "" if np.isnan(test.p_value) else f"p = {test.p_value:.2g}{', moved' if test.moved else ''}"
        axes.set(xlabel=TITLES[test.name], ylabel="share of images", title=verdict)
        axes.legend(frameon=False)
    return png(figure)
