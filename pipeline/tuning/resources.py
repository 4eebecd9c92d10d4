"""Number of trials that a cluster can run at once. Drivers, workers and data tasks are counted together, to avoid deadlocks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline.config import Cluster, ConfigError
from pipeline.tuning.sweep import Sweep
from pipeline.wording import plural

Resources = Mapping[str, float]
ROUNDING = 1e-6  # sums of fractional CPUs are inexact


@dataclass(frozen=True)
class Placement:
    """Resources of each trial, and how many trials run at once."""

    max_concurrent_trials: int
    workers: int  # per trial
    per_worker: dict[str, float]
    message: str | None  # what was reduced, and why


def worker_resources(sweep: Sweep, cluster: Cluster, total: Resources) -> dict[str, float]:
    """Resources of one worker: from the sweep, else the cluster file, else one GPU if the cluster has any."""
    gpus = sweep.gpus_per_worker if sweep.gpus_per_worker is not None else cluster.gpus_per_worker
    if gpus is None:
        gpus = 1.0 if total.get("GPU", 0) else 0.0
    cpus = sweep.cpus_per_worker if sweep.cpus_per_worker is not None else cluster.cpus_per_worker
    amounts = {"CPU": cpus, "GPU": gpus, **cluster.resources_per_worker}
    return {name: float(amount) for name, amount in amounts.items() if amount}


def place_trials(
    sweep: Sweep,
    cluster: Cluster,
    total: Resources,
    nodes: Sequence[Resources],
    *,
    driver: Resources,
    decoding_cpus: float,
) -> Placement:
    """Decide how many trials run at once.

    Args:
        total: resources of the cluster: "CPU", "GPU" and others.
        nodes: resources of each node, with "memory" in bytes.
        driver: "CPU" and "memory" of the driver of one trial.
        decoding_cpus: reserved for the data tasks of all trials; 0 if workers decode.

    Raises:
        ConfigError: not even one trial fits.
    """
    # 1. What one trial needs: its workers and its driver.
    per_worker = worker_resources(sweep, cluster, total)
    per_trial = {name: sweep.workers_per_trial * amount for name, amount in per_worker.items()}
    per_trial["CPU"] = per_trial.get("CPU", 0.0) + driver["CPU"]

    # 2. Each resource bounds the number of trials. A worker or a driver needs its share on one node.
    free = {**total, "CPU": total.get("CPU", 0.0) - decoding_cpus}
    bounds = {name: int(free.get(name, 0.0) / amount + ROUNDING) for name, amount in per_trial.items() if amount}
    bounds["workers"] = sum(_workers_on(node, per_worker) for node in nodes) // sweep.workers_per_trial
    bounds["drivers"] = sum(int(node["memory"] / driver["memory"]) for node in nodes)
    most = min(bounds.values())

    # 3. An error or a message names the request and what the cluster has.
    each = ", ".join(f"{amount:g} {name}" for name, amount in per_worker.items())
    needs = (
        f"a trial needs {plural(sweep.workers_per_trial, 'worker')} with {each}, and {driver['CPU']:g} CPU with"
        f" {driver['memory'] / 2**30:g} GiB for its driver"
    )
    has = ", ".join(f"{total.get(name, 0):g} {name}" for name in sorted({"CPU", *per_worker}))
    has += f", {sum(node['memory'] for node in nodes) / 2**30:.3g} GiB"
    decoding = f"; {decoding_cpus:g} CPU is reserved for decoding" if decoding_cpus else ""
    if most < 1 and not cluster.autoscaling:
        raise ConfigError(
            f"no trial would ever start: {needs}; the cluster has {has} on {plural(len(nodes), 'node')}{decoding}:"
            " lower workers_per_trial, cpus_per_worker or gpus_per_worker, or add nodes"
        )
    if cluster.autoscaling:
        most = max(most, sweep.max_concurrent_trials or 1)
    runs = sweep.trials * sweep.seeds_per_point if sweep.trials else most
    count = min(most, sweep.max_concurrent_trials or most, runs)
    reduced = sweep.max_concurrent_trials is not None and count < sweep.max_concurrent_trials and count == most
    message = (
        f"{plural(count, 'trial')} at once instead of {sweep.max_concurrent_trials}: {needs};"
        f" the cluster has {has}{decoding}"
    )
    return Placement(count, sweep.workers_per_trial, per_worker, message if reduced else None)


def _workers_on(node: Resources, per_worker: Resources) -> int:
    return min(int(node.get(name, 0.0) / amount + ROUNDING) for name, amount in per_worker.items())
