"""How fast a detector is: latency of one image, throughput by batch size, parameters and GFLOPs.

    python -m jobs.benchmark runs/mine
    python -m jobs.benchmark dfine_s_coco.pth --precision fp16 --batches 1 8 32
    python -m jobs.benchmark exported/detector.onnx --threads 4 --json speed.json

Takes what `jobs.predict` takes, and exported .onnx and .pt2 files. Timed is the way from stretched images to detections in
pixels, on a GPU if there is one. A .pt2 file is a program: open those that you trust.
"""

import argparse
import json

import torch

from jobs.command import at_least, location, positive, user_errors
from pipeline import storage
from pipeline.benchmark import measure, open_subject


@user_errors()
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "detector", type=location, help="run or checkpoint folder, .pth, runs:/ID, models:/NAME@ALIAS, .onnx, .pt2"
    )
    parser.add_argument("--device", type=device, help="cpu or cuda; default: a GPU if there is one")
    parser.add_argument(
        "--precision", choices=("fp32", "bf16", "fp16"), default="fp32", help="autocast, not of exported files"
    )
    parser.add_argument("--batches", type=at_least(1), nargs="+", metavar="N", help="default: 1 4 16, and 64 on a GPU")
    parser.add_argument("--threads", type=at_least(1), metavar="N", help="of the CPU; default: torch's")
    parser.add_argument("--calls", type=at_least(1), default=200, metavar="N", help="timed one by one")
    parser.add_argument("--seconds", type=positive, default=10.0, help="at most, for the latency and each batch size")
    parser.add_argument("--json", type=location, metavar="FILE", help="write the numbers here, path or URI")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    chosen = args.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batches = args.batches or [1, 4, 16, *([64] if chosen.type == "cuda" else [])]
    subject = open_subject(args.detector, device=chosen, precision=args.precision)
    report = measure(subject, batch_sizes=batches, calls=args.calls, seconds=args.seconds)
    print(report.table())
    if args.json:
        storage.write_atomic(args.json, json.dumps(report.as_json(), indent=1).encode())


def device(text: str) -> torch.device:
    """The type of --device."""
    try:
        torch.empty(0, device=text)
    except (RuntimeError, AssertionError) as error:  # AssertionError: PyTorch without CUDA
        raise argparse.ArgumentTypeError(f"{text!r} cannot be used here: {str(error).splitlines()[0]}") from None
    return torch.device(text)


if __name__ == "__main__":
    main()
