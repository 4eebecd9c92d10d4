"""Calibrate a detector: intervals of edges that hold the true ones, scores as probabilities.

    dfine calibrate runs/mine /shards/mine/val
    dfine calibrate exported/mine/safetensors /shards/mine/val --out calibrated --scores platt

Fits on one half of the images and reports on the other. Writes calibration.json and calibration.html into the detector's
folder, where load, predict and serve read it, or into --out. Use images that it was not trained on. If MLflow knows the run of
the detector, the files and numbers are attached to it and to its model.
"""

import argparse
import tempfile

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
    from pipeline.calibration.write import calibrate, folder_of, log_to_mlflow, summary
    from pipeline.mlflow_access import is_mlflow_uri
    from pipeline.open_detector import open_detector
    from pipeline.tracking.calibrated_model import named_target, target_of_checkpoint

    loaded = open_detector(args.detector, None)
    shards = with_classes_of(shards, loaded.names, f"the detector {args.detector}")
    for line in class_lines(shards, "the data"):
        print(line, flush=True)
    named = args.attach or (args.detector if is_mlflow_uri(args.detector) else None)
    target = named_target(named) if named else target_of_checkpoint(loaded.origin)
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.out or (temporary if is_mlflow_uri(args.detector) else folder_of(loaded))
        shown = str(target.found) if target is not None and folder == temporary else folder
        print(f"{loaded.origin} on {shards.uri}: {shards.manifest.images} images, to {shown}", flush=True)
        written = calibrate(
            loaded, shards, folder, least_score=args.score, method=args.scores, batch_size=args.batch_size
        )
        for line in summary(written.reliability):
            print(line)
        if folder != temporary:
            print(f"calibration: {written.file}\npage: {written.page}")
        if target is not None:
            log_to_mlflow(target, shards, written)
            print(f"attached to {target.found}")


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
    arguments.add_argument(
        "--attach", metavar="MODEL", help="runs:/ID or models:/NAME/VERSION; default: the run of the detector, if known"
    )
    arguments.add_argument("--batch-size", type=at_least(1), default=16, metavar="N", help="images per forward pass")
    return arguments


if __name__ == "__main__":
    main()
