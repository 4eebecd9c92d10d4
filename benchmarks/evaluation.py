"""Seconds and memory from the detections of a detector to the report of an evaluation, on the CPU.

    python -m benchmarks.evaluation                                   COCO's size, all by pycocotools too
    python -m benchmarks.evaluation --images 80000 --classes 365 --boxes 15 --workers 2
    python -m benchmarks.evaluation --images 24 --rounds 50 --fast    a small set

Ground truth and detections are simulated: a few detections near each true box and the rest anywhere, most scores low, classes
with a long tail. Every worker is a process, which simulates its own detections while it evaluates; that time is measured apart.
"""

import argparse
import multiprocessing
import os
import resource
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier
from typing import Any

import numpy as np

from pipeline.data.shards.manifest import Category
from pipeline.evaluation.detections import DetectionTable
from pipeline.evaluation.evaluate import evaluate_detections
from pipeline.evaluation.ground_truth import GroundTruth

IMAGES_AT_ONCE = 64  # simulated


@dataclass(frozen=True)
class Size:
    """Size of the simulated set."""

    images: int
    classes: int
    boxes: int  # per image
    detections: int  # per image


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--classes", type=int, default=80)
    parser.add_argument("--boxes", type=int, default=7, help="true boxes per image")
    parser.add_argument("--detections", type=int, default=300, help="per image")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=1, help="the fastest counts")
    parser.add_argument("--fast", action="store_true", help="no pycocotools, as in the evaluations of a training")
    args = parser.parse_args(argv)

    size = Size(args.images, args.classes, args.boxes, args.detections)
    print(
        f"{size.images:,} images, {size.classes} classes, {size.images * size.boxes:,} true boxes,"
        f" {size.images * size.detections:,} detections; {args.workers} worker(s), {os.cpu_count()} cores\n"
    )
    context = multiprocessing.get_context("spawn")
    queue: Queue[dict[str, Any]] = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        barrier = context.Barrier(args.workers)
        settings = (args.workers, f"{folder}/exchange", size, args.rounds, not args.fast, barrier, queue)
        workers = [context.Process(target=work, args=(rank, *settings)) for rank in range(args.workers)]
        for worker in workers:
            worker.start()
        results = sorted((queue.get() for _ in workers), key=lambda result: result["rank"])
        for worker in workers:
            worker.join()
    for result in results:
        print(
            f"worker {result['rank']}: {result['wall_s']:.3f} s wall, {result['cpu_s']:.3f} s CPU,"
            f" and {result['simulation_s']:.2f} s CPU for simulating;"
            f" peak {result['peak']:.2f} GiB, {result['base']:.2f} GiB before"
        )
    print(f"\n{sum(result['cpu_s'] for result in results):.2f} s CPU in all\n\n{results[0]['table']}")


def work(
    rank: int,
    world_size: int,
    shared: str,
    size: Size,
    rounds: int,
    final: bool,
    barrier: Barrier,
    queue: "Queue[dict[str, Any]]",
) -> None:
    """Evaluate as one of the workers, and report time and memory."""
    truth = ground_truth_of(size)
    base = peak_gib()
    measured = []

    def broadcast(_: Any) -> str:
        barrier.wait()
        return f"{shared}/round"

    for _ in range(rounds):
        simulation = {"cpu": 0.0, "wall": 0.0}
        barrier.wait()
        cpu, wall = time.process_time(), time.perf_counter()
        report = evaluate_detections(
            simulated(size, truth, rank, world_size, simulation),
            truth,
            rank=rank,
            world_size=world_size,
            broadcast=broadcast,
            shared=shared,
            final=final,
        )
        measured.append(
            (time.perf_counter() - wall - simulation["wall"], time.process_time() - cpu - simulation["cpu"])
        )
    wall_s, cpu_s = min(measured)
    table = report.table() if report is not None else ""
    queue.put(
        {"rank": rank, "wall_s": wall_s, "cpu_s": cpu_s, "simulation_s": simulation["cpu"], "table": table}
        | {"peak": peak_gib(), "base": base}
    )


def peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def ground_truth_of(size: Size) -> GroundTruth:
    random = np.random.default_rng(0)
    total = size.images * size.boxes
    low, side = random.uniform(0, 500, (total, 2)), random.lognormal(4, 0.8, (total, 2)).clip(4, 400)
    return GroundTruth(
        image_id=np.arange(size.images) * 7 + 10**9,
        width=np.full(size.images, 640, np.int32),
        height=np.full(size.images, 640, np.int32),
        file_name=tuple(f"{number}.jpg" for number in range(size.images)),
        image=np.repeat(np.arange(size.images), size.boxes),
        box=np.concatenate([low, low + side], axis=1).astype(np.float32),
        label=long_tail(random, size.classes, total),
        area=side.prod(1).astype(np.float32),
        crowd=random.random(total) < 0.02,
        categories=tuple(Category(label=k, original_id=k + 1, name=f"class {k}") for k in range(size.classes)),
    )


def simulated(
    size: Size, truth: GroundTruth, rank: int, world_size: int, spent: dict[str, float]
) -> Iterator[DetectionTable]:
    """Detections in every `world_size`-th group of images; the same for any number of workers."""
    for first in range(rank * IMAGES_AT_ONCE, size.images, world_size * IMAGES_AT_ONCE):
        cpu, wall = time.process_time(), time.perf_counter()
        table = detections_in(size, truth, first, min(first + IMAGES_AT_ONCE, size.images))
        spent["cpu"] += time.process_time() - cpu
        spent["wall"] += time.perf_counter() - wall
        yield table


def detections_in(size: Size, truth: GroundTruth, first: int, stop: int) -> DetectionTable:
    """Draw detections image by image: first one near each true box, then more around them, with half of the classes right."""
    random = np.random.default_rng([1, first])
    images = stop - first
    rows = slice(first * size.boxes, stop * size.boxes)
    box = truth.box[rows].reshape(images, size.boxes, 4)
    label = truth.label[rows].reshape(images, size.boxes)
    near = np.tile(np.arange(size.boxes), -(-size.detections // size.boxes))[: size.detections]
    spread = np.where(np.arange(size.detections) < 3 * size.boxes, 0.1, 0.7)[:, None]
    side = np.tile(box[..., 2:] - box[..., :2], 2)[:, near]
    moved = box[:, near] + random.normal(0, 1, (images, size.detections, 4)) * spread * side
    moved[..., 2:] = np.maximum(moved[..., 2:], moved[..., :2] + 1)
    right = random.random((images, size.detections)) < np.where(np.arange(size.detections) < 3 * size.boxes, 0.6, 0.05)
    guess = long_tail(random, size.classes, images * size.detections).reshape(images, size.detections)
    score = -np.sort(-(random.random((images, size.detections)).astype(np.float32) ** 4), axis=1)
    return DetectionTable(
        image_id=np.repeat(truth.image_id[first:stop], size.detections),
        label=np.where(right, label[:, near], guess).ravel().astype(np.int32),
        score=score.ravel(),
        box=moved.reshape(-1, 4).astype(np.float32),
    )


def long_tail(random: np.random.Generator, classes: int, number: int) -> "np.ndarray[Any, np.dtype[np.int32]]":
    return (np.minimum(random.zipf(1.3, number), classes) - 1).astype(np.int32)


if __name__ == "__main__":
    main()
