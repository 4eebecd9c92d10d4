"""AP with and without labels from a teacher, where few images are labelled.

    dfine prepare voc BCCD --split trainval --out shards/bccd/train
    dfine prepare voc BCCD --split test --out shards/bccd/test
    python -m benchmarks.pseudo_labels shards/bccd/train shards/bccd/test --init backbone.safetensors --out pseudo
    ... --report                                                            only print what `pseudo` holds

For each seed: train on some labelled images; predict in the rest with `dfine predict`; make a set of all images with
`dfine prepare coco --pseudo`; train that detector further, for equally many steps, on the labelled images alone and on the set of
all. A finished training is a file in the output folder, and an interrupted one goes on from its checkpoint.
"""

import argparse
import json
import math
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from scipy.stats import t as student_t

from benchmarks.select_curve import BATCH, all_rows, write_subset
from jobs.predict import main as predict_main
from pipeline.config_files import load_experiment
from pipeline.data.shards.manifest import ShardSet, load_shards
from pipeline.open_detector import open_detector
from pipeline.predict.predicted_images import predicted_images
from pipeline.training.launch import launch

ARMS = ("labelled", "pseudo")
TEACHER = "teacher"


def main(argv: list[str] | None = None) -> None:
    """Measure what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train", help="shard set, of which some images count as labelled")
    parser.add_argument("test", help="shard set to evaluate on")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--init", help="initial weights of the teacher")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--labelled", type=int, default=50, help="images that are labelled")
    parser.add_argument("--score", type=float, default=0.6)
    parser.add_argument("--ignore", type=float, default=0.3)
    parser.add_argument("--teacher-steps", type=int, default=200)
    parser.add_argument("--steps", type=int, default=100, help="of each training after the teacher's")
    parser.add_argument("--side", type=int, default=160, help="side of the input in pixels")
    parser.add_argument("--report", action="store_true", help="train nothing")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    args.out = args.out.absolute()
    args.out.mkdir(parents=True, exist_ok=True)
    if not args.report:
        measure(args)
    report(args.out, args.seeds)


def measure(args: argparse.Namespace) -> None:
    """Run every training that has no file yet."""
    pool = load_shards(args.train)
    rows = all_rows(pool)
    for seed in args.seeds:
        order = np.random.default_rng(seed).permutation(rows.num_rows)
        labelled = sorted(order[: args.labelled].tolist())
        few = args.out / "work" / f"{seed}_few"
        if not few.exists():
            write_subset(few, pool, rows, labelled)
        _train(args, seed, TEACHER, str(few), args.init, args.teacher_steps, {})
        teacher = args.out / f"{seed}_{TEACHER}"
        _train(args, seed, "labelled", str(few), str(teacher), args.steps, {})
        if not (args.out / f"{seed}_pseudo.json").exists():
            shards, counts = pseudo_labelled(args, pool, rows, labelled, teacher, args.out / "work" / f"{seed}_all")
            _train(args, seed, "pseudo", shards, str(teacher), args.steps, counts)
    shutil.rmtree(args.out / "work")


def _train(
    args: argparse.Namespace, seed: int, arm: str, shards: str, init: str | None, steps: int, more: dict[str, Any]
) -> None:
    """Train and evaluate, and write the numbers and the detector, unless they are there."""
    name = f"{seed}_{arm}"
    file = args.out / f"{name}.json"
    if file.exists():
        return
    work = args.out / "work" / name  # one for each training, as MLflow keeps its database open
    started = time.process_time()
    settings = {
        "name": name,
        "storage": str(work),
        "seed": seed,
        "init": init,
        "data.train": shards,
        "data.val": load_shards(args.test).uri,
        "data.decode_in": "worker",
        "model.input_size": [args.side, args.side],
        "schedule": {
            "steps": steps,
            "global_batch_size": BATCH,
            "warmup_steps": steps // 5,
            "no_aug_epochs": 0,
            "min_lr_ratio": 0.05,
        },
        "evaluation": {"every_steps": steps, "num_images": 0},
    }
    result = launch(load_experiment(Path(__file__).parent.parent / "configs" / "bccd.yaml", overrides=settings))
    assert result.numbers is not None
    shutil.rmtree(args.out / name, ignore_errors=True)
    open_detector(result.run).save(args.out / name)
    content = {
        **{key: result.numbers[key] for key in ("AP", "AP50")},
        **more,
        "cpu_seconds": time.process_time() - started,
    }
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(content))
    partial.rename(file)
    print(f"{name}: AP {content['AP']:.3f}, {content['cpu_seconds']:.0f} CPU s", flush=True)


def pseudo_labelled(
    args: argparse.Namespace, pool: ShardSet, rows: pa.Table, labelled: Sequence[int], teacher: Path, work: Path
) -> tuple[str, dict[str, Any]]:
    """Shard set of all images, of which the teacher has labelled the rest; and what it found there, against the truth."""
    counts_file = work / "counts.json"  # the last file
    if counts_file.exists():
        known: dict[str, Any] = json.loads(counts_file.read_text())
        return str(work / "shards"), known
    shutil.rmtree(work, ignore_errors=True)
    write_coco(work, pool, rows, labelled)
    rest = [index for index in range(rows.num_rows) if index not in set(labelled)]
    images = [str(work / "train" / file_name(rows, index)) for index in rest]
    found = work / "found"
    options = ["--threshold", str(args.ignore), "--num-images", "0", "--workers", "0", "--precision", "fp32"]
    predict_main([str(teacher), *images, "--out", str(found), *options])
    command = [sys.executable, "-m", "jobs", "prepare", "coco", str(work), "--split", "train", "--pseudo", str(found)]
    command += [
        "--score",
        str(args.score),
        "--ignore",
        str(args.ignore),
        "--out",
        str(work / "shards"),
        "--num-cpus",
        "1",
    ]
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    subprocess.run([*command, "--row-group-rows", "16"], check=True, cwd=Path(__file__).parent.parent)
    counts = judged(found, rows, rest, args.score)
    counts["prepare_cpu"] = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before
    counts_file.write_text(json.dumps(counts))
    return str(work / "shards"), counts


def judged(found: Path, rows: pa.Table, rest: Sequence[int], score: float) -> dict[str, Any]:
    """Number of labels and of ignored detections, and the share of labels that are right at IoU 0.5."""
    labels = ignored = right = 0
    for image, index in zip(predicted_images(str(found)), rest, strict=True):
        truth = np.array(rows["boxes"][index].as_py(), np.float32).reshape(-1, 4)
        classes = np.array(rows["labels"][index].as_py())
        free = np.ones(len(truth), np.bool_)
        for box, label, own in zip(image.boxes, image.labels, image.scores, strict=True):
            if own < score:
                ignored += 1
                continue
            labels += 1
            sides = np.minimum(box[2:], truth[:, 2:]) - np.maximum(box[:2], truth[:, :2])
            common = sides.clip(min=0).prod(1)
            iou = common / ((box[2:] - box[:2]).prod() + (truth[:, 2:] - truth[:, :2]).prod(1) - common)
            iou = np.where(free & (classes == label), iou, 0)
            if iou.max(initial=0) >= 0.5:
                right, free[int(iou.argmax())] = right + 1, False
    boxes = sum(len(rows["labels"][index].as_py()) for index in rest)
    return {"labels": labels, "ignored": ignored, "right": right, "true_boxes": boxes}


def file_name(rows: pa.Table, index: int) -> str:
    """Name of an image's file in the COCO folder."""
    return f"{index:05d}.jpg"


