"""Speed of a training step: images per second, GFLOP/s, memory, and the share of each part.

    python -m benchmarks.train_step --variant l --batch 8 --amp bf16 --channels-last
    python -m benchmarks.train_step --variant n --batch 4 --size 320 --device cpu --compare
    python -m benchmarks.train_step --variant n --batch 4 --size 320 --device cpu --against ../earlier --threads 1

`--baseline` trains with conventional box regression (`regression="direct"`: no edge distributions, no GO-LSD). `--compare` runs
both alternately in one process and prints what FDR and GO-LSD cost. `--against` alternates with the code of another commit in a
folder, in processes that run their own versions of this program, and compares CPU time.

Random images and weights. Step times are medians, from the batch on the device to the averaged weights. Shares come from
separate steps; an accelerator is synchronised after each part. GFLOP/s counts a multiply-add of convolutions, linear
layers and attention products as two, forward and backward. "Kept" is every tensor that autograd or the output holds between
forward and backward, weights and images aside.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.criterion import Clock, random_targets
from dfine_core import Criterion, Detector, ModelConfig
from dfine_core.config import VARIANTS, OptimizerConfig
from dfine_core.ema import ExponentialMovingAverage
from dfine_core.loss.matching import match
from dfine_core.optim import make_optimizer
from dfine_core.structures import DetectorOutput, Targets

PRECISIONS = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CLIP_NORM = 0.1
MIB = 2**20

ROOT = Path(__file__).parent.parent
# Steps of a commit, one for each line that it reads.
STEPS = """
import json, sys, time
import torch
from benchmarks.train_step import Settings, Training
settings, threads = json.loads(sys.argv[1])
torch.set_num_threads(threads)
training = Training(Settings(**settings), "fdr")
for _ in sys.stdin:
    start = time.process_time()
    training.step()
    print(time.process_time() - start, flush=True)
