"""Throughput, waits and memory of the input pipeline, in one table from one run.

    python -m benchmarks.input                          generated images
    python -m benchmarks.input data/coco/train          any prepared shard set

Ray Data and a torch DataLoader do the same work on the same micro-batches, with equally many decoding processes, alternately. The
DataLoader has its encoded images in memory, Ray Data reads them from the shards.
"""

import argparse
import contextlib
import os
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import ray
import torch
from ray._private.internal_api import memory_summary
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from benchmarks import augment as augment_benchmark
from pipeline.data.augment.settings import AugmentSettings
from pipeline.data.prepare.prepare import prepare
from pipeline.data.prepare.shard_writer import PrepareOptions
from pipeline.data.shards.manifest import ShardSet, load_shards
from pipeline.data.shards.reader import RowGroups, locate_row_groups, read_row_groups
from pipeline.data.shards.records import records_from_table
from pipeline.data.sources.synthetic import synthetic_source
from pipeline.data.stream import ray_executions
from pipeline.data.stream.batch import Batch, batches_from_arrow
from pipeline.data.stream.plan import BatchPlan, Window
from pipeline.data.stream.stream import StreamSettings, training_plan, training_stream
from pipeline.data.stream.tasks import Augmentation, DecodeSettings, decode_block, read_window
from pipeline.ray_cluster import start_ray