def write_coco(work: Path, pool: ShardSet, rows: pa.Table, labelled: Sequence[int]) -> None:
    """Write all images and an instances file in which only some are annotated."""
    (work / "train").mkdir(parents=True)
    (work / "annotations").mkdir()
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    ids = [category.original_id for category in pool.manifest.categories]
    for index, row in enumerate(rows.to_pylist()):
        (work / "train" / file_name(rows, index)).write_bytes(row["image"])
        images.append(
            {"id": index + 1, "file_name": file_name(rows, index), "width": row["width"], "height": row["height"]}
        )
        if index in set(labelled):
            boxes = np.array(row["boxes"]).reshape(-1, 4).tolist()
            for (x1, y1, x2, y2), label, crowd in zip(boxes, row["labels"], row["crowd"], strict=True):
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": index + 1,
                        "category_id": ids[label],
                        "bbox": [x1, y1, x2 - x1, y2 - y1],
                        "area": (x2 - x1) * (y2 - y1),
                        "iscrowd": int(crowd),
                    }
                )
    categories = [{"id": each.original_id, "name": each.name} for each in pool.manifest.categories]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (work / "annotations" / "instances_train.json").write_text(json.dumps(content))


def report(out: Path, seeds: Sequence[int]) -> None:
    """Print AP of every seed and arm, and the paired difference with its 95 % interval."""
    files = {(seed, arm): out / f"{seed}_{arm}.json" for seed in seeds for arm in (TEACHER, *ARMS)}
    found = {key: json.loads(file.read_text()) for key, file in files.items() if file.exists()}
    paired = [seed for seed in seeds if all((seed, arm) in found for arm in (TEACHER, *ARMS))]
    print(
        "seed   " + "".join(f"{arm:>12}" for arm in (TEACHER, *ARMS)) + "   labels (right), ignored, true boxes there"
    )
    for seed in paired:
        more = found[seed, "pseudo"]
        print(
            f"{seed:4}   "
            + "".join(f"{found[seed, arm]['AP']:12.3f}" for arm in (TEACHER, *ARMS))
            + f"   {more['labels']} ({more['right'] / max(1, more['labels']):.0%}), {more['ignored']}, {more['true_boxes']}"
        )
    if len(paired) < 2:
        return
    difference = [found[seed, "pseudo"]["AP"] - found[seed, "labelled"]["AP"] for seed in paired]
    reach = float(student_t.ppf(0.975, len(paired) - 1)) * statistics.stdev(difference) / math.sqrt(len(paired))
    mean = statistics.mean(difference)
    verdict = "not distinguishable" if abs(mean) <= reach else "better" if mean > 0 else "worse"
    print(f"pseudo less labelled alone: {mean:+.3f} ± {reach:.3f} (95 %, {len(paired)} seeds): {verdict}")
    print(f"{sum(row['cpu_seconds'] + row.get('prepare_cpu', 0) for row in found.values()):.0f} CPU seconds")


if __name__ == "__main__":
    main()
