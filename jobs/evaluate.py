"""Evaluate a detector on a shard set: COCO metrics, per-class AP, curves, errors.

    dfine evaluate runs/mine /shards/mine/val                      the best weights of a run
    dfine evaluate runs/mine/checkpoints/step-00001300 s3://bucket/val --out report
    dfine evaluate runs:/RUN_ID /shards/mine/val                   a run of MLflow, likewise models:/NAME@ALIAS

    dfine evaluate runs/mine /shards/mine/val --precision 0.95 --write-thresholds

The metrics are those of pycocotools. --out writes the report with its figures, and detections.json in COCO's result format.
--write-thresholds replaces the thresholds in the detector's folder, which predict and serve take, by those measured here.
"""

import argparse
from contextlib import ExitStack
from typing import TYPE_CHECKING

from dfine_core.thresholds import WANTED_PRECISION
from jobs.command import (
    announce,
    at_least,
    command_parser,
    detector,
    location,
    parsed,
    refuse_missing,
    share,
    user_errors,
)

if TYPE_CHECKING:
    from dfine_core import LoadedDetector
    from pipeline.data.shards.manifest import ShardSet
    from pipeline.evaluation.report import EvaluationReport


REPORT = "report.json"  # marks the folder of an evaluation


@user_errors()
def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    args = parsed(parser(), argv)
    refuse_missing(args.detector, "detector")
    announce("evaluate", f"{args.detector}: opening the data and the detector …")
    from pipeline.data.shards.classes import class_lines, with_classes_of
    from pipeline.data.shards.manifest import load_shards
    from pipeline.data.shards.reader import refuse_changed_files
    from pipeline.output_folder import refuse_foreign_folder

    if args.out:
        refuse_foreign_folder(args.out, REPORT, "evaluation")
    shards = load_shards(args.manifest)
    refuse_changed_files(shards)

    from pipeline.open_detector import open_detector
    from pipeline.thresholds import thresholds_file

    loaded = open_detector(args.detector)
    shards = with_classes_of(shards, loaded.names, f"the detector {args.detector}")
    for line in class_lines(shards, "the data"):
        print(line, flush=True)
    file = thresholds_file(args.detector, loaded) if args.write_thresholds else None
    print(f"{loaded.origin} on {shards.uri}: {shards.manifest.images} images", flush=True)
    report = evaluate(loaded, shards, args.out, args.batch_size, args.num_images, args.precision)
    if file is not None:
        keep_thresholds(file, report)


def evaluate(
    loaded: "LoadedDetector",
    shards: "ShardSet",
    out: str | None,
    batch_size: int,
    num_images: int,
    wanted_precision: float,
) -> "EvaluationReport":
    """Detect in all images, print the metrics, and write the report to `out`."""
    import torch

    from pipeline import storage
    from pipeline.evaluation.detections import coco_json_writer
    from pipeline.evaluation.evaluate import evaluate as evaluate_detector
    from pipeline.evaluation.sample_images import sample_images
    from pipeline.ray_job import cluster_to_join

    # 1. Detect, write the detections, and compare them with the ground truth.
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        loaded = loaded.with_precision("fp32-channels-last")  # faster, and no other arithmetic
    detector = loaded.detector.to(device)
    here = device.type == "cpu" and not cluster_to_join()  # one thread decodes faster than a CPU detects
    if not here:
        from pipeline.ray_cluster import start_ray

        start_ray()
    with ExitStack() as files:
        on_detections = None
        if out is not None:
            stream = files.enter_context(storage.open_atomic(storage.join(out, "detections.json")))
            on_detections = files.enter_context(coco_json_writer(stream, shards.categories))
        report = evaluate_detector(
            detector,
            shards,
            device=device,
            micro_batch_size=batch_size,
            decode_in="inline" if here else "task",
            final=True,
            wanted_precision=wanted_precision,
            progress=True,
            on_detections=on_detections,
        )
    assert report is not None  # it is the only rank
    print(report.table())
    if out is None:
        return report

    # 2. Write report and sample images.
    report.write(out)
    for name, content in sample_images(detector, shards, device=device, count=num_images):
        storage.write_atomic(storage.join(out, f"{name.replace('/', '_')}.png"), content)
    print(f"report, detections and images: {out}")
    return report


def keep_thresholds(file: str, report: "EvaluationReport") -> None:
    """Write the measured thresholds beside the weights.

    Raises:
        ConfigError: no class was ever found, or the file is gone.
    """
    from pipeline.config import ConfigError
    from pipeline.thresholds import write_thresholds

    thresholds = report.points.thresholds
    if not any(thresholds.best_f1):
        raise ConfigError(f"{file}: stays as it is, no class was found in these images, so there are no thresholds")
    write_thresholds(file, thresholds)
    print(f"thresholds written: {file}; files that were exported before keep theirs, export them again")


def parser() -> argparse.ArgumentParser:
    """Parser of the arguments."""
    arguments = command_parser("evaluate", __doc__)
    arguments.add_argument(
        "detector",
        type=detector,
        help="checkpoint, run folder, runs:/ID, models:/NAME@ALIAS, hf://ORG/NAME or a name of `dfine weights list`",
    )
    arguments.add_argument("manifest", type=location, help="folder of a shard set, or its manifest.json")
    arguments.add_argument(
        "--out", type=location, metavar="FOLDER", help="folder for the report, its figures, images and detections"
    )
    arguments.add_argument("--batch-size", type=at_least(1), default=16, metavar="N", help="images per forward pass")
    arguments.add_argument(
        "--num-images", type=at_least(0), default=12, metavar="N", help="validation images to render, with --out"
    )
    arguments.add_argument(
        "--precision",
        type=share,
        default=WANTED_PRECISION,
        metavar="SHARE",
        help="report the lowest score of every class whose detections reach it (%(default)s)",
    )
    arguments.add_argument(
        "--write-thresholds",
        action="store_true",
        help="keep the measured scores in the detector's folder, as the default of predict and serve",
    )
    return arguments


if __name__ == "__main__":
    main()
