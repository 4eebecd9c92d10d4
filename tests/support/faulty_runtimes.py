"""Runtimes for the gate's processes, which import them by name: one that works, and others that fail as runtimes do."""

import os
import signal
import time
from typing import Any

import numpy as np

from dfine_core.runtimes.program import OpenOptions, Program


def works(_: str, options: OpenOptions) -> Program:
    def run(images: Any, sizes: Any) -> Any:
        boxes = np.tile(sizes[:, None].astype(np.float32), (1, 1, 2))  # [B, 1, 4]: the whole image
        return np.ones((len(images), 1), np.int64), boxes, images.mean((1, 2, 3))[:, None]

    runtime = f"sums with {options.threads} threads in {options.precision}"
    return Program(run, (8, 8), runtime, description={"names": ["cat"]}, batch_size=options.threads)


def fails_to_open(*_: object) -> Program:
    raise RuntimeError("no kernel for this\nand more")


def _running(run: Any) -> Program:
    return Program(run, (8, 8), "faulty")


def crashes(*_: object) -> Program:
    return _running(lambda *_: os.kill(os.getpid(), signal.SIGSEGV))


def ends(*_: object) -> Program:
    def run(*_: object) -> None:
        os.write(2, b"out of handles\n")
        os._exit(7)

    return _running(run)


def hangs(*_: object) -> Program:
    return _running(lambda *_: time.sleep(1000))


def grows(*_: object) -> Program:
    kept = []

    def run(*_: object) -> None:
        while True:
            kept.append(np.ones(2**22))  # 32 MiB
            time.sleep(0.01)

    return _running(run)


def returns_too_few(*_: object) -> Program:
    return _running(lambda images, _: [np.ones((len(images), 1))])
