"""Overhead of serving over the bare detector, and effect of batching.

    python -m benchmarks.serving runs/mine --num-images 48 --side 640

Every image is a JPEG of another size. "Direct" reads and detects in this process. The server is that of `jobs.serve`, with
and without batches; each client sends its next request after the response to the last one.
"""

import argparse
import http.client
import io
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

# For this process and those of the server: on few cores, spinning threads slow the others down.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import PIL.Image
import torch

from dfine_core import LoadedDetector, load
from pipeline.serve import deployment
from pipeline.serve.replica import ServeSettings

HOST, PORT = "127.0.0.1", 8765


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--num-images", type=int, default=48)
    parser.add_argument("--side", type=int, default=640, help="approximate side of an image in pixels")
    args = parser.parse_args()
    threads = len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    random = np.random.default_rng(0)
    images = [encoded_image(random, args.side) for _ in range(args.num_images)]
    bare = load(args.model).deploy()
    gpus = float(torch.cuda.is_available())
    source = str(Path(args.model).absolute())
    for batch in (8, 1):
        settings = ServeSettings(source=source, batch_size=batch, max_waiting=64, cpus=threads, gpus=gpus)
        deployment.start(settings, host=HOST, port=PORT)
        try:
            if batch > 1:
                compare(bare, images)
            for clients in (1, 4, 16):
                print(f"batches of at most {batch}, {clients} client(s): {served(images, clients)}", flush=True)
        finally:
            deployment.stop()


def compare(bare: LoadedDetector, images: list[bytes]) -> None:
    """Detect in every image directly and through the server, alternately, so that other load affects both."""
    for call in (bare, detect, bare, detect):
        call(images[0])
    pairs = [(_seconds(bare, content), _seconds(detect, content)) for content in images]
    print(f"direct: {_summary([direct for direct, _ in pairs])}")
    print(f"server: {_summary([through for _, through in pairs])}")
    print(f"median of the differences: {1e3 * statistics.median(through - direct for direct, through in pairs):.1f} ms")
    empty = [_seconds(lambda _: fetch("/health"), b"") for _ in images]
    print(f"a request for /health: {_summary(empty)}", flush=True)


def encoded_image(random: np.random.Generator, side: int) -> bytes:
    width, height = random.integers(side * 3 // 4, side * 5 // 4, 2)
    coarse = PIL.Image.fromarray(random.integers(0, 256, (height // 32, width // 32, 3), np.uint8))
    written = io.BytesIO()
    coarse.resize((int(width), int(height)), PIL.Image.Resampling.BICUBIC).save(written, "JPEG", quality=90)
    return written.getvalue()


def served(images: list[bytes], clients: int) -> str:
    before, started = forward(), time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        seconds = list(pool.map(lambda content: _seconds(detect, content), images))
    total_seconds = time.perf_counter() - started
    batches, num_images, inside = (b - a for a, b in zip(before, forward(), strict=True))
    each = f"{num_images / batches:.1f} images a batch, {1e3 * inside / num_images:.1f} ms of the detector for each"
    return f"{_summary(seconds, total_seconds)}; {each}"


def forward() -> tuple[float, float, float]:
    """Read the batches, images and seconds of the detector so far."""
    values = dict(line.rsplit(" ", 1) for line in fetch("/metrics").decode().splitlines() if line[0] != "#")
    names = ("detect_batch_images_count", "detect_batch_images_sum", "detect_forward_seconds_sum")
    batches, images, seconds = (float(values[name]) for name in names)
    return batches, images, seconds


def detect(content: bytes) -> None:
    fetch("/detect", content)


def fetch(path: str, content: bytes | None = None) -> bytes:
    connection = http.client.HTTPConnection(HOST, PORT, timeout=120)
    connection.request("POST" if content else "GET", path, content, {"Content-Type": "image/jpeg"} if content else {})
    response = connection.getresponse()
    body = response.read()
    connection.close()
    assert response.status == 200, body
    return body


def _seconds(call: Callable[[bytes], object], content: bytes) -> float:
    started = time.perf_counter()
    call(content)
    return time.perf_counter() - started


def _summary(seconds: list[float], total_seconds: float | None = None) -> str:
    rate = len(seconds) / (total_seconds or sum(seconds))
    slow = sorted(seconds)[int(len(seconds) * 0.95)]
    return f"{1e3 * statistics.median(seconds):.1f} ms median, {1e3 * slow:.0f} ms p95, {rate:.1f} images/s"


if __name__ == "__main__":
    main()
