"""CPU that the training stream costs per micro-batch, by process, for many workers: coordination alone, tiny images.

    python -m benchmarks.stream_scale --consumers 64
    python -m benchmarks.stream_scale --consumers 64 --modes task --steps 400 --pace 4

Consumers are threads, spread over one process per node of eight as training workers would be over machines; they take
their micro-batches in step, at a pace if one is given: for each consumer that waits, Ray Data looks a hundred times a second.
Images have 32 px, so that decoding costs little and bookkeeping is what remains. All CPU seconds are those of whole processes,
from the operating system.
"""

import argparse
import os
import tempfile
import threading
import time
from collections import defaultdict
from typing import Any

import psutil
import ray

from pipeline.data.augment.settings import AugmentSettings
from pipeline.data.prepare.prepare import prepare
from pipeline.data.prepare.shard_writer import PrepareOptions
from pipeline.data.shards.manifest import load_shards
from pipeline.data.sources.synthetic import synthetic_source
from pipeline.data.stream.stream import StreamSettings, training_stream
from pipeline.ray_cluster import start_ray

NODE_WORKERS = 8  # consumers in one process
POLL_SECONDS = 0.5


class Rendezvous:
    """Broadcast and barrier among the processes of the consumers."""

    def __init__(self, nodes: int) -> None:
        self.nodes = nodes
        self._values: dict[int, Any] = {}
        self._arrived: dict[str, int] = defaultdict(int)

    def put(self, number: int, value: Any) -> None:
        self._values[number] = value

    def get(self, number: int) -> tuple[bool, Any]:
        return number in self._values, self._values.get(number)

    def arrive(self, name: str) -> None:
        self._arrived[name] += 1

    def arrived(self, name: str) -> bool:
        return self._arrived[name] >= self.nodes


