"""Exported file in a process of its own, so that a crash, an endless call or a leak of its runtime is a finding about it."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Self

import numpy as np
import psutil
from numpy.typing import NDArray

from dfine_core.runtimes import worker
from dfine_core.runtimes.program import OpenOptions, Outputs
from pipeline.errors import UserError

POLL_S = 0.02


@dataclass(frozen=True)
class Limits:
    """Limits of one process."""

    open_s: float = 600.0
    call_s: float = 600.0
    memory_bytes: int = 12 * 2**30  # resident, which is what runs a machine out of memory


LIMITS, OPTIONS = Limits(), OpenOptions()


class ProgramError(UserError):
    """An exported file that its runtime does not open or run; the message is the reason alone."""


class IsolatedProgram:
    """Opened file; a context manager whose end stops the process.

    Attributes:
        runtime, input_size, batch_size, description: as those of `Program`.
    """

    def __init__(self, opener: str, path: Path, options: OpenOptions = OPTIONS, limits: Limits = LIMITS) -> None:
        """Start the process and open the file.

        Args:
            opener: module:function of the type `dfine_core.runtimes.files.Opener`.

        Raises:
            ProgramError: the file cannot be opened.
        """
        self.limits = limits
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  # closed by `close`
        ours, theirs = socket.socketpair()
        command = [sys.executable, "-m", worker.__name__, str(theirs.fileno())]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        self._process = subprocess.Popen(
            command,
            pass_fds=[theirs.fileno()],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=self._errors,
            stderr=self._errors,
        )
        theirs.close()
        self._connection = Connection(ours.detach())
        try:
            facts, _ = self._ask({"opener": opener, "path": str(path), "options": asdict(options)}, limits.open_s)
        except BaseException:
            self.close()
            raise
        self.runtime: str = facts["runtime"]
        self.input_size: tuple[int | None, int | None] = (facts["input_size"][0], facts["input_size"][1])
        self.batch_size: int | None = facts["batch_size"]
        self.description: dict[str, Any] = facts["description"]

    def __call__(self, images: NDArray[np.float32], sizes: NDArray[np.int64]) -> Outputs:
        """Detect: labels [B, R], boxes [B, R, 4] and scores [B, R]; arguments as those of `Program.run`.

        Raises:
            ProgramError: the runtime raised an error, crashed, or exceeded a limit.
        """
        _, arrays = self._ask({"calls": 0}, self.limits.call_s, images=images, sizes=sizes)
        return arrays["labels"], arrays["boxes"], arrays["scores"]

    def seconds(self, images: NDArray[np.float32], sizes: NDArray[np.int64], calls: int) -> NDArray[np.float64]:
        """Duration of so many calls, measured in the process after a warm-up.

        Raises:
            ProgramError: as of a call.
        """
        _, arrays = self._ask({"calls": calls}, self.limits.call_s, images=images, sizes=sizes)
        return arrays["seconds"]

    def close(self) -> None:
        """Stop the process."""
        self._connection.close()
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        self._errors.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(
        self, message: dict[str, Any], limit_s: float, **arrays: NDArray[Any]
    ) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
        try:
            worker.send(self._connection, message, **arrays)
            self._wait(limit_s)
            answer, found = worker.receive(self._connection)
        except (EOFError, OSError):
            raise ProgramError(self._end()) from None
        if answer["failure"]:
            raise ProgramError(answer["failure"])
        return answer, found

    def _wait(self, limit_s: float) -> None:
        """Wait for an answer, or for the end of the process, within the limits of time and memory."""
        process = psutil.Process(self._process.pid)
        until = time.monotonic() + limit_s
        while not self._connection.poll(POLL_S):
            try:
                used = process.memory_info().rss
            except psutil.Error:
                continue  # it has ended, which the next poll finds
            if used > self.limits.memory_bytes:
                self._process.kill()
                limit = self.limits.memory_bytes / 2**30
                raise ProgramError(
                    f"its process was stopped at {used / 2**30:.1f} GiB of memory (limit {limit:.1f} GiB)"
                )
            if time.monotonic() > until:
                self._process.kill()
                raise ProgramError(f"no result within {limit_s:g} s")

    def _end(self) -> str:
        """Reason of a process that ended by itself."""
        code = self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
        return f"its process ended {how}" + (f": {lines[-1]}" if lines else "")
