"""AP by the number of labelled images, chosen by `dfine select` or at random.

    dfine prepare voc BCCD --split trainval --out shards/bccd/train
    dfine prepare voc BCCD --split test --out shards/bccd/test
    python -m benchmarks.select_curve shards/bccd/train shards/bccd/test --init backbone.safetensors --out curve
    ... --report                                                            only print what `curve` holds

Starts from randomly drawn labelled images, the same for both arms of a seed. Each round adds images, those that the detector of
the round before chooses or random ones, and trains that detector further on all that is labelled. With --anew each round begins
with the initial weights instead. A finished round is a file in the output folder, so an interrupted measurement goes on where it
was.
"""

import argparse
import hashlib
import json
import math
import shutil
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from scipy.stats import t as student_t

from dfine_core.inference import LoadedDetector, image_sizes, prepare
from pipeline.config_files import load_experiment
from pipeline.data.prepare.split_off import near_groups
from pipeline.data.shards.manifest import MANIFEST_NAME, Shard, ShardSet, load_shards
from pipeline.data.shards.reader import locate_row_groups, read_row_groups
from pipeline.data.shards.set_statistics import count_rows
from pipeline.labelling.choose import choose
from pipeline.labelling.measured_images import measure_batch
from pipeline.open_detector import open_detector
from pipeline.predict.inputs import InputImage, decode_input
from pipeline.training.launch import launch

ARMS = ("selected", "random")
BATCH = 8
ROW_GROUP = 16


