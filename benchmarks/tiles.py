"""AP by the size of objects in large images, with and without tiles.

    python -m benchmarks.tiles --out tiles --init backbone.safetensors      draw, train and evaluate; about 15 CPU minutes
    python -m benchmarks.tiles --detector runs/bccd --shards shards/bccd/test --tile 640 --overlap 0.2      one minute

The first draws images of 1600 px with shapes from 8 px up, cuts them into tiles by `dfine prepare synthetic --tile`, trains
D-FINE-N on the tiles, and evaluates it in other whole images. The second lays nine images of a shard set side by side in each
large one, and evaluates a detector that was trained on single ones. Both evaluate three times: images as they are, in tiles
without merging, and in merged tiles.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from dfine_core import ImageDetections, LoadedDetector
from dfine_core.images import OpenedImage, read_image
from dfine_core.inference import image_sizes, prepare
from dfine_core.tiles import Tiling, batched
from pipeline.config_files import load_experiment
from pipeline.data.shards.manifest import Category, load_shards
from pipeline.data.shards.reader import locate_row_groups, read_row_groups
from pipeline.data.shards.records import records_from_table
from pipeline.data.sources.synthetic import synthetic_image
from pipeline.evaluation.detections import DetectionTable
from pipeline.evaluation.evaluate import evaluate_detections
from pipeline.evaluation.ground_truth import GroundTruth
from pipeline.open_detector import open_detector
from pipeline.training.launch import launch

ROOT = Path(__file__).parent.parent
NUMBERS = ("AP", "AP50", "AP_small", "AP_medium", "AP_large", "AR_100")
WAYS = ("untiled", "tiles, not merged", "tiles, merged")
VAL_SEED, MAX_SHAPES = 1, 30
LEAST = 0.01  # score of a detection that is evaluated
SIDE = 3  # images of a shard set in a row, and rows of them
BATCH = 8


def main(argv: list[str] | None = None) -> None:
    """Draw and train what is missing, evaluate, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder of the drawn images and of the run")
    parser.add_argument("--detector", help="evaluate this one instead of training one")
    parser.add_argument("--shards", help="images that are laid side by side, for --detector")
    parser.add_argument("--images", type=int, default=24, help="to train on")
    parser.add_argument("--val-images", type=int, default=12)
    parser.add_argument("--image-side", type=int, default=1600, metavar="PX", help="the longer side")
    parser.add_argument("--tile", type=int, default=320, metavar="PX")
    parser.add_argument("--overlap", type=float, default=0.25)
    parser.add_argument("--side", type=int, default=224, help="side of the input in pixels")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--init", help="initial weights")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    if args.detector:
        loaded, images = open_detector(args.detector), composed(args.shards)
    else:
        args.out = args.out.absolute()
        tiles = ["--tile", str(args.tile), "--overlap", str(args.overlap)]
        _draw(args, "train", args.images, 0, tiles)
        _draw(args, "val", args.val_images, VAL_SEED, tiles)
        loaded, images = open_detector(_trained(args)), drawn(args)
    truth = ground_truth(images, loaded.names)
    sizes = np.bincount(np.digitize(truth.area[~truth.crowd], (32**2, 96**2)), minlength=3)
    width, height = images[0].image.size
    print(
        f"{len(images)} images such as {width} x {height} px, {sizes[0]} small, {sizes[1]} medium, {sizes[2]} large objects"
    )
    print(f"{'':20}" + "".join(f"{name:>11}" for name in NUMBERS) + "   detections per object   CPU seconds per image")
    for way in WAYS:
        _evaluate(args, loaded, images, truth, way)


@dataclass(frozen=True)
class LargeImage:
    """An image with its boxes."""

    image: OpenedImage
    boxes: NDArray[np.float32]  # [G, 4]
    labels: NDArray[np.int32]  # [G]
    areas: NDArray[np.float32]  # [G]
    crowd: NDArray[np.bool_]  # [G]


def drawn(args: argparse.Namespace) -> list[LargeImage]:
    """Draw the images to evaluate on."""
    records = (
        synthetic_image(index, seed=VAL_SEED, longest_side=args.image_side, max_shapes=MAX_SHAPES)
        for index in range(args.val_images)
    )
    return [LargeImage(read_image(r.image), r.boxes, r.labels, r.areas, r.crowd) for r in records]


def composed(uri: str) -> list[LargeImage]:
    """Lay the images of a shard set side by side, SIDE x SIDE in each; those of another size are left out."""
    located = locate_row_groups(load_shards(uri))
    groups = read_row_groups(located, range(len(located.rows)))
    records = [record for table in groups.values() for record in records_from_table(table)]
    width, height = records[0].width, records[0].height
    records = [record for record in records if (record.width, record.height) == (width, height)]
    large = []
    for some in batched(records, SIDE * SIDE):
        if len(some) < SIDE * SIDE:
            break
        canvas = np.zeros((SIDE * height, SIDE * width, 3), np.uint8)
        boxes = []
        for index, record in enumerate(some):
            left, top = index % SIDE * width, index // SIDE * height
            canvas[top : top + height, left : left + width] = np.asarray(read_image(record.image, upright=False))
            boxes.append(record.boxes + np.array([left, top] * 2, np.float32))
        columns = (np.concatenate([getattr(r, name) for r in some]) for name in ("labels", "areas", "crowd"))
        large.append(LargeImage(read_image(canvas), np.concatenate(boxes), *columns))
    return large


