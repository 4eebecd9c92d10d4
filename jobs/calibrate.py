"""Calibrate a detector: intervals of edges that hold the true ones, scores as probabilities.

    dfine calibrate runs/mine /shards/mine/val
    dfine calibrate exported/mine/safetensors /shards/mine/val --out calibrated --scores platt

Fits on one half of the images and reports on the other. Writes calibration.json and calibration.html into the detector's
folder, or into --out. Use images that it was not trained on.
"""

import argparse

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

METHODS = ("temperature", "platt", "isotonic")


@user_errors()
def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    args = parsed(parser(), argv)
    refuse_missing(args.detector, "detector")
    announce("calibrate", f"{args.detector}: opening the data and the detector …")
    from pipeline.data.shards.classes import class_lines, with_classes_of
    from pipeline.data.shards.manifest import load_shards
    from pipeline.data.shards.reader import refuse_changed_files
    from pipeline.output_folder import refuse_foreign_folder

    if args.out:
        refuse_foreign_folder(args.out, FILE, "calibration")
    shards = load_shards(args.manifest)
    refuse_changed_files(shards)
    from pipeline.calibration.write import calibrate, folder_of, summary
    from pipeline.open_detector import open_detector

    loaded = open_detector(args.detector, None)
    shards = with_classes_of(shards, loaded.names, f"the detector {args.detector}")
    for line in class_lines(shards, "the data"):
        print(line, flush=True)
    folder = args.out or folder_of(loaded)
    print(f"{loaded.origin} on {shards.uri}: {shards.manifest.images} images, to {folder}", flush=True)
    written = calibrate(
        loaded, shards, args.out, least_score=args.score, method=args.scores, batch_size=args.batch_size
    )
    for line in summary(written.reliability):
        print(line)
    print(f"calibration: {written.file}\npage: {written.page}")


FILE = "calibration.json"  # marks the folder of a calibration


def parser() -> argparse.ArgumentParser:
    """Parser of the arguments."""
    arguments = command_parser("calibrate", __doc__)
    arguments.add_argument("detector", type=detector, help="folder of a run, a checkpoint or an exported detector")
    arguments.add_argument("manifest", type=location, help="folder of a shard set, or its manifest.json")
    arguments.add_argument(
        "--out", type=location, metavar="FOLDER", help="folder of both files; default: the detector's"
    )
    arguments.add_argument(
        "--score",
        type=share,
        default=0.3,
        metavar="SCORE",
        help="least score of the detections whose edges are calibrated (%(default)s)",
    )
    arguments.add_argument(
        "--scores", choices=METHODS, default=METHODS[0], help="how scores are mapped to probabilities (%(default)s)"
    )
    arguments.add_argument("--batch-size", type=at_least(1), default=16, metavar="N", help="images per forward pass")
    return arguments


if __name__ == "__main__":
    main()