class Node:
    """One process with eight consumers as threads; node 0 holds rank 0."""

    def __init__(self, number: int, consumers: int, shards: str, settings: StreamSettings, meeting: Any) -> None:
        self.ranks = range(number * NODE_WORKERS, min((number + 1) * NODE_WORKERS, consumers))
        self.consumers, self.meeting = consumers, meeting
        self.shards, self.settings = load_shards(shards), settings
        self.broadcasts: dict[int, Any] = {}
        self.lock = threading.Lock()

    def pid(self) -> int:
        return os.getpid()

    def run(self, steps: int, pace: float) -> tuple[float, float, float]:
        """Seconds to the first step, to the last, and CPU seconds of this process."""
        step_barrier = threading.Barrier(len(self.ranks))
        started_at, first_at, cpu = time.time(), [0.0], time.process_time()

        def consume(rank: int) -> None:
            counter = iter(range(10**6))

            def broadcast(value: Any) -> Any:
                number = next(counter)
                if rank == 0:
                    ray.get(self.meeting.put.remote(number, value))
                with self.lock:
                    while number not in self.broadcasts:
                        there, received = ray.get(self.meeting.get.remote(number))
                        if there:
                            self.broadcasts[number] = received
                        else:
                            time.sleep(0.05)
                return self.broadcasts[number]

            stream = training_stream(
                self.shards,
                self.settings,
                start_step=0,
                stop_step=steps,
                rank=rank,
                world_size=self.consumers,
                broadcast=broadcast,
            )
            for step, _ in enumerate(stream):
                step_barrier.wait()
                if step == 0:
                    first_at[0] = time.time()
                elif pace:
                    time.sleep(max(0, first_at[0] + step / pace - time.time()))

        threads = [threading.Thread(target=consume, args=(rank,)) for rank in self.ranks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return first_at[0] - started_at, time.time() - started_at, time.process_time() - cpu


class CpuByProcess:
    """CPU seconds of all processes below this one, sampled until `stop`, by the role that their title names."""

    def __init__(self, consumers: set[int]) -> None:
        self._consumers = consumers
        self._first: dict[int, float] = {}
        self.last: dict[int, tuple[str, float]] = {}
        self.peak_mib: dict[str, float] = defaultdict(float)
        self._stopped = threading.Event()
        self._sample(first=True)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stopped.wait(POLL_SECONDS):
            self._sample()

    def _sample(self, first: bool = False) -> None:
        me = psutil.Process()
        for process in [me, *me.children(recursive=True)]:
            try:
                title = " ".join(process.cmdline())
                times = process.cpu_times()
                role = self._role(process.pid, title, self.last.get(process.pid, ("", 0))[0])
                self.last[process.pid] = role, times.user + times.system
                self.peak_mib[role] = max(self.peak_mib[role], process.memory_info().rss / 2**20)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
            if first:
                self._first[process.pid] = times.user + times.system

    def _role(self, pid: int, title: str, before: str) -> str:
        if pid == os.getpid():
            return "driver"
        if pid in self._consumers:
            return "consumers"
        for part, role in (("SplitCoord", "coordinator"), ("raylet/raylet", "raylet"), ("gcs_server", "gcs")):
            if part in title:
                return role
        if title.startswith("ray::"):
            return before if before == "coordinator" else "tasks"
        return before or "other"

    def stop(self) -> dict[int, tuple[str, float]]:
        """Role and CPU seconds of each process since the start."""
        self._stopped.set()
        self._thread.join()
        self._sample()
        return {pid: (role, total - self._first.get(pid, 0.0)) for pid, (role, total) in self.last.items()}


def measure(consumers: int, shards: str, mode: str, steps: int, pace: float) -> None:
    """One mode: print CPU per micro-batch of each role, and of the busiest process that coordinates."""
    settings = StreamSettings(
        global_batch_size=consumers,
        micro_batch_size=1,
        canvas=(32, 32),
        augment=AugmentSettings(),
        decode_in=mode,  # type: ignore[arg-type]
    )
    nodes = -(-consumers // NODE_WORKERS)
    meeting = ray.remote(num_cpus=0)(Rendezvous).remote(nodes)
    make: Any = ray.remote(num_cpus=0)(Node)
    workers = [make.remote(n, consumers, shards, settings, meeting) for n in range(nodes)]
    pids = set(ray.get([worker.pid.remote() for worker in workers]))
    cpu = CpuByProcess(pids)
    results = ray.get([worker.run.remote(steps, pace) for worker in workers])
    by_process = cpu.stop()
    micro_batches = steps * consumers
    first, last = max(r[0] for r in results), max(r[1] for r in results)
    print(
        f"\n{mode}: {micro_batches:,} micro-batches for {consumers} consumers; first after {first:.1f} s, then"
        f" {(micro_batches - consumers) / (last - first):.0f} a second on {os.cpu_count()} cores"
    )
    roles: dict[str, list[float]] = defaultdict(list)
    for role, seconds in by_process.values():
        if seconds > 0:
            roles[role].append(seconds)
    print(f"  {'role':14}{'processes':>10}{'ms a micro-batch':>18}{'busiest':>10}{'peak MiB':>10}")
    for role, of_role in sorted(roles.items(), key=lambda item: -sum(item[1])):
        each = [1000 * seconds / micro_batches for seconds in of_role]
        print(f"  {role:14}{len(each):>10}{sum(each):>18.3f}{max(each):>10.3f}{cpu.peak_mib[role]:>10.0f}")
    busiest_role, busiest = max(
        ((role, max(seconds)) for role, seconds in roles.items() if role != "tasks"), key=lambda item: item[1]
    )
    coordination = sum(sum(roles[role]) for role in ("coordinator", "raylet", "gcs", "driver"))
    print(f"  busiest process ({busiest_role}): {1000 * busiest / micro_batches:.3f} ms of CPU per micro-batch")
    print(f"  coordination in all: {1000 * coordination / micro_batches:.3f} ms of CPU per micro-batch")


def main(argv: list[str] | None = None) -> None:
    """Measure both modes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--consumers", type=int, default=64)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--pace", type=float, default=0, help="steps a second of the consumers; 0: as fast as they can")
    parser.add_argument("--modes", nargs="+", choices=("task", "worker"), default=["task", "worker"])
    parser.add_argument("--images", type=int, default=4096)
    args = parser.parse_args(argv)
    start_ray()
    with tempfile.TemporaryDirectory() as folder:
        shards = f"{folder}/train"
        prepare(synthetic_source(args.images, longest_side=32), shards, split="train", options=PrepareOptions())
        for mode in args.modes:
            measure(args.consumers, shards, mode, args.steps, args.pace)
    ray.shutdown()


if __name__ == "__main__":
    main()
