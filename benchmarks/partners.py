"""Partners of mosaics: how close drawing from a window is to drawing from the whole set, and what reading them costs.

python -m benchmarks.partners                   arithmetic on a plan of COCO's size
python -m benchmarks.partners data/mine/train   also reads one window, the whole of that shard set
"""

import argparse
import multiprocessing
import re
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.data.augment.settings import AugmentSettings
from pipeline.data.augment.stages import WHOLLY_DENSE
from pipeline.data.shards.manifest import load_shards
from pipeline.data.shards.reader import locate_row_groups
from pipeline.data.stream.partners import MIN_POOL_ROWS, PARTNERS, partner_pools
from pipeline.data.stream.plan import BatchPlan
from pipeline.data.stream.settings import DEFAULT_WINDOW_ROWS
from pipeline.data.stream.stream import StreamSettings, training_plan
from pipeline.data.stream.tasks import Augmentation, read_window

IMAGES, GROUP_ROWS, SHARD_ROWS = 118_287, 32, 2400
EPOCHS, WATCHED = 25, 60  # dense epochs of L, and images whose partners are collected


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("manifest", nargs="?", help="shard set of about 2,000 images, to be read as one window")
    args = parser.parse_args(argv)
    print(f"{IMAGES} images; partners of one image over {EPOCHS} epochs with p 0.5\n")
    print(
        f"{'lanes x micro-batch':22}{'pool':>6}{'own row group':>15}{'own shard':>11}{'distinct':>10}{'whole set':>11}"
    )
    for lanes, micro_batch_size in ((1, 32), (4, 8), (8, 4), (32, 4)):
        print_closeness(lanes, micro_batch_size)
    if args.manifest:
        print(f"\n{'one window, 4 x 8':22}{'most memory':>14}{'encoded':>10}{'CPU':>8}")
        for name, probability in (("plain", 0.0), ("mosaics with p 0.5", 0.5)):
            with multiprocessing.get_context("spawn").Pool(1) as pool:  # a process of its own has its own peak
                memory, encoded, seconds = pool.apply(read, (args.manifest, probability))
            print(f"{name:22}{memory:>10.0f} MiB{encoded:>6.0f} MiB{seconds:>6.2f} s")


def print_closeness(lanes: int, micro_batch_size: int) -> None:
    rows = np.minimum(GROUP_ROWS, IMAGES - np.arange(0, IMAGES, GROUP_ROWS))
    window_rows = max(DEFAULT_WINDOW_ROWS, MIN_POOL_ROWS * lanes)
    plan = BatchPlan(rows, lanes * micro_batch_size, micro_batch_size, seed=0, window_rows=window_rows)
    sizes, of_group, of_shard = [], [], []
    for window in plan.windows(0, plan.steps_per_epoch):
        for pool in partner_pools(plan, window, list(range(lanes))):
            sizes.append(len(pool))
            of_group.append(chance_of_meeting(pool.group))
            of_shard.append(chance_of_meeting(pool.group * GROUP_ROWS // SHARD_ROWS))
    generator = np.random.default_rng(0)
    collected = collect_partners(plan, lanes, generator.choice(IMAGES, WATCHED, replace=False), generator)
    distinct = np.mean([len(set(partners)) for partners in collected])
    whole = np.mean([len(set(generator.integers(IMAGES, size=len(partners)).tolist())) for partners in collected])
    print(
        f"{f'{lanes} x {micro_batch_size}':22}{np.mean(sizes):>6.0f}{np.mean(of_group):>15.2%}{np.mean(of_shard):>11.2%}"
        f"{distinct:>10.2f}{whole:>11.2f}"
    )


def chance_of_meeting(parts: NDArray[np.int64]) -> float:
    """Chance that two rows of a pool, drawn with replacement, are of the same part."""
    counts = np.unique(parts, return_counts=True)[1]
    return float(np.square(counts / len(parts)).sum())


def collect_partners(
    plan: BatchPlan, lanes: int, watched: NDArray[np.int64], generator: np.random.Generator
) -> list[list[int]]:
    """Partners of some images over all epochs."""
    starts = np.concatenate([[0], np.cumsum(plan.row_groups)[:-1]])
    collected: dict[int, list[int]] = {int(image): [] for image in watched}
    for epoch in range(EPOCHS):
        first = epoch * plan.steps_per_epoch
        for window in plan.windows(first, first + plan.steps_per_epoch):
            pools = partner_pools(plan, window, list(range(lanes)))
            for rows, pool in zip(plan.rows(window, range(lanes)), pools, strict=True):
                here = set((starts[rows.group] + rows.row).tolist())
                numbers = starts[pool.group] + pool.row
                for image in here & collected.keys():
                    if generator.random() < 0.5:
                        collected[image] += numbers[generator.integers(len(numbers), size=PARTNERS)].tolist()
    return list(collected.values())


def read(folder: str, probability: float) -> tuple[float, float, float]:
    """Most memory of a process that reads one window, MiB of its blocks, CPU seconds."""
    shards = load_shards(folder)
    augment = AugmentSettings(mosaic_probability=probability)
    settings = StreamSettings(global_batch_size=32, micro_batch_size=8, canvas=(640, 640), augment=augment)
    plan = replace(training_plan(shards, settings), window_rows=shards.manifest.images // 32 * 32)
    (window, *_) = plan.windows(0, plan.steps_per_epoch)
    item = pa.Table.from_pylist([asdict(window)])
    source, augmentation = locate_row_groups(shards), Augmentation(0, augment, WHOLLY_DENSE)
    before, encoded = time.process_time(), 0
    for block in read_window(
        item, source, plan, lanes=[(0, 1, 2, 3)], block_steps=6, start_step=0, augmentation=augmentation
    ):
        encoded += block.nbytes
    (kibibytes,) = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(kibibytes) / 1024, encoded / 2**20, time.process_time() - before


if __name__ == "__main__":
    main()
