"""Detect objects in images, folders, videos and shard sets.

    dfine predict runs/mine photos/ --out found
    dfine predict models:/NAME@ALIAS 'drone/**/*.jpg' clip.mp4 --frame-stride 10 --out found --threshold 0.5
    dfine predict runs/mine s3://bucket/val --out s3://bucket/found --threshold 0 --workers 8
    dfine predict runs/mine photos/ --out found --num-explanations 6     how each box was refined, with edge deviations
    dfine predict runs/mine photos/ --out found --coverage 0.9           intervals that hold 90 % of the true edges
    dfine predict runs/mine aerial/ --out found --tile 640               large images in tiles that overlap by a fifth
    dfine predict runs/mine photos/ --out found --coverage 0.9 --joint   all four edges of 90 % of the boxes

Writes Parquet parts with one row per image, rendered drawings and a contact sheet; up to a million detections also as
detections.json in COCO's result format with its images.json, and more than that with --json, in several files. The same command
again resumes an interrupted prediction. Unreadable images are listed with the reason in rejected.parquet. A few images are
processed here, more on Ray; paths must be readable from every node of its cluster.
"""

import argparse

from jobs.command import (
    add_coverage,
    add_precision,
    add_tiles,
    announce,
    at_least,
    command_parser,
    parsed,
    refuse_missing,
    threshold,
    tiling,
    user_errors,
)
from jobs.image_inputs import add_inputs, add_processing


@user_errors()
def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    args = parsed(parser(), argv)
    refuse_missing(args.detector, "detector")
    announce("predict", f"{args.detector}: listing the images and opening the detector …")
    from pipeline.predict.inputs import list_inputs
    from pipeline.predict.plan import holds_prediction

    earlier = args.out if holds_prediction(args.out) else None  # its drawings are no inputs
    inputs = list_inputs(args.inputs, frame_stride=args.frame_stride, leave_out=earlier)

    import torch

    from pipeline.open_detector import open_detector
    from pipeline.predict.predict import PredictOptions, in_this_process, predict

    on_gpu = in_this_process(inputs, args.workers) and torch.cuda.is_available()
    loaded = open_detector(args.detector, "cuda" if on_gpu else "cpu", exported=True)
    print(f"{loaded.origin} on {inputs}", flush=True)
    options = PredictOptions(
        threshold=args.threshold,
        part_size=args.part_size,
        batch_size=args.batch_size,
        workers=args.workers,
        num_images=args.num_images,
        num_explanations=args.num_explanations,
        precision=args.precision,
        coverage=args.coverage,
        tiling=tiling(args),
        joint=args.joint,
        json=args.json,
    )
    print(predict(loaded, inputs, args.out, options, announce=lambda line: print(line, flush=True)).summary())


def parser() -> argparse.ArgumentParser:
    """Parser of the arguments."""
    arguments = command_parser("predict", __doc__)
    add_inputs(arguments, metavar="INPUT", exported=True)
    arguments.add_argument(
        "--threshold",
        type=threshold,
        help="minimum score of all classes; default: by class the best on the validation images, or 0.4; 0 keeps all detections"
        "; precision=0.9: by class the score that reached it",
    )
    add_coverage(arguments)
    add_tiles(arguments, "objects are joined over their borders")
    arguments.add_argument(
        "--num-images", type=at_least(0), default=12, metavar="N", help="images to render (%(default)s)"
    )
    arguments.add_argument(
        "--num-explanations",
        type=at_least(0),
        default=0,
        metavar="N",
        help="render how the decoder refined a box of N images, and add the deviation of every edge to the parts",
    )
    add_processing(arguments)
    add_precision(arguments)
    arguments.add_argument(
        "--json",
        action="store_true",
        help="write COCO results as JSON even above a million detections, in files of a million each",
    )
    return arguments


if __name__ == "__main__":
    main()
