"""Inference on a CPU: every precision of the detector and ONNX Runtime, alternating in one process.

    python -m benchmarks.cpu_inference --variants n s
    python -m benchmarks.cpu_inference --variants n --onnx detector.onnx --rounds 12

Random weights, deployed, one image from pixels to detections; the ONNX file is exported first unless given, which takes half a
minute of CPU. CPU time of all threads, median and minimum. `python -m jobs.benchmark` measures the wall time of one detector.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from dfine_core import Detector, LoadedDetector, ModelConfig
from dfine_core.config import VARIANTS
from dfine_core.inference import predict_batch
from dfine_core.precision import PRECISIONS
from pipeline.benchmark import open_subject
from pipeline.export.onnx_files import write_onnx
from pipeline.export.source import ExportSource

CPU = torch.device("cpu")
ONNX = "ONNX Runtime"
NAMES = ("fp32", "fp32-channels-last", "bf16-channels-last")
CLASSES, WARM_UP_CALLS = 80, 2


def random_detector(variant: str, side: int) -> LoadedDetector:
    """Detector with random weights."""
    torch.manual_seed(0)
    config = ModelConfig.variant(variant, num_classes=CLASSES, input_size=(side, side))
    names = tuple(str(label) for label in range(CLASSES))
    return LoadedDetector(Detector(config).eval(), names, tuple(range(CLASSES)), f"random {variant}", CPU)


def calls(variant: str, side: int, onnx: Path | None) -> dict[str, Callable[[], object]]:
    """Functions that detect in one image, by name."""
    images, sizes = torch.rand(1, 3, side, side), torch.tensor([[640, 480]])
    found: dict[str, Callable[[], object]] = {}
    with tempfile.TemporaryDirectory() as folder:
        file = onnx or Path(folder) / "detector.onnx"
        if onnx is None:
            write_onnx(ExportSource(random_detector(variant, side)), file)
        run = open_subject(str(file), device=CPU).run
        found[ONNX] = lambda: run(images, sizes)
    for name in NAMES:  # each with weights in its own layout
        loaded = random_detector(variant, side).deploy().with_precision(name)
        found[name] = torch.inference_mode()(lambda loaded=loaded: _detect(loaded, images, sizes))
    return found


def _detect(loaded: LoadedDetector, images: torch.Tensor, sizes: torch.Tensor) -> object:
    arithmetic = PRECISIONS[loaded.precision]
    with arithmetic.autocast(CPU):
        return predict_batch(loaded.detector, arithmetic.arrange(images), sizes)


def alternate(functions: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """CPU milliseconds of each call, all in turn, so that other load affects them equally."""
    spent: dict[str, list[float]] = {name: [] for name in functions}
    order = list(functions)
    for number in range(WARM_UP_CALLS + rounds):
        for name in order:
            start = time.process_time()
            functions[name]()
            if number >= WARM_UP_CALLS:
                spent[name].append(1e3 * (time.process_time() - start))
        order.reverse()
    return spent


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=["n", "s"])
    parser.add_argument("--size", type=int, default=640)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--onnx", type=Path, help="file to measure instead of a new one")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    print(f"torch {torch.__version__}, {args.threads} threads, {args.size} px, CPU ms: median (minimum)\n")
    print("| | " + " | ".join((ONNX, *NAMES)) + " | Best / ONNX Runtime |")
    print("|---" * (len(NAMES) + 3) + "|")
    for variant in args.variants:
        spent = alternate(calls(variant, args.size, args.onnx), args.rounds)
        cells = [f"{statistics.median(times):.0f} ({min(times):.0f})" for times in spent.values()]
        least = {name: min(times) for name, times in spent.items()}
        ratios = [min(least[name] for name in NAMES[:end]) / least[ONNX] for end in (2, 3)]
        print(f"| {variant.upper()} | {' | '.join(cells)} | {ratios[0]:.2f} in fp32, {ratios[1]:.2f} |", flush=True)


if __name__ == "__main__":
    main()
