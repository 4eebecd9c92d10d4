"""How many trials a cluster holds at once. Drivers, workers and data tasks are counted together, so that none waits for ever."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline.config import Cluster, ConfigError
from pipeline.tuning.sweep import Sweep

Resources = Mapping[str, float]
NEARLY = 1e-6  # fractions of CPUs add up with rounding


@dataclass(frozen=True)
class Placement:
    together: int  # trials at once
    workers: int  # of each trial
    per_worker: dict[str, float]
    message: str | None  # what was reduced, and why


def worker_resources(sweep: Sweep, cluster: Cluster, total: Resources) -> dict[str, float]:
    """Of one worker: what the sweep says, else the cluster file, else a GPU where there are any."""
    gpus = sweep.gpus_per_worker if sweep.gpus_per_worker is not None else cluster.gpus_per_worker
    if gpus is None:
        gpus = 1.0 if total.get("GPU", 0) else 0.0
    cpus = sweep.cpus_per_worker if sweep.cpus_per_worker is not None else cluster.cpus_per_worker
    wanted = {"CPU": cpus, "GPU": gpus, **cluster.resources_per_worker}
    return {name: float(amount) for name, amount in wanted.items() if amount}


def place(
    sweep: Sweep,
    cluster: Cluster,
    total: Resources,
    nodes: Sequence[Resources],
    *,
    driver: Resources,
    decoding_cpus: float,
) -> Placement:
    """
    Args:
        total: of the cluster, "CPU", "GPU" and others.
        nodes: the same of each node.
        driver: "CPU" and "memory" in bytes of what leads a trial, on one node.
        decoding_cpus: left for data tasks of all trials together; 0 where workers decode.

    Raises:
        ConfigError: not even one trial fits.
    """
    per_worker = worker_resources(sweep, cluster, total)
    per_trial = {name: sweep.workers_per_trial * amount for name, amount in per_worker.items()}
    per_trial["CPU"] = per_trial.get("CPU", 0.0) + driver["CPU"]
    free = {**total, "CPU": total.get("CPU", 0.0) - decoding_cpus}
    fitting = {name: int(free.get(name, 0.0) / amount + NEARLY) for name, amount in per_trial.items() if amount}
    fitting["workers"] = sum(_workers_on(node, per_worker) for node in nodes) // sweep.workers_per_trial
    fitting["drivers"] = sum(int(node["memory"] / driver["memory"]) for node in nodes)
    most = min(fitting.values())
    each = ", ".join(f"{amount:g} {name}" for name, amount in per_worker.items())
    asks = (
        f"a trial asks for {sweep.workers_per_trial} worker(s) with {each}, and {driver['CPU']:g} CPU with"
        f" {driver['memory'] / 2**30:g} GiB beside them"
    )
    has = ", ".join(f"{total.get(name, 0):g} {name}" for name in sorted({"CPU", *per_worker}))
    has += f", {sum(node['memory'] for node in nodes) / 2**30:.3g} GiB"
    decoding = f", of which {decoding_cpus:g} CPU decode" if decoding_cpus else ""
    if most < 1 and not cluster.autoscaling:
        raise ConfigError(
            f"no trial would ever start: {asks}; the cluster has {has} on {len(nodes)} node(s){decoding}:"
            " lower workers_per_trial, cpus_per_worker or gpus_per_worker, or add nodes"
        )
    if cluster.autoscaling:
        most = max(most, sweep.together or 1)
    runs = sweep.trials * sweep.seeds_per_point if sweep.trials else most
    together = min(most, sweep.together or most, runs)
    reduced = sweep.together is not None and together < sweep.together and together == most
    message = f"{together} trial(s) at once instead of {sweep.together}: {asks}; the cluster has {has}{decoding}"
    return Placement(together, sweep.workers_per_trial, per_worker, message if reduced else None)


def _workers_on(node: Resources, per_worker: Resources) -> int:
    return min(int(node.get(name, 0.0) / amount + NEARLY) for name, amount in per_worker.items())
