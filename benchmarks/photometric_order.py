"""Training losses with the photometric distortion after the resize, as here, and before it, as in the released recipe.

    dfine prepare voc BCCD --split trainval --out shards/bccd/train
    python -m benchmarks.photometric_order shards/bccd/train --out order     half an hour of one core
    ... --report                                                            only print what `order` holds

Each pair of runs shares everything but that order: initial weights, images, views, colours and denoising queries. A finished
run is a file in the output folder, so an interrupted measurement goes on where it was. Losses are means over the last 50 steps,
summed over all stages; the difference is that of a pair.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import torch
from scipy.stats import t as student_t

from dfine_core import Criterion, Detector, ModelConfig, Targets
from dfine_core.config import OptimizerConfig
from dfine_core.model.denoising import sample_queries_for
from dfine_core.optim import learning_rate_factor, make_optimizer
from pipeline.data.augment.decode import decode_rgb
from pipeline.data.augment.generators import keyed_generator
from pipeline.data.augment.photometric_parameters import Photometric, draw_photometric, mean_grey
from pipeline.data.augment.photometric_pixels import distort_pixels
from pipeline.data.augment.samples import AnnotatedImage, Sample, augmented_sample, without_crowd
from pipeline.data.augment.settings import AugmentSettings
from pipeline.data.shards.manifest import load_shards
from pipeline.data.shards.reader import locate_row_groups, read_row_groups
from pipeline.data.shards.records import records_from_table

SETTINGS = AugmentSettings()
ORDERS = ("after", "before")
GROUPS = {"boxes (L1, GIoU)": ("bbox", "giou"), "edges (FGL)": ("fgl",), "scores (VFL)": ("vfl",), "DDF": ("ddf",)}
LAST = 50  # steps that are averaged


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", help="shard set to train on")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--side", type=int, default=160, help="side of the input in pixels")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--report", action="store_true", help="train nothing")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    files = {(seed, order): args.out / f"{order}_{seed}.json" for seed in range(args.seeds) for order in ORDERS}
    if not args.report:
        images, classes = read_images(args.shards)
        for (seed, order), file in files.items():
            if file.exists():
                continue
            terms, seconds = train(
                images, classes, order, seed=seed, steps=args.steps, side=args.side, batch=args.batch
            )
            partial = file.with_suffix(".partial")
            partial.write_text(json.dumps({"cpu_seconds": seconds, "terms": terms}))
            partial.rename(file)
            print(f"{order} {seed}: {seconds:.0f} s", flush=True)
    report({key: json.loads(file.read_text()) for key, file in files.items() if file.exists()}, args.seeds)


def read_images(location: str) -> tuple[list[AnnotatedImage], int]:
    """All images of a shard set, and its number of classes."""
    shards = load_shards(location)
    groups = locate_row_groups(shards)
    tables = read_row_groups(groups, range(len(groups.rows)))
    records = [record for _, table in sorted(tables.items()) for record in records_from_table(table)]
    return [without_crowd(record) for record in records], len(shards.categories)


def sample_in_order(image: AnnotatedImage, order: str, *, seed: int, epoch: int, image_id: int, side: int) -> Sample:
    """An augmented sample whose colours were changed after or before the resize; the draws are the same in both."""
    row = draw_photometric(keyed_generator("image", seed, epoch, image_id), SETTINGS)  # the first that a sample draws
    pixels = decode_rgb(image.encoded, image.width, image.height).copy()
    if order == "before":
        row[Photometric.MEAN_GREY] = mean_grey(pixels)
        row[Photometric.LEFT :] = 0, 0, image.width, image.height
        distort_pixels(pixels, row)
    encoded = cv2.imencode(".png", pixels[..., ::-1], [cv2.IMWRITE_PNG_COMPRESSION, 0])[1].tobytes()
    sample = augmented_sample(
        replace(image, encoded=encoded),
        seed=seed,
        epoch=epoch,
        image_id=image_id,
        settings=SETTINGS,
        canvas=(side, side),
    )
    if order == "after":
        distort_pixels(sample.image, sample.photometric)
    return sample


def train(
    images: Sequence[AnnotatedImage], classes: int, order: str, *, seed: int, steps: int, side: int, batch: int
) -> tuple[dict[str, list[float]], float]:
    """Train D-FINE-N from scratch: each loss term in the last steps, and the CPU seconds it took."""
    started = time.process_time()
    config = ModelConfig.variant("n", num_classes=classes, input_size=(side, side), num_queries=100)
    torch.manual_seed(seed)
    detector, criterion = Detector(config).train(), Criterion(config)
    # Rates for so small a batch from scratch, with a short warm-up.
    optimizer = make_optimizer(detector, OptimizerConfig(lr=4e-4, backbone_lr=4e-4))
    order_of_images = np.random.default_rng(seed)
    noise = torch.Generator().manual_seed(seed)
    kept: dict[str, list[float]] = {}
    waiting: list[int] = []
    epoch = -1
    for step in range(steps):
        if len(waiting) < batch:
            epoch += 1
            waiting = order_of_images.permutation(len(images)).tolist()
        chosen, waiting = waiting[:batch], waiting[batch:]
        samples = [sample_in_order(images[i], order, seed=seed, epoch=epoch, image_id=i, side=side) for i in chosen]
        pixels = torch.from_numpy(np.stack([s.image for s in samples])).permute(0, 3, 1, 2).float().div(255)
        boxes = [{"labels": torch.from_numpy(s.labels), "boxes": torch.from_numpy(s.boxes)} for s in samples]
        targets = Targets.pack(boxes, classes, torch.device("cpu"))
        terms = criterion(detector(pixels, targets, sample_queries_for(config, targets, noise) or False), targets)
        for group in optimizer.param_groups:
            group["lr"] = 4e-4 * learning_rate_factor(step, warmup_steps=50)
        optimizer.zero_grad()
        torch.stack(list(terms.values())).sum().backward()
        torch.nn.utils.clip_grad_norm_(detector.parameters(), 0.1)
        optimizer.step()
        if step >= steps - LAST:
            for name, value in terms.items():
                kept.setdefault(name, []).append(float(value.detach()))
    return kept, time.process_time() - started


def report(results: dict[tuple[int, str], dict[str, object]], seeds: int) -> None:
    """Print a table of means and their spread over seeds, and of the differences within pairs."""
    paired = [seed for seed in range(seeds) if all((seed, order) in results for order in ORDERS)]
    if len(paired) < 2:
        print(f"{len(paired)} finished pairs: no spread yet")
        return
    reach = float(student_t.ppf(0.975, len(paired) - 1)) / math.sqrt(len(paired))
    print(f"{len(paired)} seeds, mean ± standard deviation; before - after in %, with the 95 % interval of its mean")
    for title, kinds in GROUPS.items():
        for part in ("matching", "denoising"):
            sums = {order: [total(results[seed, order]["terms"], kinds, part) for seed in paired] for order in ORDERS}
            change = [100 * (b / a - 1) for a, b in zip(sums["after"], sums["before"], strict=True)]
            columns = [f"{o} {statistics.mean(v):8.4f} ± {statistics.stdev(v):.4f}" for o, v in sums.items()]
            interval = f"{statistics.mean(change):+.2f} ± {reach * statistics.stdev(change):.2f} %"
            print(f"{title:18}{part:11}{'   '.join(columns)}   {interval}")


def total(terms: object, kinds: Sequence[str], part: str) -> float:
    """Mean over the steps of the sum of these terms, of the matching or the denoising queries."""
    assert isinstance(terms, dict)
    names = [name for name in terms if name.split("_")[1] in kinds and ("_dn_" in name) == (part == "denoising")]
    return sum(statistics.mean(terms[name]) for name in names)


if __name__ == "__main__":
    main()
