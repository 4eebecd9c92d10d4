"""Seconds from gathered detections to COCO metrics: hotcoco and pycocotools, on the CPU.

    python -m benchmarks.evaluation
    python -m benchmarks.evaluation --images 500 --rounds 3

Boxes are random: 7 ground truth boxes per image of 80 classes, a few detections around each and the rest anywhere, mostly
with low scores, 300 per image. hotcoco uses all cores, pycocotools one. Every row shows its fastest round.
"""

import argparse
import os
import resource
import time
from collections.abc import Callable
from typing import TypeVar

import numpy as np

from pipeline.data.shards.manifest import Category
from pipeline.evaluation.analysis import confusion, tide_errors
from pipeline.evaluation.coco_metrics import coco_numbers, difference, run_hotcoco
from pipeline.evaluation.detections import DetectionTable
from pipeline.evaluation.ground_truth import GroundTruth

T = TypeVar("T")

CLASSES = 80
GROUND_TRUTH_BOXES = 7  # per image
NEAR = 5  # detections around each ground truth box


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--detections", type=int, default=300, help="per image")
    parser.add_argument("--rounds", type=int, default=1, help="for hotcoco; pycocotools has one")
    args = parser.parse_args(argv)

    ground_truth, table = random_detections(args.images, args.detections)
    print(
        f"{len(ground_truth.image_id):,} images, {len(ground_truth.box):,} boxes, {len(table):,} detections,"
        f" {os.cpu_count()} cores\n"
    )

    fast_seconds, fast = fastest(lambda: coco_numbers(ground_truth, table), args.rounds)
    report("hotcoco: 12 numbers and per class", fast_seconds)
    run = run_hotcoco(ground_truth, table)
    report("TIDE's errors, from the same run", fastest(lambda: tide_errors(run), args.rounds)[0])
    report("confusion matrix", fastest(lambda: confusion(ground_truth, table), args.rounds)[0])
    slow_seconds, slow = fastest(lambda: coco_numbers(ground_truth, table, evaluator="pycocotools"), 1)
    report("pycocotools: 12 numbers and per class", slow_seconds)
    print(f"\nAP {fast.numbers['AP']:.6f}; {slow_seconds / fast_seconds:.0f} times as fast, they differ by", end=" ")
    print(f"{difference(fast, slow):.1g} at most")


def random_detections(images: int, detections: int) -> tuple[GroundTruth, DetectionTable]:
    random = np.random.default_rng(0)
    total = images * GROUND_TRUTH_BOXES
    low, size = random.uniform(0, 500, (total, 2)), random.lognormal(4, 0.8, (total, 2)).clip(4, 400)
    box = np.concatenate([low, low + size], axis=1)
    label = random.integers(0, CLASSES, total)
    ground_truth = GroundTruth(
        image_id=np.arange(images),
        width=np.full(images, 640, np.int32),
        height=np.full(images, 640, np.int32),
        file_name=tuple(f"{number}.jpg" for number in range(images)),
        image=np.repeat(np.arange(images), GROUND_TRUTH_BOXES),
        box=box.astype(np.float32),
        label=label.astype(np.int32),
        area=size.prod(1).astype(np.float32),
        crowd=random.random(total) < 0.01,
        categories=tuple(Category(label=k, original_id=k + 1, name=f"class {k}") for k in range(CLASSES)),
    )
    near = np.repeat(np.arange(total), NEAR)
    jittered = box[near] + random.normal(0, 0.1, (len(near), 4)) * np.tile(size[near], 2)
    named = np.where(random.random(len(near)) < 0.7, label[near], random.integers(0, CLASSES, len(near)))
    rest = images * (detections - GROUND_TRUTH_BOXES * NEAR)
    corner = random.uniform(0, 500, (rest, 2))
    anywhere = np.concatenate([corner, corner + random.lognormal(4, 0.8, (rest, 2))], axis=1)
    return ground_truth, DetectionTable(
        image_id=np.concatenate(
            [ground_truth.image[near], np.repeat(np.arange(images), detections - GROUND_TRUTH_BOXES * NEAR)]
        ),
        label=np.concatenate([named, random.integers(0, CLASSES, rest)]).astype(np.int32),
        score=np.concatenate([random.beta(1, 2, len(near)), random.beta(1, 30, rest)]).astype(np.float32),
        box=np.concatenate([jittered, anywhere]).astype(np.float32),
    )


def fastest(work: Callable[[], T], rounds: int) -> tuple[float, T]:
    seconds = []
    for _ in range(rounds):
        started_at = time.perf_counter()
        result = work()
        seconds.append(time.perf_counter() - started_at)
    return min(seconds), result


def report(name: str, seconds: float) -> None:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{name:45} {seconds:8.2f} s   {peak:5.1f} GiB at most so far", flush=True)


if __name__ == "__main__":
    main()
