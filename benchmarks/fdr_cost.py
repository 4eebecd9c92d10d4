"""Cost of FDR and GO-LSD against direct box regression: CPU seconds, launches and memory of a training step.

    python -m benchmarks.fdr_cost
    python -m benchmarks.fdr_cost --variants n --size 320 --rounds 3

Both are the same network but for the last layers of the box heads, the quality estimators and two losses: edge distributions
of 4 (reg_max + 1) logits for a query and layer, or 4 offsets (`regression="direct"`). They run in turns in one process, on
one thread, and the cost is the ratio of the fastest rounds: those least disturbed by other load. "Kept" is what autograd and the
output hold between forward and backward, in float32 and, as on a GPU, under bf16 autocast; weights are counted apart. Launches
are counted as by `benchmarks.launches`, bf16, with the parts in which they differ.
"""

import argparse
from dataclasses import replace

import torch

from benchmarks.criterion import Clock
from benchmarks.launches import PARTS, count_step, training_state
from benchmarks.train_step import MIB, Regression, Settings, Training, measure

BOTH: tuple[Regression, Regression] = ("fdr", "direct")


def excess(pair: tuple[float, float]) -> str:
    """Both values, and how much the first exceeds the second."""
    return f"{pair[0]:,.1f} / {pair[1]:,.1f} ({100 * (pair[0] / pair[1] - 1):+.1f} %)"


def seconds(settings: Settings, rounds: int) -> tuple[str, str]:
    """Cells of the table: CPU milliseconds of a step, and MiB that it keeps."""
    trainings = {regression: Training(settings, regression) for regression in BOTH}
    found = measure(trainings, Clock("cpu", cpu_time=True), rounds)
    fdr, direct = (1e3 * min(found[regression].step) for regression in BOTH)
    return excess((fdr, direct)), kept(trainings)


def kept(trainings: dict[Regression, Training]) -> str:
    """Cell of the table: MiB between forward and backward."""
    fdr, direct = (trainings[regression].kept / MIB for regression in BOTH)
    return excess((fdr, direct))


def parameters(trainings: dict[Regression, Training]) -> str:
    """Cell of the table: millions of weights."""
    fdr, direct = (sum(p.numel() for p in trainings[regression].detector.parameters()) / 1e6 for regression in BOTH)
    return excess((fdr, direct))


def launches(variant: str) -> tuple[str, str]:
    """Cells of the table: launches of a step, and the parts that differ."""
    counters = [count_step(training_state(variant, "bf16", regression=regression)) for regression in BOTH]
    parts = [[sum(counter.launches[part].values()) for part in PARTS] for counter in counters]
    differing = (f"{part} {a - b:+}" for part, a, b in zip(PARTS, *parts, strict=True) if a != b)
    return excess((counters[0].total, counters[1].total)), ", ".join(differing)


def main() -> None:
    """Run the command."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--variants", nargs="+", default=["n", "s", "l"])
    arguments.add_argument("--size", type=int, default=640)
    arguments.add_argument("--batch", type=int, default=1)
    arguments.add_argument("--objects", type=int, default=20, help="boxes in each image")
    arguments.add_argument("--rounds", type=int, default=6)
    args = arguments.parse_args()
    torch.set_num_threads(1)
    print(
        f"torch {torch.__version__}; {args.batch} x {args.size} px, {args.objects} boxes an image; FDR + GO-LSD / direct\n"
    )
    print("| | CPU ms of a step | kept, MiB | kept in bf16, MiB | weights, M | launches | more launches in |")
    print("|---" * 7 + "|")
    for variant in args.variants:
        settings = Settings(
            variant=variant,
            batch=args.batch,
            size=args.size,
            classes=80,
            objects=args.objects,
            device="cpu",
            amp="no",
            compile=False,
            channels_last=False,
        )
        half = {regression: Training(replace(settings, amp="bf16"), regression) for regression in BOTH}
        cells = (kept(half), parameters(half), *launches(variant))
        del half
        print(f"| {variant.upper()} | " + " | ".join((*seconds(settings, args.rounds), *cells)) + " |", flush=True)


if __name__ == "__main__":
    main()
