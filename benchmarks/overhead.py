"""Overhead of Ray and tracking per step: the training on two CPU workers, against the same loop without them.

    python -m benchmarks.overhead

Both sides run `training.loop` on the same images with two processes and gloo. The bare loop decodes in the process, without
Ray, tracking, checkpoints and console. The overhead of the loop over a hand-written one is not measured here. Rounds
alternate; the ratio compares medians.
"""

import argparse
import statistics
import tempfile
import time
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import ray
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from pipeline.config import Cluster, Experiment
from pipeline.config_files import check
from pipeline.data.prepare.prepare import prepare
from pipeline.data.prepare.shard_writer import PrepareOptions
from pipeline.data.sources.synthetic import synthetic_source
from pipeline.ray_cluster import start_ray
from pipeline.training import loop
from pipeline.training.context import TrainJob, WorkerContext, resolve_data
from pipeline.training.launch import launch
from pipeline.training.nonfinite import NonFiniteGuard
from pipeline.training.run_log import RunLog
from pipeline.training.schedule import derive

ON_RAY = "loop with Ray Train, Ray Data and MLflow"
BARE_LOOP = "the same loop without them"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        start_ray()
        source = synthetic_source(256, longest_side=args.size)
        prepare(source, f"{folder}/train", split="train", options=PrepareOptions())
        seconds: dict[str, list[float]] = {ON_RAY: [], BARE_LOOP: []}
        waits = []
        for number in range(args.rounds):
            content = {
                "name": f"round-{number}",
                "storage": f"{folder}/runs",
                "data": {"train": f"{folder}/train"},
                "model": {"variant": "n", "input_size": [args.size, args.size], "num_queries": 60},
                "schedule": {"steps": args.steps, "global_batch_size": 8, "no_aug_epochs": 0},
            }
            experiment = check(Experiment, content, source="benchmark")
            launch(experiment, Cluster(workers=2, gpus_per_worker=0, cpus_per_worker=0.5, threads_per_worker=1))
            on_ray = recorded(f"{folder}/runs/mlflow.db", f"round-{number}")
            seconds[ON_RAY].append(statistics.median(on_ray["train/speed/step_s"][1:]))
            waits.append(statistics.median(on_ray["train/speed/data_wait_share"][1:]))
            seconds[BARE_LOOP].append(bare_loop(content, folder))
        ray.shutdown()
        medians = {name: statistics.median(values) for name, values in seconds.items()}
        for name, value in medians.items():
            print(f"{name:40}{1000 * value:8.0f} ms a step")
        first, second = medians.values()
        print(
            f"overhead {first / second - 1:+.1%} (bar: 3 %); of the step {statistics.median(waits):.1%} waits for data (bar: 2 %)"
        )


def recorded(database: str, run: str) -> dict[str, list[float]]:
    """Read the values of each metric of a run, in order of steps."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{database}")
    (found,) = client.search_runs(["1"], f"attributes.run_name = '{run}'")
    names = ("train/speed/step_s", "train/speed/data_wait_share")
    return {name: [m.value for m in client.get_metric_history(found.info.run_id, name)] for name in names}


def bare_loop(content: dict[str, Any], folder: str) -> float:
    """Median seconds of a step of the loop alone, in two processes without Ray and MLflow."""
    queue: Any = mp.get_context("spawn").SimpleQueue()
    with tempfile.TemporaryDirectory() as meeting:
        processes: Any = mp  # spawn has no types
        processes.spawn(bare_worker, args=(content, f"{folder}/bare", meeting, queue), nprocs=2)
    result: float = queue.get()
    return result


def bare_worker(rank: int, content: dict[str, Any], folder: str, meeting: str, queue: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}/point", rank=rank, world_size=2)
    content = {**content, "storage": folder, "data": {**content["data"], "decode_in": "inline"}}
    experiment = check(Experiment, content, source="benchmark")
    data = resolve_data(experiment.data)
    schedule = derive(experiment, images=data.train.images_in_epoch, workers=2)
    job = TrainJob(experiment, data, schedule, run=f"{folder}/run", tracking=None)
    context = WorkerContext(rank, 2, torch.device("cpu"), broadcast=lambda value: value, console=SilentConsole())
    state, guard, log = loop.new_state(job, context), NonFiniteGuard(job, context), RunLog(job, context)
    batches = loop.open_stream(job, context, state)
    times = []
    for _ in range(schedule.steps):
        started_at = time.perf_counter()
        loop.run_step(job, context, state, batches, guard, log)
        times.append(time.perf_counter() - started_at)
    if rank == 0:
        # Like the logged metrics: means over ten steps, without the first ten.
        tens = [statistics.mean(times[i : i + 10]) for i in range(10, len(times) - 9, 10)]
        queue.put(statistics.median(tens))
    dist.destroy_process_group()


class SilentConsole:
    def heartbeat(self, step: int, activity: str) -> None: ...
    def working(self, step: int, activity: str) -> AbstractContextManager[None]:
        return nullcontext()

    def print(self, text: str) -> None: ...
    def progress(self, step: int, note: str) -> None: ...


if __name__ == "__main__":
    main()
