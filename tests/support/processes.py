"""Processes of tests: waiting for them, killing them, and one thread for arithmetic that must repeat."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute with one thread, as the workers do: another number sums in another order, which 20 steps make visible."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def start_command(log: Path, module: str, *arguments: str) -> subprocess.Popen[str]:
    """Start a command in a process group of its own, which starts its own Ray; its output is added to the log."""
    environment = {**os.environ, "RAY_TMPDIR": "/tmp"}
    environment.pop("RAY_ADDRESS", None)
    command = [sys.executable, "-m", module, *arguments]
    with log.open("a") as file:
        return subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str], log: Path) -> None:
    until = time.monotonic() + 300
    while not condition():
        assert process.poll() is None, log.read_text()[-4000:]
        assert time.monotonic() < until, log.read_text()[-4000:]
        time.sleep(0.1)


def wait_until(condition: Callable[[], bool], seconds: float = 10) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, f"not within {seconds} s"
        time.sleep(0.01)


def descendants(pid: int) -> dict[int, str]:
    """Process ids below one, with their titles."""
    parents, titles = {}, {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(path.name)] = int((path / "stat").read_text().rpartition(") ")[2].split()[1])
            titles[int(path.name)] = (path / "cmdline").read_text().replace("\0", " ")
        except OSError:
            continue
    found = {pid}
    while more := {p for p, parent in parents.items() if parent in found} - found:
        found |= more
    return {p: titles.get(p, "") for p in found}  # one may end while it is read


def kill_driver(driver: subprocess.Popen[str]) -> None:
    below = descendants(driver.pid)
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    for pid in below:  # and the machine that it ran on
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
