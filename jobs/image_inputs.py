"""Arguments of the commands that run a detector over images of any source, in parts that can be resumed."""

import argparse

from jobs.command import at_least, detector, location


def add_inputs(arguments: argparse.ArgumentParser, *, metavar: str, exported: bool = False) -> None:
    """Add the detector, the inputs, `--frame-stride` and `--out`.

    Args:
        exported: the command takes exported files, too.
    """
    files = "exported folder or file, .pth, runs:/, models:/" if exported else "exported folder, .pth, runs:/, models:/"
    arguments.add_argument(
        "detector", type=detector, help=f"run or checkpoint folder, {files}, hf://ORG/NAME or published name"
    )
    arguments.add_argument(
        "inputs",
        nargs="+",
        type=location,
        metavar=metavar,
        help="image, video, folder, pattern or shard set; path or URI",
    )
    arguments.add_argument("--out", type=location, required=True, metavar="FOLDER", help="path, s3:// or gs://")
    arguments.add_argument(
        "--frame-stride", type=at_least(1), default=1, metavar="N", help="take every N-th frame of videos"
    )


def add_processing(arguments: argparse.ArgumentParser) -> None:
    """Add `--part-size`, `--batch-size` and `--workers`."""
    number = at_least(1)
    arguments.add_argument(
        "--part-size", type=number, default=256, metavar="N", help="images per part, the unit of resuming (%(default)s)"
    )
    arguments.add_argument(
        "--batch-size", type=number, default=8, metavar="N", help="images per forward pass (%(default)s)"
    )
    arguments.add_argument(
        "--workers",
        type=at_least(0),
        metavar="N",
        help="detectors on Ray; default: one per GPU, or one. 0: in this process, without Ray, as by default up to 256 images",
    )
