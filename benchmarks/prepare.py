"""Measure `jobs.prepare`: how fast one core writes shards, and what memory a large annotation file takes.

    python -m benchmarks.prepare shards [--images 512]
    python -m benchmarks.prepare memory [--annotations 0.25 1 2]     millions, each in a process of its own

Measured: 0.24 ms of CPU for an image of 152 kB at the floor, 0.8 as a shard without verifying, 2.6 with it; 320 MB for any
number of annotations, and 30 to 50 CPU seconds per million, in three passes over their json.

Shards are compared with a floor: the same files read, hashed and written to one file by a plain loop. On a busy machine
the ratios of a run are more reliable than its rates.
"""

import argparse
import hashlib
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from pipeline import storage
from pipeline.data.prepare.shard_writer import WORK_LIST, PrepareOptions, write_shard
from pipeline.data.prepare.work_plan import write_work_list
from pipeline.data.sources.coco import coco_source
from pipeline.data.sources.index import AnnotationIndex
from pipeline.data.sources.synthetic import CLASSES, synthetic_image, synthetic_scene

ROUNDS = 5
FLOOR = "floor: read, hash, write"
DISTINCT_IMAGES = 32  # generated; files are copies, which neither hashing nor decoding can exploit
BOXES_PER_IMAGE = 15  # as in Objects365
IMAGES_PER_SHARD = 2000  # Objects365 at a longest side of 640


def main() -> None:
    keep_lines = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=keep_lines)
    parts = parser.add_subparsers(dest="part", required=True)
    shards = parts.add_parser("shards")
    shards.add_argument("--images", type=int, default=512)
    memory = parts.add_parser("memory")
    memory.add_argument("--annotations", type=float, nargs="+", default=[0.25, 1, 2], metavar="MILLIONS")
    index = parts.add_parser("index")  # run by `memory` in separate processes
    index.add_argument("file")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        match args.part:
            case "shards":
                measure_shards(Path(folder), args.images)
            case "memory":
                measure_memory(Path(folder), [round(millions * 1e6) for millions in args.annotations])
            case _:
                read_index(args.file, folder)


def measure_shards(folder: Path, images: int) -> None:
    """Print images/s and MB/s of every way to write one shard, best of alternating rounds."""
    paths = _image_files(folder / "images", images)
    annotations = _annotation_file(folder / "instances.json", images, images * BOXES_PER_IMAGE)
    total = sum(path.stat().st_size for path in paths)
    out = str(folder / "out")
    index = AnnotationIndex()
    coco_source(str(folder / "images"), str(annotations)).fill(index)
    write_work_list(index, storage.join(out, WORK_LIST), images=images, rows_per_shard=images)
    ways: dict[str, Callable[[], object]] = {
        FLOOR: lambda: _copy(paths, folder / "copy"),
        "shard, --no-verify": lambda: write_shard(out, 0, PrepareOptions(verify=False), len(CLASSES)),
        "shard": lambda: write_shard(out, 0, PrepareOptions(), len(CLASSES)),
        "shard, --longest-side 320": lambda: write_shard(out, 0, PrepareOptions(longest_side=320), len(CLASSES)),
    }
    wall, cpu = ({name: float("inf") for name in ways} for _ in range(2))
    for _ in range(ROUNDS):
        for name, way in ways.items():
            started_at = time.perf_counter(), time.process_time()
            way()
            wall[name] = min(wall[name], time.perf_counter() - started_at[0])
            cpu[name] = min(cpu[name], time.process_time() - started_at[1])
    print(f"{images} images of {total / images / 1e3:.0f} kB, {BOXES_PER_IMAGE} boxes each, one process")
    print(f"{'':28}{'images/s':>10}{'MB/s':>8}{'CPU ms/image':>14}{'CPU of floor':>14}")
    for name in ways:
        rates = f"{images / wall[name]:10.0f}{total / 1e6 / wall[name]:8.0f}"
        print(f"{name:28}{rates}{cpu[name] / images * 1e3:14.2f}{cpu[name] / cpu[FLOOR]:14.1f}")


def measure_memory(folder: Path, sizes: list[int]) -> None:
    """Print CPU time and peak memory of turning annotation files of several sizes into work lists."""
    print(f"{'annotations':>12}{'MB of json':>12}{'CPU seconds':>13}{'peak MB':>10}")
    for annotations in sizes:
        path = _annotation_file(folder / "instances.json", annotations // BOXES_PER_IMAGE, annotations)
        command = [sys.executable, "-m", "benchmarks.prepare", "index", str(path)]
        seconds, peak = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
        print(f"{annotations:12}{path.stat().st_size / 1e6:12.0f}{float(seconds):13.1f}{float(peak):10.0f}", flush=True)


def read_index(annotations: str, folder: str) -> None:
    index = AnnotationIndex()
    coco_source(folder, annotations).fill(index)
    images = index.finish()
    write_work_list(index, storage.join(folder, WORK_LIST), images=images, rows_per_shard=IMAGES_PER_SHARD)
    print(time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6)


def _image_files(folder: Path, images: int) -> list[Path]:
    folder.mkdir()
    images_as_bytes = [synthetic_image(number, longest_side=640, quality=95).image for number in range(DISTINCT_IMAGES)]
    paths = [folder / f"{number:08d}.jpg" for number in range(images)]
    for number, path in enumerate(paths):
        path.write_bytes(images_as_bytes[number % DISTINCT_IMAGES])
    return paths


def _annotation_file(path: Path, images: int, annotations: int) -> Path:
    """Write a COCO file like that of Objects365, with annotations in random order."""
    rng = random.Random(0)
    scenes = [synthetic_scene(number, longest_side=640) for number in range(DISTINCT_IMAGES)]
    sizes = [(scene.width, scene.height) for scene in scenes]  # sizes of the files written by _image_files
    with path.open("w") as file:
        file.write('{"images": [')
        for number in range(images):
            width, height = sizes[number % len(sizes)]
            name = f"{number:08d}.jpg"
            row = {"height": height, "width": width, "id": number, "license": 5, "file_name": name, "url": ""}
            file.write(("," if number else "") + json.dumps(row))
        file.write('], "annotations": [')
        for number in range(annotations):
            box = [rng.random() * 200 + 1 for _ in range(4)]
            row = {
                "id": number,
                "iscrowd": 0,
                "isfake": 0,
                "area": box[2] * box[3],
                "isreflected": 0,
                "bbox": box,
                "image_id": rng.randrange(images),
                "category_id": rng.randrange(len(CLASSES)),
            }
            file.write(("," if number else "") + json.dumps(row))
        categories = [{"id": label, "name": name} for label, name in enumerate(CLASSES)]
        file.write(f'], "categories": {json.dumps(categories)}}}')
    return path


def _copy(paths: list[Path], target: Path) -> str:
    digest = hashlib.sha256()
    with target.open("wb") as out:
        for path in paths:
            data = path.read_bytes()
            digest.update(data)
            out.write(data)
        out.flush()
        os.fsync(out.fileno())
    return digest.hexdigest()


if __name__ == "__main__":
    main()
