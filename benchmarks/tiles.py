"""AP by the size of objects in large images, with and without tiles.

    python -m benchmarks.tiles --out tiles          draw, train and evaluate; about ten CPU minutes

Draws images of 1600 px with shapes from 8 px up, cuts them into tiles by `dfine prepare synthetic --tile`, trains D-FINE-N on the
tiles, and evaluates one detector in other whole images three times: as they are, in tiles without merging, and in merged tiles.
"""

import argparse
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from dfine_core import ImageDetections, LoadedDetector
from dfine_core.inference import image_sizes, prepare
from dfine_core.tiles import Tiling, batched
from pipeline.config_files import load_experiment
from pipeline.data.shards.manifest import load_shards
from pipeline.data.sources.synthetic import synthetic_image
from pipeline.evaluation.detections import DetectionTable
from pipeline.evaluation.evaluate import evaluate_detections
from pipeline.evaluation.ground_truth import GroundTruth, read_ground_truth
from pipeline.open_detector import open_detector
from pipeline.predict.inputs import InputImage, decode_input
from pipeline.training.launch import launch

ROOT = Path(__file__).parent.parent
NUMBERS = ("AP", "AP50", "AP_small", "AP_medium", "AP_large", "AR_100")
WAYS = ("untiled", "tiles, not merged", "tiles, merged")
VAL_SEED, MAX_SHAPES = 1, 30
LEAST = 0.01  # score of a detection that is evaluated
FOUND = 0.4  # score of a detection that counts as found, as in `load`
BATCH = 8


def main(argv: list[str] | None = None) -> None:
    """Draw and train what is missing, evaluate, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of data, run and results")
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
    args.out = args.out.absolute()
    tiles = ["--tile", str(args.tile), "--overlap", str(args.overlap)]
    _draw(args, "train", args.images, 0, tiles)
    _draw(args, "val", args.val_images, VAL_SEED, tiles)
    _draw(args, "whole", args.val_images, VAL_SEED, [])
    loaded = open_detector(_trained(args))
    truth = read_ground_truth(load_shards(str(args.out / "whole")))
    sizes = Counter(np.digitize(truth.area[~truth.crowd], (32**2, 96**2)).tolist())
    print(f"{len(truth.image_id)} images, {sizes[0]} small, {sizes[1]} medium, {sizes[2]} large objects")
    print(f"{'':20}" + "".join(f"{name:>11}" for name in NUMBERS) + "   per object   seconds per image")
    for way in WAYS:
        _evaluate(args, loaded, truth, way)


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


def _evaluate(args: argparse.Namespace, loaded: LoadedDetector, truth: GroundTruth, way: str) -> None:
    per_object: list[float] = []
    started = time.process_time()

    def tables() -> Iterator[DetectionTable]:
        for index in range(args.val_images):
            record = synthetic_image(index, seed=VAL_SEED, longest_side=args.image_side, max_shapes=MAX_SHAPES)
            found = _found(args, loaded, record.image, way)
            order = found.scores.argsort(descending=True, stable=True)
            boxes, scores, labels = (each[order].numpy() for each in (found.boxes, found.scores, found.labels))
            per_object.append(_detections_per_found_object(boxes[scores >= FOUND], record.boxes[~record.crowd]))
            ids = np.full(len(labels), record.image_id, np.int64)
            yield DetectionTable(ids, labels.astype(np.int32), scores.astype(np.float32), boxes)

    report = evaluate_detections(tables(), truth, final=True)
    assert report is not None
    seconds = (time.process_time() - started) / args.val_images
    numbers = "".join(f"{report.numbers[name]:11.3f}" for name in NUMBERS)
    print(f"{way:20}{numbers}   {np.nanmean(per_object):10.2f}   {seconds:.1f}", flush=True)


def _found(args: argparse.Namespace, loaded: LoadedDetector, encoded: bytes, way: str) -> ImageDetections:
    if way != "tiles, not merged":
        tile = {"tile": args.tile, "overlap": args.overlap} if way == "tiles, merged" else {}
        return loaded([encoded], LEAST, BATCH, **tile)[0]
    image = decode_input(InputImage(0, "", encoded))
    least = torch.full((len(loaded.names),), LEAST)
    parts, tiles = [], Tiling(args.tile, args.overlap).tiles(image.size)
    for some in batched(tiles, BATCH):
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


def _detections_per_found_object(boxes: np.ndarray, truth: np.ndarray) -> float:
    """Mean number of detections, of any class, that overlap an object by IoU 0.5, over the objects that have one."""
    corners = np.maximum(boxes[:, None, :2], truth[None, :, :2]), np.minimum(boxes[:, None, 2:], truth[None, :, 2:])
    common = (corners[1] - corners[0]).clip(min=0).prod(-1)
    areas = [(each[:, 2:] - each[:, :2]).prod(-1) for each in (boxes, truth)]
    counts = (common / (areas[0][:, None] + areas[1][None] - common) >= 0.5).sum(0)
    return float(counts[counts > 0].mean()) if (counts > 0).any() else float("nan")


if __name__ == "__main__":
    main()