CANVAS = (640, 640)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("manifest", nargs="?", help="path or URI of a shard set; default: generated images")
    parser.add_argument("--images", type=int, default=1024, help="to draw; a timed pass goes through them twice")
    parser.add_argument("--micro-batch", type=int, default=16)
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="that decode")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory-images", type=int, default=10_000)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    start_ray(num_cpus=args.processes)
    with tempfile.TemporaryDirectory() as folder:
        shards = load_shards(args.manifest) if args.manifest else synthetic_shards(folder, args.images)
        settings = StreamSettings(
            global_batch_size=args.micro_batch,
            micro_batch_size=args.micro_batch,
            canvas=CANVAS,
            augment=AugmentSettings(),
            window_rows=512,
        )
        steps = 2 * (min(args.images, shards.manifest.images) // args.micro_batch)
        bytes_per_image = sum(shard.bytes for shard in shards.manifest.shards) / shards.manifest.images
        print(f"{shards.manifest.images} images of {bytes_per_image / 1000:.0f} kB on average, to {CANVAS},", end=" ")
        print(f"micro-batches of {args.micro_batch}, {args.processes} decoding processes\n")
        print_augmentation(shards)
        print_throughput(shards, settings, steps, args.processes, args.rounds)
        print_seams(shards, settings)
        print_bytes_read(shards, settings)
        print_memory(shards, settings, args.memory_images)


def synthetic_shards(folder: str, images: int) -> ShardSet:
    source = synthetic_source(images, longest_side=640)
    return prepare(source, f"{folder}/synthetic", split="synthetic", options=PrepareOptions(shard_mib=16))


def line(what: str, value: str, bar: str = "") -> None:
    print(f"{what:62}{value:>22}  {bar}".rstrip(), flush=True)


# Decode and augmentation


def print_augmentation(shards: ShardSet) -> None:
    source = locate_row_groups(shards)
    (table, *_) = read_row_groups(source, [0]).values()
    images = [
        augment_benchmark.Annotated(
            image_id=r.image_id,
            encoded=r.image,
            width=r.width,
            height=r.height,
            boxes=r.boxes[~r.crowd],
            labels=r.labels[~r.crowd].astype(np.int64),
            areas=r.areas[~r.crowd],
        )
        for r in records_from_table(table)
    ]
    timed = {name: work for name, work in augment_benchmark.rows(images).items() if not name.startswith(" ")}
    seconds = augment_benchmark.fastest_seconds(timed, images, rounds=3)
    for name, value in seconds.items():
        times = seconds[augment_benchmark.RELEASED] / value
        line(f"one core: {name}", f"{1 / value:.0f} img/s, x{times:.1f}", "bar: ours x4" if times != 1 else "")


# Throughput


class MicroBatches(IterableDataset[Batch]):
    """Data set for a torch DataLoader: each worker decodes every n-th micro-batch, from rows in memory."""

    def __init__(self, encoded: list[pa.Table], decoding: DecodeSettings) -> None:
        self.encoded = encoded
        self.decoding = decoding

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        assert worker is not None
        for table in self.encoded[worker.id :: worker.num_workers]:
            yield from batches_from_arrow(decode_block(table, self.decoding), self.decoding.canvas)


@dataclass(frozen=True)
class Pass:
    """Measurements of one pass over the images; rates cover its second half, when all processes run."""

    images_per_second: float
    cpu_ms_per_image: float  # this process and its descendants; hardly affected by other programs
    first_batch: float  # seconds


def timed_pass(batches: Iterable[Batch], micro_batch_size: int) -> Pass:
    started = time.perf_counter()
    ends, cpu = [], []
    for batch in batches:
        batch.images.max()  # reads every pixel once, as a copy to a device would
        ends.append(time.perf_counter())
        cpu.append(cpu_seconds())
    half = len(ends) // 2
    images = micro_batch_size * (len(ends) - 1 - half)
    return Pass(images / (ends[-1] - ends[half]), 1000 * (cpu[-1] - cpu[half]) / images, ends[0] - started)


def print_throughput(shards: ShardSet, settings: StreamSettings, steps: int, processes: int, rounds: int) -> None:
    plan = training_plan(shards, settings)
    source = locate_row_groups(shards)
    encoded = [table for window in plan.windows(0, steps) for table in micro_batches_of(window, source, plan)]
    decoding = DecodeSettings(
        settings.canvas, settings.micro_batch_size, Augmentation(settings.seed, settings.augment, settings.stages)
    )
    loader = DataLoader(
        MicroBatches(encoded, decoding), batch_size=None, num_workers=processes, persistent_workers=True
    )
    in_worker = replace(settings, decode_in="worker", prefetch=processes)
    inline = replace(settings, decode_in="inline")
    rows: dict[str, Callable[[], Iterable[Batch]]] = {
        "torch DataLoader": lambda: loader,
        "Ray Data, decoding in tasks": lambda: training_stream(shards, settings, start_step=0, stop_step=steps),
        "Ray Data, decoding in the worker": lambda: training_stream(shards, in_worker, start_step=0, stop_step=steps),
        "this process alone": lambda: training_stream(shards, inline, start_step=0, stop_step=steps),
    }
    passes: dict[str, list[Pass]] = {name: [] for name in rows}
    for _ in range(rounds):
        for name, batches in rows.items():
            passes[name].append(timed_pass(batches(), settings.micro_batch_size))
    reference = statistics.median(p.images_per_second for p in passes["torch DataLoader"])
    for name, measured in passes.items():
        rate = statistics.median(p.images_per_second for p in measured)
        cpu = statistics.median(p.cpu_ms_per_image for p in measured)
        bar = "bar: 95%" if "tasks" in name else ""
        line(name, f"{rate:.0f} img/s, {rate / reference:.0%}", f"{cpu:.2f} ms of CPU per image  {bar}")
    for name, measured in passes.items():
        firsts = [p.first_batch for p in measured]
        line(f"first batch: {name}", f"{firsts[0]:.2f} s", f"then {statistics.median(firsts[1:] or firsts):.2f} s")


def micro_batches_of(window: Window, source: RowGroups, plan: BatchPlan) -> Iterator[pa.Table]:
    """Read a window, and yield the encoded micro-batches of its only lane."""
    item = pa.Table.from_pylist([asdict(window)])
    return read_window(item, source, plan, lanes=[(0,)], block_steps=1, start_step=0)


def cpu_seconds() -> float:
    """CPU seconds of this process and its descendants, including terminated ones."""
    ticks = os.sysconf("SC_CLK_TCK")
    return (
        sum(sum(map(int, fields[11:15])) for fields in process_tree().values()) / ticks
    )  # includes their reaped children


def process_tree() -> dict[int, list[str]]:
    """Fields of /proc/PID/stat after the name, for this process and its descendants."""
    stats = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            pid, rest = path.read_text().split(" (", 1)
            stats[int(pid)] = rest.rpartition(") ")[2].split()
    tree = {os.getpid()}
    while more := {pid for pid, fields in stats.items() if int(fields[1]) in tree} - tree:
        tree |= more
    return {pid: stats[pid] for pid in tree}


# Seams


def print_seams(shards: ShardSet, settings: StreamSettings) -> None:
    """Print the waits of a training whose step takes 1.5 times as long as a batch: each wait is a stall of the stream.

    Every window is made an execution of Ray Data of its own.
    """
    plan = training_plan(shards, settings)
    usual, ray_executions.EXECUTION_BLOCKS = ray_executions.EXECUTION_BLOCKS, 1  # every window its own
    stop = 3 * plan.steps_per_epoch
    waits: list[float] = []
    step_seconds, ready = 0.0, time.perf_counter()
    for _ in training_stream(shards, settings, start_step=0, stop_step=stop):
        waits.append(time.perf_counter() - ready)
        if len(waits) == plan.steps_per_window:
            step_seconds = 1.5 * statistics.mean(waits[1:])
        time.sleep(step_seconds)
        ready = time.perf_counter()
    ray_executions.EXECUTION_BLOCKS = usual

    seams = [window.first_step for window in plan.windows(0, stop)][2:]  # the step duration is set in the first
    epochs = [step for step in seams if step % plan.steps_per_epoch == 0]
    elsewhere = set(range(seams[0], stop)) - {step + i for step in seams for i in range(3)}
    of_step = f"of a step of {step_seconds * 1000:.0f} ms"
    for name, steps in (("segments", seams), ("epochs", epochs)):
        waited = max(max(waits[step : step + 3]) for step in steps)
        line(f"longest wait at the seams of {len(steps)} {name}", f"{waited * 1000:.0f} ms", of_step)
    line("longest wait elsewhere", f"{max(waits[step] for step in elsewhere) * 1000:.0f} ms", of_step)


# Bytes and memory


def print_bytes_read(shards: ShardSet, settings: StreamSettings) -> None:
    """Print the bytes that read tasks read in one epoch, counted by the operating system."""
    plan, source = training_plan(shards, settings), locate_row_groups(shards)
    before, needed = bytes_read(), 0
    for window in plan.windows(0, plan.steps_per_epoch):
        for table in micro_batches_of(window, source, plan):
            needed += table.column("rows").chunk(0).nbytes
    ratio = (bytes_read() - before) / needed
    expected = 1 + statistics.mean(source.rows.tolist()) / (plan.steps_per_window * plan.global_batch_size)
    line("bytes read / bytes needed", f"{ratio:.3f}", f"arithmetic: {expected:.3f}")


def bytes_read() -> int:
    (count,) = re.findall(r"rchar: (\d+)", Path("/proc/self/io").read_text())
    return int(count)


def print_memory(shards: ShardSet, settings: StreamSettings, images: int) -> None:
    stop = images // settings.micro_batch_size
    samples = [
        (resident_mebibytes([os.getpid()]), resident_mebibytes(process_tree()), stored_mebibytes())
        for batch in training_stream(shards, settings, start_step=0, stop_step=stop)
        if batch.step % max(1, stop // 20) == 0
    ]
    batch_mebibytes = settings.micro_batch_size * 3 * CANVAS[0] * CANVAS[1] / 2**20
    halves = [np.max(half, axis=0) for half in np.array_split(np.array(samples[1:]), 2)]
    for name, first, second in zip(("this process", "all processes", "object store"), *halves, strict=True):
        values = f"{first:.0f}, then {second:.0f} MiB"
        line(f"most memory in each half of {images} images: {name}", values, f"a batch is {batch_mebibytes:.0f} MiB")


def resident_mebibytes(pids: Iterable[int]) -> float:
    """Private memory of processes; their shared memory is the object store."""
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            total += sum(map(int, re.findall(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())))
    return total / 1024


def stored_mebibytes() -> float:
    summary = memory_summary(address=ray.get_runtime_context().gcs_address, stats_only=True)  # type: ignore[no-untyped-call]
    assert "Spilled" not in summary, summary
    (mebibytes,) = re.findall(r"Plasma memory usage (\d+) MiB", summary)
    return float(mebibytes)


if __name__ == "__main__":
    main()
