"""How fast a detector is, trained or exported: from stretched images to detections in pixels, all on its device.

Reading and stretching images is not in it, nor is their way to the device, except for ONNX, whose inputs and outputs lie in
main memory. Every call is waited for.
"""

import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dfine_core import Detector, LoadedDetector, ModelConfig
from dfine_core.inference import predict_batch
from pipeline.config import ConfigError
from pipeline.exported_files import SUFFIXES, open_exported
from pipeline.open_detector import open_detector

Precision = Literal["fp32", "bf16", "fp16"]
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
PERCENTILES = (50, 90, 99)
PARTS = ("backbone", "encoder", "decoder")
WARM_CALLS, WARM_SECONDS = 5, 1.0  # both, before anything is timed


@dataclass(frozen=True)
class Subject:
    """Something that detects."""

    name: str
    run: Callable[
        [Tensor, Tensor], object
    ]  # images [B, 3, H, W] float32 in 0..1 and sizes [B, 2]; waits until it is done
    input_size: tuple[int, int]
    device: torch.device
    hardware: str
    runtime: str
    batch: int | None = None  # the only one that it takes; None: any
    parameters: int | None = None
    gflops: float | None = None  # of one image, as `gflops` counts


@dataclass(frozen=True)
class Report:
    name: str
    hardware: str
    runtime: str
    threads: int
    input_size: tuple[int, int]
    parameters: int | None
    gflops: float | None
    calls: int  # that were timed one by one
    latency_ms: dict[str, float]  # of one image, or of the only batch: p50, p90, p99
    images_per_second: dict[int, float | None]  # by batch size; None: out of memory

    def table(self) -> str:
        million = None if self.parameters is None else f"{self.parameters / 1e6:.2f} M"
        rows = [
            ("detector", self.name),
            ("on", f"{self.hardware}, {self.runtime}, {self.threads} threads"),
            ("input", f"{self.input_size[0]} x {self.input_size[1]}"),
            ("parameters", million or "not known"),
            ("GFLOPs", "not known" if self.gflops is None else f"{self.gflops:.2f}"),
            ("latency", ", ".join(f"{p} {ms:.2f} ms" for p, ms in self.latency_ms.items()) + f" of {self.calls} calls"),
        ]
        for batch, rate in self.images_per_second.items():
            rows.append((f"batch {batch}", "out of memory" if rate is None else f"{rate:.1f} images/s"))
        return "\n".join(f"{name:12}{value}" for name, value in rows)

    def plain(self) -> dict[str, Any]:
        return asdict(self)


def open_subject(source: str, *, device: torch.device, precision: Precision = "fp32") -> Subject:
    """
    Args:
        source: an exported `.onnx` or `.pt2`, or whatever `open_detector` opens.

    Raises:
        ConfigError: it cannot be opened, or not in this precision.
    """
    if source.endswith(SUFFIXES):
        if precision != "fp32":
            raise ConfigError(f"{source}: an exported file has its own precision, leave out --precision {precision}")
        return _of_file(source, device)
    loaded = open_detector(source, str(device))
    counted = gflops(loaded.config)
    return replace(of_detector(loaded, precision=precision), gflops=sum(counted[part] for part in PARTS))


def of_detector(loaded: LoadedDetector, *, precision: Precision = "fp32") -> Subject:
    """A detector as it is delivered; it is deployed, in place."""
    config, device = loaded.config, loaded.device
    detector = loaded.deploy().detector

    @torch.inference_mode()
    def run(images: Tensor, sizes: Tensor) -> object:
        with torch.autocast(device.type, AUTOCAST.get(precision), enabled=precision in AUTOCAST):
            found, _ = predict_batch(detector, images, sizes)
        _wait(device)
        return found

    return Subject(
        name=loaded.origin,
        run=run,
        input_size=config.input_size,
        device=device,
        hardware=hardware_name(device),
        runtime=f"torch {torch.__version__} {precision}",
        parameters=sum(parameter.numel() for parameter in detector.parameters()),
    )


def measure(subject: Subject, *, batches: Sequence[int], calls: int = 200, seconds: float = 10.0) -> Report:
    """
    Args:
        batches: sizes to find the throughput of.
        calls: timed one by one; fewer where they would take longer than `seconds`.
        seconds: at most, for the latency and for each batch size.
    """
    single = _seconds_of_calls(subject, subject.batch or 1, calls, seconds)
    rates: dict[int, float | None] = {}
    for batch in [subject.batch] if subject.batch is not None else batches:
        try:
            took = _seconds_of_calls(subject, batch, calls, seconds / 3)
            rates[batch] = batch * len(took) / float(took.sum())
        except torch.OutOfMemoryError:
            rates[batch] = None
    return Report(
        name=subject.name,
        hardware=subject.hardware,
        runtime=subject.runtime,
        threads=torch.get_num_threads(),
        input_size=subject.input_size,
        parameters=subject.parameters,
        gflops=subject.gflops,
        calls=len(single),
        latency_ms={f"p{p}": 1000 * float(np.percentile(single, p)) for p in PERCENTILES},
        images_per_second=rates,
    )


def _seconds_of_calls(
    subject: Subject, batch: int, calls: int, seconds: float
) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Of each call, after a warm-up."""
    images = torch.rand(batch, 3, *subject.input_size).to(subject.device)
    sizes = torch.tensor([[640, 480]] * batch).to(subject.device)
    warm_until, warm = time.perf_counter() + min(WARM_SECONDS, seconds), 0
    while warm < WARM_CALLS or time.perf_counter() < warm_until:
        subject.run(images, sizes)
        warm += 1
    took: list[float] = []
    until = time.perf_counter() + seconds
    while len(took) < calls and (not took or time.perf_counter() < until):
        started_at = time.perf_counter()
        subject.run(images, sizes)
        took.append(time.perf_counter() - started_at)
    return np.array(took)


@torch.no_grad()
def gflops(config: ModelConfig) -> dict[str, float]:
    """Of one image: convolutions and linear layers of each part, and the products inside attention.

    A multiply-add counts as two operations. This is the convention of the published numbers, which are the sum of the parts;
    norms, activations, softmax and the sampling of deformable attention are counted by neither.
    """
    detector = Detector(config).deploy()
    counter = FlopCounterMode(display=False, depth=2)
    # The plain implementation makes attention of two batched products, which the counter sees on every device.
    with counter, sdpa_kernel(SDPBackend.MATH):
        detector(torch.zeros(1, 3, *config.input_size))
    counts = {
        module: {str(operator).removeprefix("aten."): n / 1e9 for operator, n in operators.items()}
        for module, operators in counter.get_flop_counts().items()
    }
    spent = {part: counts[f"Detector.{part}"] for part in PARTS}
    return {part: sum(n for operator, n in spent[part].items() if operator != "bmm") for part in PARTS} | {
        "attention": sum(operators.get("bmm", 0.0) for operators in spent.values())
    }


def hardware_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(": ", 1)[1] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _of_file(source: str, device: torch.device) -> Subject:
    opened = open_exported(source, device)

    def run(images: Tensor, sizes: Tensor) -> object:
        found = opened.run(images, sizes)
        _wait(opened.device)
        return found

    return Subject(
        name=source,
        run=run,
        input_size=opened.input_size,
        device=opened.device,
        hardware=hardware_name(opened.computes_on),
        runtime=opened.runtime,
        batch=opened.batch,
        parameters=opened.parameters,
    )
