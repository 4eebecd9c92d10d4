"""Measure latency and throughput of a trained or exported detector, from resized images to detections in pixels.

Reading and resizing images is not timed. Neither is copying them to the device, except for ONNX, whose inputs and outputs
are in main memory. Every call is synchronised.
"""

import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dfine_core import Detector, LoadedDetector, ModelConfig
from dfine_core.inference import predict_batch
from dfine_core.precision import PRECISIONS
from dfine_core.runtimes.files import PROGRAM_SUFFIXES, RuntimeFileError, open_program
from dfine_core.runtimes.program import OpenOptions
from pipeline.config import ConfigError
from pipeline.open_detector import open_detector

PERCENTILES = (50, 90, 99)
MODEL_PARTS = ("backbone", "encoder", "decoder")
WARM_UP_CALLS, WARM_UP_SECONDS = 5, 1.0  # both are reached before anything is timed


@dataclass(frozen=True)
class Subject:
    """Callable detector with the facts that a report needs."""

    name: str
    # Takes images [B, 3, H, W] float32 in 0..1 and sizes [B, 2], as `place` returns them; returns when the device has finished.
    run: Callable[[Any, Any], object]
    input_size: tuple[int, int]
    device: torch.device
    hardware: str
    runtime: str
    batch_size: int | None = None  # the only accepted one; None: any
    parameters: int | None = None
    gflops: float | None = None  # per image, counted by `gflops`
    placed: Callable[[Tensor], Any] | None = None  # moves an input to where it is taken; None: to `device`

    def place(self, tensor: Tensor) -> Any:
        """Input of `run` from a tensor in main memory."""
        return tensor.to(self.device) if self.placed is None else self.placed(tensor)


@dataclass(frozen=True)
class BenchmarkReport:
    """Measured speed of one detector."""

    name: str
    hardware: str
    runtime: str
    threads: int
    input_size: tuple[int, int]
    parameters: int | None
    gflops: float | None
    calls: int  # timed individually
    latency_ms: dict[str, float]  # p50, p90 and p99 of one image, or of the only accepted batch size
    images_per_second: dict[int, float | None]  # by batch size; None: out of memory

    def table(self) -> str:
        """Table for the console."""
        million = None if self.parameters is None else f"{self.parameters / 1e6:.2f} M"
        rows = [
            ("detector", self.name),
            ("on", f"{self.hardware}, {self.runtime}, {self.threads} threads"),
            ("input", f"{self.input_size[0]} x {self.input_size[1]}"),
            ("parameters", million or "unknown"),
            ("GFLOPs", "unknown" if self.gflops is None else f"{self.gflops:.2f}"),
            (
                "latency",
                ", ".join(f"{p} {ms:.2f} ms" for p, ms in self.latency_ms.items()) + f" over {self.calls} calls",
            ),
        ]
        for batch_size, rate in self.images_per_second.items():
            rows.append((f"batch {batch_size}", "out of memory" if rate is None else f"{rate:.1f} images/s"))
        return "\n".join(f"{name:12}{value}" for name, value in rows)

    def as_json(self) -> dict[str, Any]:
        """Every field, as plain values."""
        return asdict(self)


def open_subject(source: str, *, device: torch.device, precision: str = "fp32") -> Subject:
    """Open a trained or exported detector for `measure`.

    Args:
        source: an exported file of `dfine_core.runtimes`, or any source of `open_detector`.

    Raises:
        ConfigError: the source cannot be opened, or not in this precision.
    """
    if source.endswith(PROGRAM_SUFFIXES):
        if precision != "fp32":
            raise ConfigError(
                f"{source}: the precision of an exported file is fixed: leave out --precision {precision}"
            )
        return _file_subject(source, device)
    loaded = open_detector(source, str(device))
    counts = gflops(loaded.config)
    return replace(detector_subject(loaded, precision=precision), gflops=sum(counts[part] for part in MODEL_PARTS))


def detector_subject(loaded: LoadedDetector, *, precision: str = "fp32") -> Subject:
    """Wrap a loaded detector for `measure`. The detector is deployed in place."""
    config, device = loaded.config, loaded.device
    loaded = loaded.deploy().with_precision(precision)
    arithmetic = PRECISIONS[loaded.precision]

    @torch.inference_mode()
    def run(images: Tensor, sizes: Tensor) -> object:
        with arithmetic.autocast(device):
            detections, _ = predict_batch(loaded.detector, arithmetic.arrange(images), sizes)
        _synchronize(device)
        return detections

    return Subject(
        name=loaded.origin,
        run=run,
        input_size=config.input_size,
        device=device,
        hardware=hardware_name(device),
        runtime=f"torch {torch.__version__} {loaded.precision}",
        parameters=sum(parameter.numel() for parameter in loaded.detector.parameters()),
    )


