"""Detect in images, folders, videos and shard sets with a trained detector, on Ray.

    python -m jobs.predict runs/mine photos/ --out found
    python -m jobs.predict models:/NAME@ALIAS 'drone/**/*.jpg' clip.mp4 --every 10 --out found --threshold 0.5
    python -m jobs.predict runs/mine s3://bucket/val --out s3://bucket/found --threshold 0 --workers 8
    python -m jobs.predict runs/mine photos/ --out found --explain 6      how the boxes came about, and how sure each edge is

Writes detections.json in COCO's result format with images.json beside it, Parquet parts with a row per picture, drawn
pictures and a contact sheet. Killed, it goes on where it was when it is given again. Pictures that cannot be read are
listed with the reason in rejected.parquet. Paths must be readable from every node of the cluster.
"""

import argparse

import torch

from jobs.command import at_least, location, share, user_errors
from pipeline.open_detector import open_detector
from pipeline.predict.inputs import list_inputs
from pipeline.predict.predict import IN_PROCESS, PredictOptions, predict


@user_errors()
def main(argv: list[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    here = args.workers == IN_PROCESS and torch.cuda.is_available()
    loaded = open_detector(args.detector, "cuda" if here else "cpu")
    inputs = list_inputs(args.inputs, frame_stride=args.every)
    print(f"{loaded.origin} on {inputs}", flush=True)
    options = PredictOptions(
        threshold=args.threshold,
        part_size=args.part,
        batch_size=args.batch,
        workers=args.workers,
        num_images=args.pictures,
        num_explanations=args.explain,
    )
    print(predict(loaded, inputs, args.out, options).summary())


def _parser() -> argparse.ArgumentParser:
    defaults = PredictOptions()
    number = at_least(1)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "detector",
        type=location,
        help="run or checkpoint folder, exported folder, .pth, runs:/ID or models:/NAME@ALIAS",
    )
    parser.add_argument(
        "inputs",
        nargs="+",
        type=location,
        metavar="INPUT",
        help="image, video, folder, pattern, shard set; path or URI",
    )
    parser.add_argument("--out", type=location, required=True, metavar="FOLDER", help="path, s3:// or gs://")
    parser.add_argument(
        "--threshold", type=share, default=defaults.threshold, help="least score; 0 for all, as COCO's AP wants them"
    )
    parser.add_argument("--every", type=number, default=1, metavar="N", help="take each N-th frame of videos")
    parser.add_argument("--pictures", type=at_least(0), default=defaults.num_images, metavar="N", help="to draw")
    parser.add_argument(
        "--explain",
        type=at_least(0),
        default=0,
        metavar="N",
        help="draw how the decoder refined a box of N pictures, and add the deviation of every edge to the parts",
    )
    parser.add_argument(
        "--part", type=number, default=defaults.part_size, metavar="N", help="pictures that a kill may cost"
    )
    parser.add_argument("--batch", type=number, default=defaults.batch_size, metavar="N", help="pictures at once")
    parser.add_argument(
        "--workers",
        type=at_least(0),
        metavar="N",
        help="detectors on Ray; default: one for each GPU, or one. 0: in this process, without Ray",
    )
    return parser


if __name__ == "__main__":
    main()
