"""What a server counts, as plain numbers that add up over replicas, and their text for Prometheus."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping, Sequence

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
SIZES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)
NO_BUCKETS: Sequence[float] = ()
# name: what it is, upper bounds of a histogram
METRICS: Mapping[str, tuple[str, Sequence[float]]] = {
    "detect_requests_total": ("Requests to /detect, by HTTP status.", NO_BUCKETS),
    "detect_images_total": ("Images that were detected in.", NO_BUCKETS),
    "detect_request_seconds": ("From the arrival of a request to /detect to its answer.", SECONDS),
    "detect_forward_seconds": ("Of one batch through the detector.", SECONDS),
    "detect_batch_images": ("Images of one batch.", SIZES),
}

# (metric, label or upper bound) to number. A histogram has, besides its buckets, which are not cumulative, a "sum".
Counts = Counter[tuple[str, str]]


def observe(counts: Counts, metric: str, value: float) -> None:
    """Add a value to a histogram."""
    bounds = METRICS[metric][1]
    place = bisect_left(bounds, value)
    counts[metric, str(bounds[place]) if place < len(bounds) else "+Inf"] += 1
    counts[metric, "sum"] += value  # type: ignore[assignment]  # a Counter of floats adds as well


def as_text(counts: Counts) -> str:
    """In Prometheus' text format 0.0.4."""
    lines = []
    for metric, (meaning, bounds) in METRICS.items():
        lines += [f"# HELP {metric} {meaning}", f"# TYPE {metric} {'histogram' if bounds else 'counter'}"]
        lines += _histogram(counts, metric, bounds) if bounds else _counter(counts, metric)
    return "\n".join(lines) + "\n"


def _counter(counts: Counts, metric: str) -> list[str]:
    if metric != "detect_requests_total":
        return [f"{metric} {counts[metric, '']}"]
    statuses = sorted(label for name, label in counts if name == metric)
    return [f'{metric}{{status="{status}"}} {counts[metric, status]}' for status in statuses]


def _histogram(counts: Counts, metric: str, bounds: Sequence[float]) -> list[str]:
    lines, below = [], 0
    for bound in (*map(str, bounds), "+Inf"):
        below += counts[metric, bound]
        lines.append(f'{metric}_bucket{{le="{bound}"}} {below}')
    return [*lines, f"{metric}_sum {counts[metric, 'sum']}", f"{metric}_count {below}"]


class Totals:
    """Of all replicas, those that are gone included: each tells all that it has counted so far."""

    def __init__(self) -> None:
        self._by_replica: dict[str, Counts] = {}

    def told(self, replica: str, counts: Counts) -> Counts:
        """The sum, after `replica` has told."""
        self._by_replica[replica] = counts
        total: Counts = Counter()
        for each in self._by_replica.values():
            total.update(each)
        return total
