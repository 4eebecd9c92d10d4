"""Check shard sets for damaged files, broken images, impossible boxes, duplicates, and wrong labels.

    dfine doctor /shards/coco/train2017
    dfine doctor /shards/coco/train2017 /shards/coco/val2017 --html doctor.html
    dfine doctor s3://bucket/mine/train --json > report.json
    dfine doctor /shards/mine/val --model runs/mine --html labels.html     likely label errors

Several splits are also compared with each other: no image may be in two of them. Every file is read and every image
decoded, in one task per shard. The exit code is 0 without errors, 1 with errors, and 2 if nothing could be checked;
warnings and notes do not change it.

With --model, labels are judged instead, in this process: confident detections without a box, boxes without a detection, swapped
classes, and edges outside the interval that holds 99 % of the true ones, the surest first. Take a detector that was not trained
on these images: it would repeat their errors. The exit code is then 0.
"""

import argparse
import sys

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

NOTHING_CHECKED = 2  # exit code
CSV = b"kind,confidence,"  # begins every list of label errors


@user_errors(exit_code=NOTHING_CHECKED)
def main(argv: list[str] | None = None) -> int:
    """Run the command, and return its exit code."""
    arguments = parser()
    args = parsed(arguments, argv)
    if args.model is not None:
        return _judge_labels(args)
    if args.csv is not None:
        arguments.error("--csv lists likely label errors: name the detector that judges them with --model")

    # 1. Open the shard sets.
    from pipeline import storage
    from pipeline.config import ConfigError
    from pipeline.data.shards.manifest import load_shards
    from pipeline.output_folder import HTML, refuse_foreign_file

    refuse_foreign_file(args.html, "--html", HTML)
    shard_sets = [load_shards(uri) for uri in args.manifests]
    if len({storage.absolute(shards.uri) for shards in shard_sets}) < len(shard_sets):
        raise ConfigError("a shard set is named twice; name each split once")
    announce("doctor", "starting Ray …")

    # 2. Examine them on Ray.
    from pipeline.data.doctor.examine import examine
    from pipeline.data.doctor.html_report import doctor_page, doctor_text
    from pipeline.ray_cluster import start_ray

    start_ray(args.num_cpus)
    report = examine(shard_sets, decode=args.decode)

    # 3. Report.
    print(report.model_dump_json() if args.json else doctor_text(report))
    if args.html:
        storage.write_atomic(args.html, doctor_page(report, shard_sets, seed=args.seed).encode())
        print(f"doctor: see {args.html}", file=sys.stderr)
    return 1 if report.count("error") else 0


def _judge_labels(args: argparse.Namespace) -> int:
    """Judge the labels of one shard set by a detector, and return the exit code."""
    refuse_missing(args.model, "detector")
    from pipeline import storage
    from pipeline.config import ConfigError
    from pipeline.data.shards.manifest import load_shards
    from pipeline.output_folder import HTML, refuse_foreign_file

    refuse_foreign_file(args.html, "--html", HTML)
    refuse_foreign_file(args.csv, "--csv", CSV)
    if len(args.manifests) > 1:
        raise ConfigError("--model judges one shard set at a time: name one")
    shards = load_shards(args.manifests[0])
    announce("doctor", f"{shards.uri}: opening the detector {args.model} …")
    from pipeline.labelling.judge import judge_labels
    from pipeline.labelling.suspects_report import report_csv, report_json, report_page, report_text
    from pipeline.open_detector import open_detector

    loaded = open_detector(args.model, None)
    report = judge_labels(loaded, shards, least=args.confidence, batch_size=args.batch_size)
    print(report_json(report) if args.json else report_text(report))
    if args.csv:
        storage.write_atomic(args.csv, report_csv(report))
    if args.html:
        storage.write_atomic(args.html, report_page(report, shards).encode())
    for file in filter(None, (args.csv, args.html)):
        print(f"doctor: see {file}", file=sys.stderr)
    return 0


def parser() -> argparse.ArgumentParser:
    """Parser of the arguments."""
    arguments = command_parser("doctor", __doc__)
    arguments.add_argument(
        "manifests",
        nargs="+",
        type=location,
        metavar="MANIFEST",
        help="manifest.json or its folder: path, s3:// or gs://",
    )
    arguments.add_argument("--json", action="store_true", help="print the report as JSON")
    arguments.add_argument("--html", type=location, metavar="FILE", help="also write a page with plots and images")
    arguments.add_argument(
        "--decode",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="decode every image, or read its header alone",
    )
    arguments.add_argument(
        "--model",
        type=detector,
        metavar="DETECTOR",
        help="list likely label errors instead, by a detector that was not trained on these images: run or checkpoint folder,"
        " exported folder, .pth, runs:/ID, models:/NAME@ALIAS, hf://ORG/NAME or published name",
    )
    arguments.add_argument(
        "--confidence", type=share, default=0.5, metavar="C", help="of the label errors that are listed (%(default)s)"
    )
    arguments.add_argument("--csv", type=location, metavar="FILE", help="also write the label errors as CSV")
    arguments.add_argument(
        "--batch-size",
        type=at_least(1),
        default=8,
        metavar="N",
        help="images per forward pass with --model (%(default)s)",
    )
    arguments.add_argument("--seed", type=int, default=0, help="seed of the sample of images on the page")
    arguments.add_argument("--num-cpus", type=int, metavar="N", help="CPUs of a Ray started here; default: all")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