def measure(
    subject: Subject, *, batch_sizes: Sequence[int], calls: int = 200, seconds: float = 10.0
) -> BenchmarkReport:
    """Measure latency, and throughput at several batch sizes.

    Args:
        batch_sizes: batch sizes whose throughput is measured.
        calls: calls timed individually; fewer if they would take longer than `seconds`.
        seconds: time limit for the latency, and for each batch size.
    """
    # 1. Latency of a single image, or of the only accepted batch size.
    latencies = _time_calls(subject, subject.batch_size or 1, calls, seconds)

    # 2. Throughput by batch size. One that does not fit in memory is reported, the others still count.
    rates: dict[int, float | None] = {}
    for batch_size in [subject.batch_size] if subject.batch_size is not None else batch_sizes:
        try:
            durations = _time_calls(subject, batch_size, calls, seconds / 3)
            rates[batch_size] = batch_size * len(durations) / float(durations.sum())
        except torch.OutOfMemoryError:
            rates[batch_size] = None
    return BenchmarkReport(
        name=subject.name,
        hardware=subject.hardware,
        runtime=subject.runtime,
        threads=torch.get_num_threads(),
        input_size=subject.input_size,
        parameters=subject.parameters,
        gflops=subject.gflops,
        calls=len(latencies),
        latency_ms={f"p{p}": 1000 * float(np.percentile(latencies, p)) for p in PERCENTILES},
        images_per_second=rates,
    )


def _time_calls(subject: Subject, batch_size: int, calls: int, seconds: float) -> NDArray[np.float64]:
    """Duration of each call in seconds, after a warm-up."""
    images = subject.place(torch.rand(batch_size, 3, *subject.input_size))
    sizes = subject.place(torch.tensor([[640, 480]] * batch_size))
    warm_until, warm_up_calls = time.perf_counter() + min(WARM_UP_SECONDS, seconds), 0
    while warm_up_calls < WARM_UP_CALLS or time.perf_counter() < warm_until:
        subject.run(images, sizes)
        warm_up_calls += 1
    durations: list[float] = []
    until = time.perf_counter() + seconds
    while len(durations) < calls and (not durations or time.perf_counter() < until):
        started_at = time.perf_counter()
        subject.run(images, sizes)
        durations.append(time.perf_counter() - started_at)
    return np.array(durations)


@torch.no_grad()
def gflops(config: ModelConfig) -> dict[str, float]:
    """GFLOPs per image: convolutions and linear layers of each part, and the products inside attention.

    A multiply-add counts as two operations. This is the convention of the published numbers, which are the sum of the parts;
    norms, activations, softmax and the sampling of deformable attention are left out by both.
    """
    detector = Detector(config).deploy()
    counter = FlopCounterMode(display=False, depth=2)
    # The plain implementation computes attention as two batched products, which the counter sees on every device.
    with counter, sdpa_kernel(SDPBackend.MATH):
        detector(torch.zeros(1, 3, *config.input_size))
    counts = {
        module: {str(operator).removeprefix("aten."): n / 1e9 for operator, n in operators.items()}
        for module, operators in counter.get_flop_counts().items()
    }
    by_part = {part: counts[f"Detector.{part}"] for part in MODEL_PARTS}
    return {part: sum(n for operator, n in by_part[part].items() if operator != "bmm") for part in MODEL_PARTS} | {
        "attention": sum(operators.get("bmm", 0.0) for operators in by_part.values())
    }


def hardware_name(device: torch.device) -> str:
    """Model name of the GPU or CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(": ", 1)[1] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _file_subject(source: str, device: torch.device) -> Subject:
    try:
        program = open_program(source, OpenOptions(threads=torch.get_num_threads(), device=str(device)))
    except RuntimeFileError as error:
        raise ConfigError(f"{error}") from None
    height, width = program.input_size
    if height is None or width is None:
        raise ConfigError(
            f"{source}: takes images of any size, so its speed is that of no single one: fix it in the export"
        )

    def run(images: Any, sizes: Any) -> object:
        outputs = program.run(images, sizes)
        program.wait()
        return outputs

    return Subject(
        name=source,
        run=run,
        input_size=(height, width),
        device=device,
        hardware=hardware_name(torch.device(program.device)),
        runtime=program.runtime,
        batch_size=program.batch_size,
        parameters=program.parameters,
        placed=lambda tensor: program.place(tensor.numpy()),
    )
