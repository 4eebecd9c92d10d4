"""Writing and reading the results of a large prediction: detections per second and memory, without a detector.

    python -m benchmarks.predict_output --images 20480 --detections 300

Detections are simulated: random boxes, 365 classes, sorted scores. Each phase runs in a process of its own, whose memory is
read at its end; that of a process which only imports is printed first. "as before" is the way that preceded: dictionaries of
floats in the parts, and one `json.dumps` per detection. CPU seconds are those of the process, from the operating system.
"""

import argparse
import json
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.data.shards.manifest import Category
from pipeline.evaluation.detections import DetectionTable, to_coco_json
from pipeline.predict import coco_json, predict
from pipeline.predict.partition import write_rows
from pipeline.predict.plan import SCHEMA, PredictPlan, claim_folder, part_uri
from pipeline.predict.predicted_images import predicted_images, record_batches

CLASSES = 365
TARGET_IMAGES, TARGET_DETECTIONS = 1_740_000, 300  # all of Objects365


@dataclass(frozen=True)
class Cost:
    """CPU seconds, seconds, and the most memory of a phase's process in MiB."""

    cpu_s: float
    wall_s: float
    peak_mib: float


def simulated_rows(plan: PredictPlan, part: int, detections: int) -> list[dict[str, Any]]:
    """Rows of a part as the detectors make them."""
    random = np.random.default_rng(part)
    rows = []
    for index in range(*plan.image_range(part)):
        corner = random.random((detections, 2), np.float32) * np.array([400, 300], np.float32)
        boxes = np.concatenate([corner, corner + random.random((detections, 2), np.float32) * 200], 1)
        row = dict.fromkeys(SCHEMA.names) | {"image_id": index + 1, "width": 640, "height": 480}
        row |= {"file_name": f"images/v1/patch{index % 50}/objects365_v1_{index:08d}.jpg"}
        row |= {"labels": random.integers(0, CLASSES, detections, np.int32), "boxes": boxes.flatten()}
        rows.append(row | {"scores": np.sort(random.random(detections, np.float32))[::-1].copy()})
    return rows


# Phases


def import_only(out: str, plan: PredictPlan, detections: int) -> Cost:
    """Do nothing."""
    return measured(lambda: None)


def write_parts(out: str, plan: PredictPlan, detections: int) -> Cost:
    """Write all parts; making them up is not counted."""
    costs = []
    for part in range(plan.num_parts):
        rows = simulated_rows(plan, part, detections)
        costs.append(measured(partial(write_rows, rows, part_uri(out, part))))
    return summed(costs)


def write_parts_as_before(out: str, plan: PredictPlan, detections: int) -> Cost:
    """Write all parts with a dictionary for every column."""
    costs = []
    for part in range(plan.num_parts):
        rows = simulated_rows(plan, part, detections)

        def write(part: int = part, rows: list[dict[str, Any]] = rows) -> None:
            with storage.open_atomic(storage.join(out, "before", f"{part}.parquet")) as file:
                pq.write_table(pa.Table.from_pylist(rows, SCHEMA), file, compression="zstd")

        costs.append(measured(write))
    return summed(costs)


def summarise(out: str, plan: PredictPlan, detections: int) -> Cost:
    """Count the detections by class, as after every prediction."""
    return measured(lambda: predict._summarise(out, plan))


def write_json(out: str, plan: PredictPlan, detections: int) -> Cost:
    """Write everything that `--json` asks for."""
    return measured(lambda: coco_json.write_json(out, plan, plan.num_images * detections))


def write_json_as_before(out: str, plan: PredictPlan, detections: int) -> Cost:
    """Write one file with one `json.dumps` per detection."""

    def write() -> None:
        with storage.open_atomic(storage.join(out, "before.json")) as file:
            for batch in record_batches(out, plan):
                values = {name: batch.column(name).flatten().to_numpy() for name in ("labels", "scores", "boxes")}
                table = DetectionTable(
                    image_id=np.repeat(batch.column("image_id").to_numpy(), detections),
                    label=values["labels"],
                    score=values["scores"],
                    box=values["boxes"].reshape(-1, 4),
                )
                for row in to_coco_json(table, plan.categories):
                    file.write(json.dumps(row).encode() + b",\n")

    return measured(write)


