"""Measure a detector's speed: latency, throughput by batch size, parameters and GFLOPs.

    dfine benchmark runs/mine
    dfine benchmark dfine_s_coco.pth --precision fp16 --batch-sizes 1 8 32
    dfine benchmark exported/detector.onnx --threads 4 --json speed.json

Takes the detectors of `dfine predict`, exported files too. The timing covers the way from resized images to detections in pixels,
on a GPU if there is one. A .pt2 file is a program: open trusted ones alone.
"""

import argparse
import json
from typing import TYPE_CHECKING

from jobs.command import (
    add_precision,
    announce,
    at_least,
    command_parser,
    detector,
    location,
    parsed,
    positive,
    refuse_missing,
    user_errors,
)

if TYPE_CHECKING:
    import torch


@user_errors()
def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    args = parsed(parser(), argv)
    refuse_missing(args.detector, "detector")
    announce("benchmark", f"{args.detector}: opening the detector …")
    import torch

    from pipeline import storage
    from pipeline.benchmark import measure, open_subject

    if args.threads:
        torch.set_num_threads(args.threads)
    device = usable_device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    batch_sizes = args.batch_sizes or [1, 4, 16, *([64] if device.type == "cuda" else [])]
    subject = open_subject(args.detector, device=device, precision=args.precision)
    report = measure(subject, batch_sizes=batch_sizes, calls=args.calls, seconds=args.seconds)
    print(report.table())
    if args.json:
        storage.write_atomic(args.json, json.dumps(report.as_json(), indent=1).encode())


def usable_device(name: str) -> "torch.device":
    """Device of that name.

    Raises:
        ConfigError: there is no such device here.
    """
    import torch

    from pipeline.config import ConfigError

    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # AssertionError: PyTorch without CUDA
        raise ConfigError(f"--device {name}: it cannot be used here: {str(error).splitlines()[0]}") from None
    return torch.device(name)


def parser() -> argparse.ArgumentParser:
    """Parser of the arguments."""
    arguments = command_parser("benchmark", __doc__)
    arguments.add_argument(
        "detector",
        type=detector,
        help="dfine-s-coco or another published name, run or checkpoint folder, .pth, runs:/, models:/, .onnx, .xml, .pt2",
    )
    arguments.add_argument("--device", help="cpu or cuda; default: a GPU if there is one")
    add_precision(arguments, default="fp32")
    arguments.add_argument(
        "--batch-sizes", type=at_least(1), nargs="+", metavar="N", help="default: 1 4 16, and 64 on a GPU"
    )
    arguments.add_argument("--threads", type=at_least(1), metavar="N", help="CPU threads; default: PyTorch's")
    arguments.add_argument(
        "--calls", type=at_least(1), default=200, metavar="N", help="forward passes timed one by one"
    )
    arguments.add_argument(
        "--seconds", type=positive, default=10.0, help="time limit for the latency and for each batch size"
    )
    arguments.add_argument("--json", type=location, metavar="FILE", help="file for the numbers, path or URI")
    return arguments


if __name__ == "__main__":
    main()
