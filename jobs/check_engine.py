"""Compare an exported file, from here or from elsewhere, with its detector.

    dfine check-engine exported/detector.onnx runs/mine shards/mine/val
    dfine check-engine engine/detector.xml runs/mine shards/mine/val --precision default
    dfine check-engine half.onnx runs/mine shards/mine/val --tolerance half --json verdict.json

Runs the file in its runtime, in a process of its own, on the images of a shard set and on inputs that known faults of runtimes
show on, and prints the verdict of the export's gate with latencies. The exit code is 1 if the file is refused. The file has the
inputs and outputs of an export: images [B, 3, H, W] in 0..1 and sizes [B, 2] (width, height) to labels, boxes in pixels and
scores. It needs no metadata.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.command import (
    announce,
    at_least,
    command_parser,
    detector,
    local_path,
    location,
    parsed,
    refuse_missing,
    user_errors,
)

if TYPE_CHECKING:
    from pipeline.export.formats import Opening

TOLERANCES = ("full", "half", "int8")
REPORT = b'{\n "accepted"'  # begins every verdict
PRECISIONS = ("f32", "default")


@user_errors(extra="export")
def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    args = parsed(parser(), argv)
    refuse_missing(str(args.file), "exported file")
    refuse_missing(args.detector, "detector")
    announce("check-engine", f"{args.file}: opening it, its detector and the images …")
    from dfine_core.agreement import FULL, HALF, INT8
    from pipeline import storage
    from pipeline.data.shards.classes import with_classes_of
    from pipeline.data.shards.manifest import load_shards
    from pipeline.data.shards.reader import refuse_changed_files
    from pipeline.export.check_images import from_shards
    from pipeline.export.export import opening_entry, row_line
    from pipeline.export.gate import GateSubject, Timing, check_subjects
    from pipeline.open_detector import open_detector
    from pipeline.output_folder import refuse_foreign_file

    refuse_foreign_file(args.json, "--json", REPORT)
    openings = tuple(_opening(args.file, precision) for precision in args.precision)
    model = open_detector(args.detector)
    shards = with_classes_of(load_shards(args.shards), model.names, "the detector")
    refuse_changed_files(shards)
    check_set = from_shards(shards, args.num_images)
    tolerance = {"full": FULL, "half": HALF, "int8": INT8}[args.tolerance]
    subject = GateSubject(args.file, openings, tolerance)
    verdict = check_subjects(model, {str(args.file): subject}, check_set, Timing())[str(args.file)]
    lines = "\n".join(f"  {row_line(row)}" for row in verdict.rows)
    print(f"{args.file} against {model.origin}, on {check_set.description}\n{lines}")
    if args.json:
        content = {
            "accepted": verdict.accepted,
            "reason": verdict.reason,
            "checked_on": check_set.description,
            "openings": [opening_entry(row) for row in verdict.rows],
        }
        storage.write_atomic(args.json, json.dumps(content, indent=1).encode())
    if not verdict.accepted:
        sys.exit(1)


def _opening(file: Path, precision: str) -> "Opening":
    from dfine_core.runtimes.files import RuntimeFileError
    from pipeline.config import ConfigError
    from pipeline.export.formats import opening_of

    try:
        return opening_of(str(file), precision)
    except RuntimeFileError as error:
        raise ConfigError(f"{error}") from None


def parser() -> argparse.ArgumentParser:
    """Parser of the arguments."""
    arguments = command_parser("check-engine", __doc__)
    arguments.add_argument(
        "file", type=local_path, metavar="FILE", help="exported file; its suffix decides on the runtime"
    )
    arguments.add_argument(
        "detector", type=detector, metavar="RUN", help="detector that it was made of, as of dfine export"
    )
    arguments.add_argument("shards", type=location, metavar="SHARDS", help="shard set to compare on")
    arguments.add_argument(
        "--precision",
        nargs="+",
        choices=PRECISIONS,
        default=["f32"],
        help="arithmetic of the runtime, each checked by itself: f32, or its default on this machine (f32)",
    )
    arguments.add_argument(
        "--tolerance",
        choices=TOLERANCES,
        default="full",
        help="limits of files in float32, in half precision or in 8-bit integers (%(default)s)",
    )
    arguments.add_argument(
        "--num-images", type=at_least(1), default=50, metavar="N", help="images to compare on (%(default)s)"
    )
    arguments.add_argument("--json", type=location, metavar="FILE", help="file for the verdict, path or URI")
    return arguments


if __name__ == "__main__":
    main()
