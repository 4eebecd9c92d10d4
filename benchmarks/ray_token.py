"""Cost of token authentication and loopback addresses: clusters on this machine with and without, in turn.

    python -m benchmarks.ray_token [--rounds 3]

CPU seconds of all processes of a cluster, from its start to the end of 500 tasks and 500 calls of an actor.
"""

import argparse
import contextlib
import logging
import multiprocessing
import os
import statistics
import tempfile
import time
from typing import Any

import psutil


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    found: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    for _ in range(args.rounds):
        for private in found:
            with context.Pool(1) as pool:
                found[private].append(pool.apply(measure, (private,)))
            start, work = found[private][-1]
            print(f"{'token' if private else 'open '}  start {start:.2f} CPU-s  calls {work:.2f} CPU-s", flush=True)
    for number, name in enumerate(("start", "calls")):
        with_token, without = (statistics.median(row[number] for row in found[private]) for private in found)
        print(f"{name}: {with_token:.2f} with, {without:.2f} without: ratio {with_token / without:.3f}")


def measure(private: bool) -> tuple[float, float]:
    """CPU seconds of a start, and of the calls after it."""
    import ray

    from pipeline.ray_cluster import LOCAL_ENVIRONMENT, QUIET_ENVIRONMENT, private_cluster

    # Inside, so that Ray's workers need not import this program.
    def empty() -> None: ...

    class Empty:
        def call(self) -> None: ...

    os.environ.update(QUIET_ENVIRONMENT | LOCAL_ENVIRONMENT | {"RAY_AUTH_MODE": "disabled"})
    os.environ.pop("RAY_ADDRESS", None)
    before = cpu_seconds()
    with private_cluster(tempfile.gettempdir()) if private else contextlib.nullcontext():
        ray.init("local", num_cpus=1, include_dashboard=False, logging_level=logging.WARNING)
    ray.get(ray.remote(empty).remote())
    started = cpu_seconds()
    ray.get([ray.remote(empty).remote() for _ in range(500)])
    actor: Any = ray.remote(Empty).remote()
    ray.get([actor.call.remote() for _ in range(500)])
    ended = cpu_seconds()
    ray.shutdown()
    return started - before, ended - started


def cpu_seconds() -> float:
    """CPU seconds of this process and those below it."""
    time.sleep(1)  # for what still runs
    total = 0.0
    for process in (own := psutil.Process(), *own.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            total += times.user + times.system + (times.children_user + times.children_system)
    return total


if __name__ == "__main__":
    main()