def iterate(out: str, plan: PredictPlan, detections: int) -> Cost:
    """Read all detections, image by image."""
    return measured(lambda: sum(len(image.scores) for image in predicted_images(out)))


PHASES: dict[str, Callable[[str, PredictPlan, int], Cost]] = {
    "imports alone": import_only,
    "parts, as before": write_parts_as_before,
    "parts": write_parts,
    "summary of all parts": summarise,
    "JSON, as before": write_json_as_before,
    "JSON": write_json,
    "predicted_images": iterate,
}


def measured(work: Callable[[], object]) -> Cost:
    """Run, and measure; the memory is that of the process so far."""
    pa.array([np.zeros(1)])  # pyarrow imports pandas with the first one of a process: 0.6 s that belong to no rate
    cpu, wall = time.process_time(), time.perf_counter()
    work()
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return Cost(time.process_time() - cpu, time.perf_counter() - wall, peak_mib)


def summed(costs: list[Cost]) -> Cost:
    """Sum of the seconds, and the largest memory."""
    return Cost(
        sum(cost.cpu_s for cost in costs), sum(cost.wall_s for cost in costs), max(cost.peak_mib for cost in costs)
    )


def gigabytes(*paths: Path) -> float:
    """Size of files and of all files in folders."""
    files = [file for path in paths for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file()]
    return sum(file.stat().st_size for file in files) / 1e9


def main() -> None:
    """Run the phases and print the table, then what it means for all of Objects365."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--images", type=int, default=20_480)
    arguments.add_argument("--detections", type=int, default=300, help="per image")
    arguments.add_argument("--part-size", type=int, default=256)
    args = arguments.parse_args()
    plan = PredictPlan(
        inputs="simulated",
        detector="simulated",
        num_images=args.images,
        part_size=args.part_size,
        batch_size=8,
        thresholds=(0.0,) * CLASSES,
        threshold_text="0, as given",
        edge_std=False,
        categories=tuple(Category(label=each, original_id=each + 1, name=f"class_{each}") for each in range(CLASSES)),
    )
    total = args.images * args.detections
    target = TARGET_IMAGES * TARGET_DETECTIONS
    print(f"{args.images:,} images with {args.detections} detections each: {total:,}; target {target:,}")
    print(f"{'phase':22}{'detections/CPU s':>18}{'detections/s':>14}{'peak MiB':>10}{'target, CPU min':>17}")
    with tempfile.TemporaryDirectory() as out:
        claim_folder(out, plan)
        for name, phase in PHASES.items():
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as alone:
                cost = alone.submit(phase, out, plan, args.detections).result()
            if phase is import_only:
                print(f"{name:22}{'':>18}{'':>14}{cost.peak_mib:10.0f}", flush=True)
                continue
            minutes = target / total * cost.cpu_s / 60
            rates = f"{total / cost.cpu_s:18,.0f}{total / cost.wall_s:14,.0f}"
            print(f"{name:22}{rates}{cost.peak_mib:10.0f}{minutes:17.1f}", flush=True)
        folder = Path(out)
        sizes = {
            "parts, as before": gigabytes(folder / "before"),
            "parts": gigabytes(folder / "parts"),
            "JSON, as before": gigabytes(folder / "before.json"),
            "JSON": gigabytes(folder / "detections", *(path for path in [folder / "detections.json"] if path.exists())),
        }
        for name, size in sizes.items():
            print(f"{name:22}{size:8.2f} GB here, {size * target / total:8.1f} GB for the target")


if __name__ == "__main__":
    main()
