"""Detectors in processes of their own on Ray, each of which writes parts of a prediction, or of a selection."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ray
import torch
from ray.util import ActorPool

from dfine_core.inference import LoadedDetector
from pipeline.predict.inputs import Inputs
from pipeline.predict.partition import PartCounts, write_part
from pipeline.predict.plan import PartsPlan
from pipeline.ray_cluster import start_ray

# Arguments as those of `write_part`; each function takes a plan of its own.
WritePart = Callable[[LoadedDetector, Inputs, Any, int, str, int], PartCounts]


def write_parts_on_ray(
    loaded: LoadedDetector,
    inputs: Inputs,
    plan: PartsPlan,
    todo: Sequence[int],
    out: str,
    workers: int | None,
    write: WritePart = write_part,
) -> Iterator[PartCounts]:
    """Start or join Ray, write the parts there, and yield their counts as they finish.

    Args:
        loaded: on the CPU.
        workers: detectors; None: one per GPU, or one.
        write: module-level function that writes one part.
    """
    start_ray()

    # Share the CPUs and GPUs of the cluster among the workers.
    alive = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    nodes = [node["Resources"] for node in alive]
    gpus = int(sum(node.get("GPU", 0) for node in nodes))
    workers = min(workers or gpus or 1, len(todo))
    cpus = cpus_per_worker([int(node.get("CPU", 0)) for node in nodes], workers)

    # A worker that is lost is started again, on another node if need be, and repeats its part.
    writer = ray.remote(PartWriter).options(
        num_cpus=cpus, num_gpus=min(1.0, gpus / workers), max_restarts=-1, max_task_retries=-1
    )
    pool = ActorPool([writer.remote(cpus) for _ in range(workers)])
    shared = [ray.put((loaded, inputs, plan, out, write))]  # in a list, so that Ray passes the reference itself
    yield from pool.map_unordered(lambda actor, part: actor.write.remote(shared, part), list(todo))


def cpus_per_worker(nodes: Sequence[int], workers: int) -> int:
    """Largest number of CPUs that every worker can have, given the CPUs of each node; a worker does not span nodes."""
    possible = (n for n in range(max(nodes), 0, -1) if sum(node // n for node in nodes) >= workers)
    return next(possible, 1)


class PartWriter:
    """Detector in a process of its own, on a GPU if Ray assigns one."""

    def __init__(self, threads: int) -> None:
        torch.set_num_threads(threads)
        self.threads = threads
        self.shared: tuple[LoadedDetector, Inputs, PartsPlan, str, WritePart] | None = None

    def write(self, shared: Sequence["ray.ObjectRef[Any]"], part: int) -> PartCounts:
        """Write a part and return its counts.

        Args:
            shared: reference to detector, inputs, plan, output folder and function. Given to the constructor, it would make Ray
                print a warning for every prediction, that the process cannot be started again once the driver has ended.
        """
        if self.shared is None:
            loaded, *others = ray.get(shared[0])
            self.shared = (loaded.to("cuda" if ray.get_gpu_ids() else "cpu"), *others)
        loaded, inputs, plan, out, write = self.shared
        return write(loaded, inputs, plan, part, out, self.threads)