def main(argv: list[str] | None = None) -> None:
    """Measure what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train", help="shard set to label images of")
    parser.add_argument("test", help="shard set to evaluate on")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--init", help="initial weights of every training")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--first", type=int, default=50, help="images that are labelled at the start")
    parser.add_argument("--add", type=int, default=30, help="images that a round adds")
    parser.add_argument("--steps", type=int, default=100, help="of every training")
    parser.add_argument("--side", type=int, default=160, help="side of the input in pixels")
    parser.add_argument("--anew", action="store_true", help="train every round from the initial weights")
    parser.add_argument("--report", action="store_true", help="train nothing")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    if not args.report:
        measure(args)
    report(args.out, args.seeds, args.rounds, args.first, args.add)


def measure(args: argparse.Namespace) -> None:
    """Run all rounds that have no file yet; both arms share the first one."""
    pool, test = load_shards(args.train), load_shards(args.test)
    rows = all_rows(pool)
    for seed in args.seeds:
        order = np.random.default_rng(seed).permutation(rows.num_rows).tolist()
        first = _round(args, pool, test, rows, seed, "first", 0, order[: args.first], args.init)
        for arm in ARMS:
            last, before = first, args.out / f"{seed}_first_0"
            for number in range(1, args.rounds + 1):
                labelled = [*last["labelled"], *last[arm]]
                init = args.init if args.anew else str(before)
                last = _round(args, pool, test, rows, seed, arm, number, labelled, init)
                before = args.out / f"{seed}_{arm}_{number}"


def _round(
    args: argparse.Namespace,
    pool: ShardSet,
    test: ShardSet,
    rows: pa.Table,
    seed: int,
    arm: str,
    number: int,
    labelled: list[int],
    init: str | None,
) -> dict[str, Any]:
    """Train on the labelled images, evaluate, and choose the next ones in both ways."""
    file = args.out / f"{seed}_{arm}_{number}.json"
    if file.exists():
        content: dict[str, Any] = json.loads(file.read_text())
        return content
    started = time.process_time()
    name = f"{seed}_{arm}_{number}"
    work = args.out / "work" / name  # of its own: MLflow keeps the database of a round open
    shutil.rmtree(work, ignore_errors=True)
    shards = write_subset(work / "shards", pool, rows, labelled)
    settings = {
        "name": name,
        "storage": str(work / "runs"),
        "seed": seed,
        "init": init,
        "data.train": str(shards),
        "data.val": test.uri,
        "data.decode_in": "worker",
        "model.input_size": [args.side, args.side],
        "schedule": {
            "steps": args.steps,
            "global_batch_size": BATCH,
            "warmup_steps": args.steps // 5,
            "no_aug_epochs": 0,
            "min_lr_ratio": 0.05,
        },
        "evaluation": {"every_steps": args.steps, "num_images": 0},
    }
    result = launch(load_experiment(Path(__file__).parent.parent / "configs" / "bccd.yaml", overrides=settings))
    assert result.numbers is not None
    loaded = open_detector(result.run)
    shutil.rmtree(args.out / name, ignore_errors=True)
    loaded.save(args.out / name)
    rest = [index for index in range(rows.num_rows) if index not in set(labelled)]
    drawn = np.random.default_rng([seed, number]).permutation(rest)[: args.add].tolist()
    content = {
        "labelled": labelled,
        "AP": result.numbers["AP"],
        "AP50": result.numbers["AP50"],
        "boxes": sum(len(rows["labels"][index].as_py()) for index in labelled),
        "selected": selected(loaded, rows, labelled, rest, args.add),
        "random": drawn,
        "cpu_seconds": time.process_time() - started,
    }
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(content))
    partial.rename(file)
    shutil.rmtree(work)
    print(f"{name}: {len(labelled)} images, AP {content['AP']:.3f}, {content['cpu_seconds']:.0f} CPU s", flush=True)
    return content


def selected(
    loaded: LoadedDetector, rows: pa.Table, labelled: Sequence[int], rest: Sequence[int], count: int
) -> list[int]:
    """Images that the detector chooses, as `dfine select` does with the labelled ones given."""
    order = [*rest, *labelled]
    measured: list[dict[str, Any]] = []
    for start in range(0, len(order), BATCH):
        images = [decode_input(InputImage(0, "", rows["image"][n].as_py())) for n in order[start : start + BATCH]]
        measured += measure_batch(loaded, prepare(images, loaded.config.input_size), image_sizes(images))
    features = np.array([row["features"] for row in measured], np.float32)
    choice = choose(
        np.array([row["score_error"] + row["edge_error"] for row in measured[: len(rest)]], np.float32),
        features[: len(rest)],
        near_groups([row["gradient_hash"] for row in measured]),
        count,
        labelled=features[len(rest) :],
    )
    return [rest[image.index] for image in choice.images]


def all_rows(shards: ShardSet) -> pa.Table:
    """All rows of a shard set, in order."""
    source = locate_row_groups(shards)
    return pa.concat_tables(read_row_groups(source, range(len(source.rows))).values())


def write_subset(folder: Path, shards: ShardSet, rows: pa.Table, chosen: Sequence[int]) -> Path:
    """Write some rows of a shard set as a set of their own."""
    folder.mkdir(parents=True)
    part = pa.concat_tables([rows.slice(index, 1) for index in sorted(chosen)]).combine_chunks()
    path = folder / "shard-00000.parquet"
    pq.write_table(part, path, row_group_size=ROW_GROUP, compression="none")
    full, rest = divmod(len(part), ROW_GROUP)
    shard = Shard(
        file=path.name,
        rows=len(part),
        bytes=path.stat().st_size,
        sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        row_groups=(ROW_GROUP,) * full + ((rest,) if rest else ()),
    )
    statistics_of = count_rows(part, len(shards.manifest.categories))
    changed = {
        "shards": (shard,),
        "images": len(part),
        "boxes": sum(statistics_of.class_counts) + statistics_of.crowd_boxes,
        "rejected": 0,
        "statistics": statistics_of,
    }
    (folder / MANIFEST_NAME).write_text(shards.manifest.model_copy(update=changed).model_dump_json())
    return folder


def report(out: Path, seeds: Sequence[int], rounds: int, first: int, add: int) -> None:
    """Print AP by round, mean and standard deviation over seeds, and the paired difference with its 95 % interval."""

    def numbers(arm: str, number: int) -> Mapping[int, dict[str, Any]]:
        files = {seed: out / f"{seed}_{arm if number else 'first'}_{number}.json" for seed in seeds}
        return {seed: json.loads(file.read_text()) for seed, file in files.items() if file.exists()}

    print("images   " + "".join(f"{arm:>22}" for arm in ARMS) + "    difference (95 %)   boxes labelled")
    for number in range(rounds + 1):
        arms = [numbers(arm, number) for arm in ARMS]
        paired = sorted(arms[0].keys() & arms[1].keys())
        if not paired:
            continue
        values = [[arm[seed]["AP"] for seed in paired] for arm in arms]
        spread = [f"{statistics.mean(v):.3f} ± {statistics.stdev(v) if len(v) > 1 else math.nan:.3f}" for v in values]
        difference = [a - b for a, b in zip(*values, strict=True)]
        reach = (
            float(student_t.ppf(0.975, len(paired) - 1)) * statistics.stdev(difference) / math.sqrt(len(paired))
            if len(paired) > 1
            else math.nan
        )
        boxes = " and ".join(f"{statistics.mean(arm[seed]['boxes'] for seed in paired):.0f}" for arm in arms)
        print(
            f"{first + add * number:6}   "
            + "".join(f"{text:>22}" for text in spread)
            + f"    {statistics.mean(difference):+.3f} ± {reach:.3f} ({len(paired)})   {boxes}"
        )


if __name__ == "__main__":
    main()