"""

Regression = Literal["fdr", "direct"]
Part = Callable[[str], AbstractContextManager[None]]  # wraps a named part of the step


@dataclass(frozen=True, kw_only=True)
class Settings:
    variant: str
    batch: int
    size: int
    classes: int
    objects: int
    device: str
    amp: str
    compile: bool
    channels_last: bool


def untimed(_: str) -> AbstractContextManager[None]:
    return nullcontext()


class Training:
    """Detector with everything that a step needs, and one batch."""

    def __init__(self, settings: Settings, regression: Regression):
        torch.manual_seed(0)
        self.settings = settings
        size = (settings.size, settings.size)
        config = ModelConfig.variant(
            settings.variant, num_classes=settings.classes, input_size=size, regression=regression
        )
        self.detector = Detector(config).to(settings.device).train()
        self.images = torch.rand(settings.batch, 3, *size, device=settings.device)
        counts = [settings.objects] * settings.batch
        targets = random_targets(counts, settings.classes, torch.Generator().manual_seed(0))
        self.targets = Targets.pack(targets, settings.classes, torch.device(settings.device))
        self.criterion = Criterion(config)
        self.optimizer = make_optimizer(self.detector, OptimizerConfig.for_variant(settings.variant), fused=True)
        self.scaler = torch.amp.GradScaler(settings.device, enabled=settings.amp == "fp16")
        self.ema = ExponentialMovingAverage(self.detector)
        if settings.channels_last:
            self.detector.to(memory_format=torch.channels_last)
            self.images = self.images.contiguous(memory_format=torch.channels_last)
        self.gflops = self._gflops()
        self.kept = self._kept_bytes()
        if settings.compile:
            for module in (self.detector.backbone, self.detector.encoder, self.detector.decoder):
                module.compile()

    def step(self, part: Part = untimed) -> None:
        with part("forward"):
            output = self._forward()
        with part("losses"):
            loss = self._loss(output)
        with part("backward"):
            self.scaler.scale(loss).backward()
        with part("optimiser"):
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.detector.parameters(), CLIP_NORM)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad(set_to_none=True)
        with part("ema"):
            self.ema.update(self.detector)

    def _forward(self) -> DetectorOutput:
        with torch.autocast(
            self.settings.device, dtype=PRECISIONS[self.settings.amp], enabled=self.settings.amp != "no"
        ):
            output: DetectorOutput = self.detector(self.images, self.targets)
        return output

    def _loss(self, output: DetectorOutput) -> Tensor:
        return torch.stack(list(self.criterion(output, self.targets).values())).sum()

    def _gflops(self) -> float:
        """Operations of forward and backward. Plain attention consists of products that the counter sees on every device."""
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            self._loss(self._forward()).backward()
        self.optimizer.zero_grad(set_to_none=True)
        return float(counter.get_total_flops()) / 1e9

    def _kept_bytes(self) -> int:
        """Bytes in memory between forward and backward, with every storage counted once."""
        storages: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor.detach()  # the graph must not hold its own output

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = self._forward()
            loss = self._loss(output)
        for tensor in tensors_in(output):
            keep(tensor)
        for tensor in (*self.detector.parameters(), *self.detector.buffers(), self.images):
            storages.pop(tensor.untyped_storage().data_ptr(), None)
        del loss  # kept the graph alive until here, so that no storage was reused
        return sum(storages.values())


def tensors_in(x: object) -> Iterator[Tensor]:
    if isinstance(x, Tensor):
        yield x
    elif is_dataclass(x):
        for field in fields(x):
            yield from tensors_in(getattr(x, field.name))


def step_seconds(training: Training, now: Clock) -> float:
    start = now()
    training.step()
    return now() - start


def part_seconds(training: Training, now: Clock) -> dict[str, float]:
    """One step, part by part; matching happens inside the criterion and is subtracted from "losses"."""
    spent: dict[str, float] = {}

    @contextmanager
    def part(name: str) -> Iterator[None]:
        start = now()
        yield
        spent[name] = now() - start

    def timed_match(*args: Any) -> Any:
        with part("matching"):
            return match(*args)

    with patch("dfine_core.loss.criterion.match", timed_match):
        training.step(part)
    spent["losses"] -= spent["matching"]
    return {name: spent[name] for name in ("forward", "matching", "losses", "backward", "optimiser", "ema")}


def peak_bytes(settings: Settings, regression: Regression) -> int:
    """Peak CUDA allocation of one step, with nothing else on the device."""
    training = Training(settings, regression)
    training.step()
    torch.cuda.reset_peak_memory_stats()
    training.step()
    return torch.cuda.max_memory_allocated()


@dataclass(frozen=True)
class Measurement:
    step: list[float]  # seconds
    parts: list[dict[str, float]]  # seconds

    @property
    def median(self) -> float:
        return statistics.median(self.step)


def measure(trainings: dict[Regression, Training], now: Clock, rounds: int) -> dict[Regression, Measurement]:
    """Measure all alternately, each first as often as last, so that other load affects them equally."""
    for training in trainings.values():
        for _ in range(2):
            training.step()  # warm-up
    found: dict[Regression, Measurement] = {name: Measurement([], []) for name in trainings}
    order = list(trainings)
    for _ in range(rounds):
        for name in order:
            found[name].step.append(step_seconds(trainings[name], now))
        for name in order:
            found[name].parts.append(part_seconds(trainings[name], now))
        order.reverse()
    return found


def against(settings: dict[str, dict[str, Any]], folders: dict[str, Path], threads: int, rounds: int) -> None:
    """Alternate steps of named settings, each with the code in a folder, and print their CPU time beside that of the first."""
    processes = {
        name: subprocess.Popen(
            [sys.executable, "-c", STEPS, json.dumps([settings[name], threads])],
            cwd=folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name, folder in folders.items()
    }
    spent: dict[str, list[float]] = {name: [] for name in processes}
    order = list(processes)
    for _ in range(rounds + 2):  # two to warm up
        for name in order:
            into, out = processes[name].stdin, processes[name].stdout
            assert into is not None
            assert out is not None
            into.write("\n")
            into.flush()
            if not (line := out.readline()):
                raise SystemExit(f"the process of {name!r} ended with code {processes[name].wait()}")
            spent[name].append(float(line))
        order.reverse()
    for process in processes.values():
        process.communicate()
    medians = {name: statistics.median(times[2:]) for name, times in spent.items()}
    first = next(iter(medians))
    for name, median in medians.items():
        least = min(spent[name][2:])
        print(
            f"{name:24} {1e3 * median:8.1f} ({1e3 * least:.1f}) ms of CPU; "
            f"{first} takes {medians[first] / median:.2f} ({min(spent[first][2:]) / least:.2f}) times as long"
        )


def report(name: str, training: Training, found: Measurement) -> None:
    rate, speed = training.settings.batch / found.median, training.gflops / found.median
    print(
        f"{name:6} {1e3 * found.median:8.1f} ms, {rate:.2f} images/s, {speed:.1f} GFLOP/s ({training.gflops:.1f} GFLOP)"
    )
    medians = {part: statistics.median(spent[part] for spent in found.parts) for part in found.parts[0]}
    whole = sum(medians.values())
    shares = (f"{part} {1e3 * spent:.1f} ms ({100 * spent / whole:.1f} %)" for part, spent in medians.items())
    print("       " + ", ".join(shares))
    print(f"       kept {training.kept / MIB:.1f} MiB")


def report_cost(fdr: Measurement, direct: Measurement, kept: tuple[int, int]) -> None:
    """Print the cost of FDR and GO-LSD. The fastest rounds are those least disturbed by other load."""
    pairs = sorted(a / b for a, b in zip(fdr.step, direct.step, strict=True))
    print("FDR and GO-LSD cost")
    print(f"  {100 * (fdr.median / direct.median - 1):+.1f} % time by medians,", end=" ")
    print(f"{100 * (min(fdr.step) / min(direct.step) - 1):+.1f} % by the fastest rounds")
    print(f"  (single rounds {100 * (pairs[0] - 1):+.1f} % to {100 * (pairs[-1] - 1):+.1f} %)")
    print(f"  {100 * (kept[0] / kept[1] - 1):+.1f} % of what is kept between forward and backward")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", default="l", choices=list(VARIANTS))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=640)
    parser.add_argument("--classes", type=int, default=80)
    parser.add_argument("--objects", type=int, default=20, help="boxes in each image")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--amp", default="no", choices=list(PRECISIONS))
    parser.add_argument("--compile", action="store_true", help="backbone, encoder and decoder")
    parser.add_argument("--channels-last", action="store_true")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--baseline", action="store_true", help="conventional box regression")
    what.add_argument("--compare", action="store_true", help="both, in turns")
    what.add_argument("--against", type=Path, metavar="FOLDER", help="in turns with another commit, in all its layouts")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--cpu-time", action="store_true", help="count CPU time: for a machine that others use, too")
    parser.add_argument("--threads", type=int, default=2, help="of the CPU")
    args = vars(parser.parse_args(argv))
    rounds, both, baseline, cpu_time = (args.pop(name) for name in ("rounds", "compare", "baseline", "cpu_time"))
    threads, other = args.pop("threads"), args.pop("against")
    torch.set_num_threads(threads)
    settings = Settings(**args)
    print(
        f"{settings}, torch {torch.__version__}, {torch.get_num_threads()} CPU threads, {'CPU' if cpu_time else 'wall'} time"
    )
    if other is not None:
        plain, layout = asdict(settings), {"channels_last": True}
        versions = {f"earlier, {settings.amp}": plain, f"this, {settings.amp}": plain}
        versions |= {
            f"this, {settings.amp}, NHWC": {**plain, **layout},
            "this, bf16, NHWC": {**plain, **layout, "amp": "bf16"},
        }
        against(versions, {name: other if name.startswith("earlier") else ROOT for name in versions}, threads, rounds)
        return

    regressions: list[Regression] = ["fdr", "direct"] if both else ["direct"] if baseline else ["fdr"]
    peaks = {regression: peak_bytes(settings, regression) for regression in regressions if settings.device == "cuda"}
    trainings = {regression: Training(settings, regression) for regression in regressions}
    found = measure(trainings, Clock(settings.device, cpu_time), rounds)
    for regression, training in trainings.items():
        report(regression, training, found[regression])
    if both:
        report_cost(found["fdr"], found["direct"], (trainings["fdr"].kept, trainings["direct"].kept))
    for regression, peak in peaks.items():
        print(f"{regression:6} peak of allocated CUDA memory {peak / MIB:.1f} MiB")
    print(f"peak resident memory of the process {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.1f} MiB")


if __name__ == "__main__":
    main()
