"""What serving costs beside the bare detector, and what batches bring.

    python -m benchmarks.serving runs/mine --num-images 48 --side 640

Every picture is a JPEG of its own size. "Direct" reads and detects in this process. The server is the one of `jobs.serve`,
asked by clients that each wait for their answer, with batches and without.
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

os.environ.setdefault(
    "OMP_WAIT_POLICY", "PASSIVE"
)  # of this process and the server's: on few cores idle threads are in the way

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
    parser.add_argument("--side", type=int, default=640, help="about, of a picture")
    args = parser.parse_args()
    threads = len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    random = np.random.default_rng(0)
    pictures = [picture(random, args.side) for _ in range(args.num_images)]
    bare = load(args.model).deploy()
    gpus = float(torch.cuda.is_available())
    source = str(Path(args.model).absolute())
    for batch in (8, 1):
        settings = ServeSettings(source=source, batch_size=batch, max_waiting=64, cpus=threads, gpus=gpus)
        deployment.start(settings, host=HOST, port=PORT)
        try:
            if batch > 1:
                compare(bare, pictures)
            for clients in (1, 4, 16):
                print(f"batches of at most {batch}, {clients} client(s): {served(pictures, clients)}", flush=True)
        finally:
            deployment.stop()


def compare(bare: LoadedDetector, pictures: list[bytes]) -> None:
    """Every picture once directly, once through the server, in turns: whatever else the machine does slows both."""
    for call in (bare, ask, bare, ask):
        call(pictures[0])
    pairs = [(_seconds(bare, content), _seconds(ask, content)) for content in pictures]
    print(f"direct: {_told([direct for direct, _ in pairs])}")
    print(f"server: {_told([through for _, through in pairs])}")
    print(f"median of the differences: {1e3 * statistics.median(through - direct for direct, through in pairs):.1f} ms")
    empty = [_seconds(lambda _: fetch("/health"), b"") for _ in pictures]
    print(f"a request for /health: {_told(empty)}", flush=True)


def picture(random: np.random.Generator, side: int) -> bytes:
    width, height = random.integers(side * 3 // 4, side * 5 // 4, 2)
    coarse = PIL.Image.fromarray(random.integers(0, 256, (height // 32, width // 32, 3), np.uint8))
    written = io.BytesIO()
    coarse.resize((int(width), int(height)), PIL.Image.Resampling.BICUBIC).save(written, "JPEG", quality=90)
    return written.getvalue()


def served(pictures: list[bytes], clients: int) -> str:
    before, started = forward(), time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        seconds = list(pool.map(lambda content: _seconds(ask, content), pictures))
    together = time.perf_counter() - started
    batches, images, inside = (b - a for a, b in zip(before, forward(), strict=True))
    each = f"{images / batches:.1f} images a batch, {1e3 * inside / images:.1f} ms of the detector for each"
    return f"{_told(seconds, together)}; {each}"


def forward() -> tuple[float, float, float]:
    """Batches, images and seconds in the detector so far."""
    values = dict(line.rsplit(" ", 1) for line in fetch("/metrics").decode().splitlines() if line[0] != "#")
    names = ("detect_batch_images_count", "detect_batch_images_sum", "detect_forward_seconds_sum")
    batches, images, seconds = (float(values[name]) for name in names)
    return batches, images, seconds


def ask(content: bytes) -> None:
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


def _told(seconds: list[float], together: float | None = None) -> str:
    rate = len(seconds) / (together or sum(seconds))
    slow = sorted(seconds)[int(len(seconds) * 0.95)]
    return f"{1e3 * statistics.median(seconds):.1f} ms median, {1e3 * slow:.0f} ms p95, {rate:.1f} images/s"


if __name__ == "__main__":
    main()