def ground_truth(images: Sequence[LargeImage], names: Sequence[str]) -> GroundTruth:
    """Ground truth of images that are numbered from 1."""
    return GroundTruth(
        image_id=np.arange(1, len(images) + 1),
        width=np.array([large.image.width for large in images], np.int32),
        height=np.array([large.image.height for large in images], np.int32),
        file_name=tuple(f"{number}" for number in range(len(images))),
        image=np.repeat(np.arange(len(images)), [len(large.labels) for large in images]),
        box=np.concatenate([large.boxes for large in images]),
        label=np.concatenate([large.labels for large in images]).astype(np.int32),
        area=np.concatenate([large.areas for large in images]),
        crowd=np.concatenate([large.crowd for large in images]),
        categories=tuple(Category(label=k, original_id=k, name=name) for k, name in enumerate(names)),
    )


def _draw(args: argparse.Namespace, name: str, images: int, seed: int, tiles: list[str]) -> None:
    out = args.out / name
    if (out / "manifest.json").exists():
        return
    command = [sys.executable, "-m", "jobs", "prepare", "synthetic", "--images", str(images), "--draw-seed", str(seed)]
    command += [
        "--image-side",
        str(args.image_side),
        "--max-shapes",
        str(MAX_SHAPES),
        "--split",
        name,
        "--out",
        str(out),
    ]
    subprocess.run([*command, *tiles, "--num-cpus", "1"], check=True, cwd=ROOT)


def _trained(args: argparse.Namespace) -> str:
    settings = {
        "name": "run",
        "storage": str(args.out),
        "init": args.init,
        "data.train": str(args.out / "train"),
        "data.val": str(args.out / "val"),
        "data.decode_in": "worker",
        "model.input_size": [args.side, args.side],
        "schedule": {
            "steps": args.steps,
            "global_batch_size": BATCH,
            "warmup_steps": args.steps // 6,
            "no_aug_epochs": 0,
            "min_lr_ratio": 0.05,
        },
        "evaluation": {"every_steps": args.steps, "num_images": 0},
    }
    started = time.process_time()
    result = launch(load_experiment(ROOT / "configs" / "bccd.yaml", overrides=settings))
    print(f"trained: {time.process_time() - started:.0f} CPU seconds with the evaluation on tiles; {result.numbers}")
    return result.run


def _evaluate(
    args: argparse.Namespace, loaded: LoadedDetector, images: Sequence[LargeImage], truth: GroundTruth, way: str
) -> None:
    per_object: list[float] = []
    started = time.process_time()

    def tables() -> Iterator[DetectionTable]:
        for number, large in enumerate(images, start=1):
            found = _found(args, loaded, large.image, way)
            order = found.scores.argsort(descending=True, stable=True)
            boxes, scores, labels = (each[order].numpy() for each in (found.boxes, found.scores, found.labels))
            least = np.array(loaded.least_scores(), np.float32)[labels]
            per_object.append(_detections_per_found_object(boxes[scores >= least], large.boxes[~large.crowd]))
            yield DetectionTable(np.full(len(labels), number), labels.astype(np.int32), scores, boxes)

    report = evaluate_detections(tables(), truth, final=True)
    assert report is not None
    seconds = (time.process_time() - started) / len(images)
    numbers = "".join(f"{report.numbers[name]:11.3f}" for name in NUMBERS)
    print(f"{way:20}{numbers}   {np.nanmean(per_object):21.2f}   {seconds:.1f}", flush=True)


def _found(args: argparse.Namespace, loaded: LoadedDetector, image: OpenedImage, way: str) -> ImageDetections:
    if way != "tiles, not merged":
        cut = way == "tiles, merged"
        return loaded([image], LEAST, BATCH, tile=args.tile if cut else None, overlap=args.overlap if cut else None)[0]
    least = torch.full((len(loaded.names),), LEAST)
    parts: list[ImageDetections] = []
    for some in batched(Tiling(args.tile, args.overlap).tiles(image.size), BATCH):
        pixels = [tile.cut(image) for tile in some]
        raw = loaded.find(prepare(pixels, loaded.config.input_size), image_sizes(pixels))
        for each, tile in zip(raw, some, strict=True):
            kept = loaded.keep(each, least)
            parts.append(replace(kept, boxes=kept.boxes + torch.tensor([tile.left, tile.top] * 2)))
    return ImageDetections(
        boxes=torch.cat([part.boxes for part in parts]),
        scores=torch.cat([part.scores for part in parts]),
        labels=torch.cat([part.labels for part in parts]),
        names=tuple(name for part in parts for name in part.names),
    )


def _detections_per_found_object(boxes: NDArray[np.float32], truth: NDArray[np.float32]) -> float:
    """Mean number of detections, of any class, that overlap an object by IoU 0.5, over the objects that have one."""
    corners = np.maximum(boxes[:, None, :2], truth[None, :, :2]), np.minimum(boxes[:, None, 2:], truth[None, :, 2:])
    common = (corners[1] - corners[0]).clip(min=0).prod(-1)
    areas = [(each[:, 2:] - each[:, :2]).prod(-1) for each in (boxes, truth)]
    counts = (common / (areas[0][:, None] + areas[1][None] - common) >= 0.5).sum(0)
    return float(counts[counts > 0].mean()) if (counts > 0).any() else float("nan")


if __name__ == "__main__":
    main()
