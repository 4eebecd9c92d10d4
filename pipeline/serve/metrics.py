"""Metrics of a server, as plain numbers that add up over replicas, and their text format for Prometheus."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping, Sequence

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
BATCH_SIZES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)
NO_BUCKETS: Sequence[float] = ()
# Metric: its help text, and the upper bounds of its buckets if it is a histogram.
METRIC_DEFINITIONS: Mapping[str, tuple[str, Sequence[float]]] = {
    "detect_requests_total": ("Requests to /detect, by HTTP status.", NO_BUCKETS),
    "detect_images_total": ("Images processed by the detector.", NO_BUCKETS),
    "detect_request_seconds": ("Time from the arrival of a request to /detect to its response.", SECONDS),
    "detect_forward_seconds": ("Time of one batch in the detector.", SECONDS),
    "detect_batch_images": ("Images per batch.", BATCH_SIZES),
}

# (metric, label or upper bound) to value. A histogram has a "sum" besides its buckets, which are not cumulative.
Metrics = Counter[tuple[str, str]]


def observe(metrics: Metrics, metric: str, value: float) -> None:
    """Add a value to a histogram."""
    bounds = METRIC_DEFINITIONS[metric][1]
    index = bisect_left(bounds, value)
    metrics[metric, str(bounds[index]) if index < len(bounds) else "+Inf"] += 1
    metrics[metric, "sum"] += value  # type: ignore[assignment]  # a Counter adds floats as well


def prometheus_text(metrics: Metrics) -> str:
    """Format metrics in Prometheus' text format 0.0.4."""
    lines = []
    for metric, (meaning, bounds) in METRIC_DEFINITIONS.items():
        lines += [f"# HELP {metric} {meaning}", f"# TYPE {metric} {'histogram' if bounds else 'counter'}"]
        lines += _histogram(metrics, metric, bounds) if bounds else _counter(metrics, metric)
    return "\n".join(lines) + "\n"


def _counter(metrics: Metrics, metric: str) -> list[str]:
    if metric != "detect_requests_total":
        return [f"{metric} {metrics[metric, '']}"]
    statuses = sorted(label for name, label in metrics if name == metric)
    return [f'{metric}{{status="{status}"}} {metrics[metric, status]}' for status in statuses]


def _histogram(metrics: Metrics, metric: str, bounds: Sequence[float]) -> list[str]:
    lines, cumulative = [], 0
    for bound in (*map(str, bounds), "+Inf"):
        cumulative += metrics[metric, bound]
        lines.append(f'{metric}_bucket{{le="{bound}"}} {cumulative}')
    return [*lines, f"{metric}_sum {metrics[metric, 'sum']}", f"{metric}_count {cumulative}"]


class ReplicaMetrics:
    """Latest metrics of every replica, including stopped ones. A replica always reports its totals since its start."""

    def __init__(self) -> None:
        self._by_replica: dict[str, Metrics] = {}

    def update(self, replica: str, metrics: Metrics) -> Metrics:
        """Store the metrics of a replica and return the sum over all replicas."""
        self._by_replica[replica] = metrics
        total: Metrics = Counter()
        for each in self._by_replica.values():
            total.update(each)
        return total


class MetricsAggregator:
    """Deployment that sums the metrics of all replicas; here, because its process then imports no torch."""

    def __init__(self) -> None:
        self.by_replica = ReplicaMetrics()

    async def update(self, replica: str, metrics: Metrics) -> Metrics:
        """Store the metrics of a replica and return the sum over all replicas."""
        return self.by_replica.update(replica, metrics)
