"""What serving costs beside the bare detector, and what batches bring.

    python -m benchmarks.serving runs/mine --pictures 48 --side 640

Every picture is a JPEG of its own size. "Direct" reads and detects in this process, one at a time. The server is the one of
`jobs.serve`, asked by clients that each wait for their answer; once with batches and once without.
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

import numpy as np
import PIL.Image
import torch

from dfine_core import load
from pipeline.delivery import serving
from pipeline.delivery.service import ServeSettings

HOST, PORT = "127.0.0.1", 8765


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--pictures", type=int, default=48)
    parser.add_argument("--side", type=int, default=640, help="about, of a picture")
    args = parser.parse_args()
    threads = len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    random = np.random.default_rng(0)
    pictures = [picture(random, args.side) for _ in range(args.pictures)]
    print(f"direct: {direct(args.model, pictures)}", flush=True)
    gpus = float(torch.cuda.is_available())
    for batch in (1, 8):
        settings = ServeSettings(
            source=str(Path(args.model).absolute()), batch=batch, max_waiting=64, cpus=threads, gpus=gpus
        )
        serving.start(settings, host=HOST, port=PORT)
        try:
            for clients in (1, 4, 16):
                print(
                    f"server, batches of at most {batch}, {clients} client(s): {served(pictures, clients)}", flush=True
                )
        finally:
            serving.stop()


def picture(random: np.random.Generator, side: int) -> bytes:
    width, height = random.integers(side * 3 // 4, side * 5 // 4, 2)
    coarse = PIL.Image.fromarray(random.integers(0, 256, (height // 32, width // 32, 3), np.uint8))
    written = io.BytesIO()
    coarse.resize((int(width), int(height)), PIL.Image.Resampling.BICUBIC).save(written, "JPEG", quality=90)
    return written.getvalue()


def direct(model: str, pictures: list[bytes]) -> str:
    detector = load(model).deploy()
    detector(pictures[:2])
    return _told([_seconds(detector, content) for content in pictures])


def served(pictures: list[bytes], clients: int) -> str:
    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(ask, pictures[:clients]))
        started = time.perf_counter()
        seconds = list(pool.map(lambda content: _seconds(ask, content), pictures))
        return _told(seconds, time.perf_counter() - started)


def ask(content: bytes) -> None:
    connection = http.client.HTTPConnection(HOST, PORT, timeout=120)
    connection.request("POST", "/detect", content, {"Content-Type": "image/jpeg"})
    response = connection.getresponse()
    assert response.status == 200, response.read()
    response.read()
    connection.close()


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
