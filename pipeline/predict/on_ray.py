"""Detectors in processes of their own on Ray, each of which writes parts of a prediction."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import torch
from ray.data import ActorPoolStrategy

from dfine_core.inference import LoadedDetector
from pipeline.predict.inputs import Inputs
from pipeline.predict.partition import PartCounts, write_part
from pipeline.predict.plan import PredictPlan
from pipeline.ray_cluster import start_ray

PARTS_PER_EXECUTION = 2000  # limits the bookkeeping of one Ray Data execution, which grows with its blocks
COUNTS = ("images", "detections", "rejected")


def write_parts_on_ray(
    loaded: LoadedDetector, inputs: Inputs, plan: PredictPlan, todo: Sequence[int], out: str, workers: int | None
) -> Iterator[PartCounts]:
    """Start or join Ray, write the parts there, and yield their counts as they finish.

    Args:
        loaded: on the CPU.
        workers: detectors; None: one per GPU, or one.
    """
    start_ray()
    shared = ray.put((loaded, inputs, plan, out))
    for start in range(0, len(todo), PARTS_PER_EXECUTION):
        yield from _run_execution(shared, todo[start : start + PARTS_PER_EXECUTION], workers)


def _run_execution(shared: "ray.ObjectRef[Any]", todo: Sequence[int], workers: int | None) -> Iterator[PartCounts]:
    # Share the CPUs and GPUs of the cluster among the workers.
    alive = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    nodes = [node["Resources"] for node in alive]
    gpus = int(sum(node.get("GPU", 0) for node in nodes))
    workers = min(workers or gpus or 1, len(todo))
    cpus = cpus_per_worker([int(node.get("CPU", 0)) for node in nodes], workers)

    # One block per part, so that a failure repeats one part only.
    parts = ray.data.from_arrow([pa.table({"part": [part]}) for part in todo])
    parts.context.enable_progress_bars = False
    parts.context.print_on_execution_start = False
    results = parts.map_batches(
        PartWriter,
        batch_size=1,
        compute=ActorPoolStrategy(size=workers),
        num_cpus=cpus,
        num_gpus=min(1.0, gpus / workers),
        fn_constructor_args=([shared], cpus),  # in a list, so that Ray Data passes the reference itself
    )
    for batch in results.iter_batches(batch_size=None, prefetch_batches=0):
        for row in zip(*(batch[name].tolist() for name in COUNTS), strict=True):
            yield PartCounts(*row)


def cpus_per_worker(nodes: Sequence[int], workers: int) -> int:
    """Largest number of CPUs that every worker can have, given the CPUs of each node; a worker does not span nodes."""
    possible = (n for n in range(max(nodes), 0, -1) if sum(node // n for node in nodes) >= workers)
    return next(possible, 1)


class PartWriter:
    """Detector in a process of its own, on a GPU if Ray assigns one."""

    def __init__(self, shared: Sequence["ray.ObjectRef[Any]"], threads: int) -> None:
        torch.set_num_threads(threads)
        loaded, self.inputs, self.plan, self.out = ray.get(shared[0])
        self.loaded: LoadedDetector = loaded.to("cuda" if ray.get_gpu_ids() else "cpu")
        self.threads = threads

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Write the parts of a batch and return their counts."""
        parts = batch["part"].tolist()
        counts = [write_part(self.loaded, self.inputs, self.plan, part, self.out, self.threads) for part in parts]
        return {name: np.array([getattr(each, name) for each in counts]) for name in COUNTS}
