"""Evaluate a trained detector on a shard set: the COCO numbers, per class, curves, errors, what the layers do.

    python -m jobs.evaluate runs/mine /shards/mine/val                     the best weights of a run
    python -m jobs.evaluate runs/mine/checkpoints/step-00001300 s3://bucket/val --out report
    python -m jobs.evaluate runs:/RUN_ID /shards/mine/val                  as MLflow knows it, likewise models:/NAME@ALIAS

The numbers are pycocotools'. --out writes the report with its figures, and detections.json in COCO's result format.
"""

import argparse
import json
from collections.abc import Sequence

import torch

from dfine_core import LoadedDetector
from jobs.command import at_least, location, user_errors
from pipeline import storage
from pipeline.config import ConfigError
from pipeline.data.shards.manifest import ShardSet, load_shards
from pipeline.data.shards.reader import refuse_changed_files
from pipeline.evaluation.detections import to_coco_json
from pipeline.evaluation.evaluate import collect_detections, compute_report
from pipeline.evaluation.ground_truth import read_ground_truth
from pipeline.evaluation.sample_images import sample_images
from pipeline.open_detector import open_detector
from pipeline.ray_cluster import start_ray


@user_errors()
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("detector", type=location, help="checkpoint, run folder, runs:/ID or models:/NAME@ALIAS")
    parser.add_argument("manifest", type=location, help="of a shard set, or its folder")
    parser.add_argument(
        "--out", type=location, metavar="FOLDER", help="write the report, figures, pictures and detections here"
    )
    parser.add_argument("--micro-batch", type=at_least(1), default=16, help="images at once")
    parser.add_argument("--pictures", type=at_least(0), default=12, help="validation images to draw, with --out")
    args = parser.parse_args(argv)
    trained, shards = open_detector(args.detector), load_shards(args.manifest)
    refuse_other_classes(trained.names, shards)
    refuse_changed_files(shards)
    print(f"{trained.origin} on {shards.uri}: {shards.manifest.images} images", flush=True)
    evaluate(trained, shards, args.out, args.micro_batch_size, args.pictures)


def evaluate(trained: LoadedDetector, shards: ShardSet, out: str | None, micro_batch_size: int, pictures: int) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    detector = trained.detector.to(device)
    start_ray()
    output = collect_detections(detector, shards, device=device, micro_batch_size=micro_batch_size, progress=True)
    assert output is not None
    report = compute_report(output, read_ground_truth(shards), final=True)
    print(report.table())
    if out is None:
        return
    report.write(out)
    rows = to_coco_json(output.detections, shards.manifest.categories)
    storage.write_atomic(storage.join(out, "detections.json"), json.dumps(rows).encode())
    for name, content in sample_images(detector, shards, device=device, count=pictures):
        storage.write_atomic(storage.join(out, f"{name.replace('/', '_')}.png"), content)
    print(f"report, detections and pictures: {out}")


def refuse_other_classes(names: Sequence[str], shards: ShardSet) -> None:
    """Raises: ConfigError, unless the data's classes are the detector's, in their order."""
    theirs = [category.name for category in shards.manifest.categories]
    if list(names) != theirs:
        missing, unknown = sorted(set(names) - set(theirs)), sorted(set(theirs) - set(names))
        raise ConfigError(
            f"the detector's {len(names)} classes are not the {len(theirs)} of {shards.uri}"
            f" (only the detector's: {', '.join(missing[:5]) or 'none'}; only the data's: {', '.join(unknown[:5]) or 'none'}):"
            " evaluate on data that was prepared with the same categories"
        )


if __name__ == "__main__":
    main()
