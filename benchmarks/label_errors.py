"""Precision and recall of `dfine doctor --model`, on errors that are planted into the boxes of a shard set.

    python -m benchmarks.label_errors runs/mine shards/mine/val
    ... --share 0.05 --seeds 5
    python -m benchmarks.label_errors fdr_real.npz coco_sample/annotations/instances_val2017.json       recorded detections

Of each kind, a share of the boxes is changed: left out, given another class, given one edge that is off by 20 to 40 % of the
side; and as many boxes are added where nothing is. What the set had of errors before counts as false, so that precision is a
lower bound.
"""

import argparse
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torchvision.ops import box_iou

from benchmarks.recorded_detections import read_recorded
from pipeline.calibration.measure import measure
from pipeline.data.shards.classes import with_classes_of
from pipeline.data.shards.manifest import load_shards
from pipeline.evaluation.ground_truth import GroundTruth, read_ground_truth
from pipeline.labelling.suspects import KINDS, Kind, Suspect, find_suspects
from pipeline.open_detector import open_detector

LEVELS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)  # least confidence of a suspect
SHIFT = 0.2, 0.4  # least and largest shift of an edge, as a share of the side


@dataclass(frozen=True)
class Planted:
    """Ground truth with errors, and what they are."""

    truth: GroundTruth
    errors: dict[Kind, list[tuple[int, Any]]]  # image, and index of the box in its row; for a missing one its corners


def main(argv: list[str] | None = None) -> None:
    """Detect once, plant errors for every seed, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("detector", help="or recorded detections, see recorded_detections.py")
    parser.add_argument("shards", help="or annotations in COCO's format for these")
    parser.add_argument("--share", type=float, default=0.05, help="of the boxes, for each kind")
    parser.add_argument("--seeds", type=int, default=5)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    if args.detector.endswith(".npz"):
        measured, truth = read_recorded(Path(args.detector), Path(args.shards))
        calibration = None
    else:
        loaded = open_detector(args.detector)
        shards = with_classes_of(load_shards(args.shards), loaded.names, "the detector")
        truth = read_ground_truth(shards)
        measured = measure(loaded, shards, truth, batch_size=8)
        calibration = loaded.calibration
    print(f"{len(truth.image_id)} images, {len(truth.label)} boxes, {'no ' if calibration is None else ''}calibration")
    clean = find_suspects(measured, truth, calibration, least=LEVELS[0])
    print("suspects before planting:", {level: sum(s.confidence >= level for s in clean) for level in LEVELS})
    planted = [plant(truth, args.share, seed) for seed in range(args.seeds)]
    suspects = [find_suspects(measured, p.truth, calibration, least=LEVELS[0]) for p in planted]
    print(f"{'confidence':12}" + "".join(f"{name:>22}" for name in ("all", *KINDS)) + "     precision / recall")
    for level in LEVELS:
        cells = []
        for kinds in (KINDS, *((kind,) for kind in KINDS)):
            counts = [
                hits(p, [s for s in found if s.confidence >= level and s.kind in kinds], kinds)
                for p, found in zip(planted, suspects, strict=True)
            ]
            right, listed, caught, total = (sum(column) for column in zip(*counts, strict=True))
            precision = f"{right / listed:.2f}" if listed else "-"
            cells.append(f"{precision} / {caught / max(1, total):.2f} ({listed / args.seeds:.0f})")
        print(f"{level:<12}" + "".join(f"{cell:>22}" for cell in cells))


def plant(truth: GroundTruth, share: float, seed: int) -> Planted:
    """Change this share of the boxes for every kind; no box is changed twice."""
    rng = np.random.default_rng(seed)
    usable = np.flatnonzero(~truth.ignored)
    count = max(1, round(share * len(usable)))
    gone, swapped, moved = np.split(rng.permutation(usable)[: 3 * count], 3)
    box, label = truth.box.copy(), truth.label.copy()
    classes = len(truth.categories)
    label[swapped] = (label[swapped] + rng.integers(1, classes, count)) % classes
    for index in moved.tolist():
        edge = int(rng.integers(4))
        side = box[index, 2 + edge % 2] - box[index, edge % 2]
        box[index, edge] += side * rng.uniform(*SHIFT) * rng.choice([-1, 1])
    added = [_empty_place(truth, rng, usable) for _ in range(count)]

    # Rows without the missing boxes, then the added ones, in the order of the images.
    kept = np.setdiff1d(np.arange(len(label)), gone)
    image = np.concatenate([truth.image[kept], [number for number, _ in added]]).astype(np.int64)
    order = np.argsort(image, kind="stable")
    corners = np.concatenate([box[kept], [corner for _, corner in added]]).astype(np.float32)[order]
    changed = replace(
        truth,
        image=image[order],
        box=corners,
        label=np.concatenate([label[kept], rng.integers(0, classes, count)]).astype(np.int32)[order],
        area=((corners[:, 2] - corners[:, 0]) * (corners[:, 3] - corners[:, 1])).astype(np.float32),
        crowd=np.concatenate([truth.crowd[kept], np.zeros(count, bool)])[order],
    )
    position = np.empty(len(order), np.int64)
    position[order] = np.arange(len(order))
    first = np.searchsorted(changed.image, np.arange(len(truth.image_id)))

    def place(row: int) -> tuple[int, int]:
        number = int(image[row])
        return number, int(position[row] - first[number])

    row_of = {int(index): row for row, index in enumerate(kept)}
    return Planted(
        changed,
        {
            "missing": [(int(truth.image[index]), truth.box[index]) for index in gone.tolist()],
            "extra": [place(len(kept) + n) for n in range(count)],
            "class": [place(row_of[index]) for index in swapped.tolist()],
            "edges": [place(row_of[index]) for index in moved.tolist()],
        },
    )


def _empty_place(
    truth: GroundTruth, rng: np.random.Generator, usable: NDArray[np.int64]
) -> tuple[int, NDArray[np.float32]]:
    """An image, and corners of a box of a usual size there that overlaps no true box much."""
    while True:
        number = int(rng.integers(len(truth.image_id)))
        size = truth.box[rng.choice(usable)].reshape(2, 2)
        width, height = size[1] - size[0]
        room = np.array([truth.width[number] - width, truth.height[number] - height])
        if (room <= 0).any():
            continue
        left, top = rng.uniform(0, room)
        corners = np.array([left, top, left + width, top + height], np.float32)
        others = torch.tensor(truth.box[truth.image == number]).reshape(-1, 4)
        if not len(others) or float(box_iou(torch.tensor(corners)[None], others).max()) < 0.1:
            return number, corners


def hits(planted: Planted, suspects: list[Suspect], kinds: tuple[Kind, ...]) -> tuple[int, int, int, int]:
    """Suspects that point to a planted error of these kinds, suspects, errors that are pointed to, and errors."""
    places = {place for kind in kinds if kind != "missing" for place in planted.errors[kind]}
    gone = planted.errors["missing"] if "missing" in kinds else []
    right, caught = 0, set[Any]()
    for suspect in suspects:
        hit: set[Any] = {(suspect.number, suspect.box)} & places if suspect.box is not None else set()
        if suspect.suggested is not None and suspect.kind == "missing":
            suggested = torch.tensor(suspect.suggested)[None]
            hit |= {
                ("gone", n)
                for n, (number, corners) in enumerate(gone)
                if number == suspect.number and float(box_iou(suggested, torch.tensor(corners)[None])) >= 0.5
            }
        right += bool(hit)
        caught |= hit
    return right, len(suspects), len(caught), len(places) + len(gone)


if __name__ == "__main__":
    main()
