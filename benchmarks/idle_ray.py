"""Processes of a training on one machine: CPU and memory that Ray takes besides the worker, and the time to the first step.

    python -m benchmarks.idle_ray

The same training of one worker runs once in one process and once on Ray. After the first step and a pause, all processes below
the command are watched for a while. Shared memory is divided by its users (PSS). A process that ran a data task while it was
watched counts as one, others by their title.
"""

import argparse
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import yaml

WORK = ("ray::RayTrainWorker", "ray::MapBatches")  # titles of processes that train or decode
START_SECONDS = 300
SETTLE_SECONDS = 10


@dataclass
class Watched:
    """One process, from the first time it was seen to the last."""

    titles: set[str] = field(default_factory=set)
    first_cpu_s: float | None = None
    last_cpu_s: float = 0.0
    pss: int = 0  # bytes
    nice: int = 0

    @property
    def name(self) -> str:
        """Title without arguments; that of its work, if it had any."""
        at_work = [title for title in self.titles if title.startswith(WORK)]
        return min(at_work or self.titles)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=30.0, help="how long the processes are watched")
    parser.add_argument("--side", type=int, default=320, help="input size; images are as large")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root)
        drawing = ["--images", "64", "--image-side", str(args.side), "--split", "drawn", "--out", f"{folder}/shards"]
        subprocess.run([sys.executable, "-m", "jobs.prepare", "synthetic", *drawing], check=True, capture_output=True)
        content = {
            "storage": str(folder / "runs"),
            "data": {"train": str(folder / "shards")},
            "model": {"variant": "n", "input_size": [args.side, args.side]},
            "schedule": {"steps": 10_000, "global_batch_size": 4, "no_aug_epochs": 0},
        }
        (folder / "run.yaml").write_text(yaml.safe_dump(content))
        (folder / "ray.yaml").write_text(yaml.safe_dump({"workers": 1, "gpus_per_worker": 0}))
        for name, flags in (("one process", []), ("Ray, one worker", ["--cluster", str(folder / "ray.yaml")])):
            print(f"\n{name}")
            measure(folder, name.replace(" ", "-").replace(",", ""), flags, args.seconds)


def measure(folder: Path, name: str, flags: list[str], seconds: float) -> None:
    """Start a training, watch it, stop it, and print what its processes took."""
    log = folder / f"{name}.log"
    command = [sys.executable, "-m", "jobs.train", str(folder / "run.yaml"), "--name", name, *flags]
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    started_at = time.monotonic()
    with log.open("w") as out:
        process = subprocess.Popen(command, env=environment, stdout=out, stderr=subprocess.STDOUT)
    try:
        while not log.read_text():
            wait(process, log, started_at)
        first_line = time.monotonic() - started_at
        while not (said := re.search(r"first step .*", log.read_text())):
            wait(process, log, started_at)
        print(f"first line after {first_line:.1f} s, first step after {time.monotonic() - started_at:.1f} s")
        print(said.group())
        time.sleep(SETTLE_SECONDS)
        report(watch(process.pid, seconds), seconds)
    finally:
        stop(process)


def wait(process: "subprocess.Popen[bytes]", log: Path, started_at: float) -> None:
    """Sleep a little; end the benchmark if the training ended or takes too long to start."""
    if process.poll() is not None or time.monotonic() - started_at > START_SECONDS:
        sys.exit(log.read_text())
    time.sleep(0.05)


def watch(pid: int, seconds: float) -> dict[int, Watched]:
    """Look at a process and those below it once a second."""
    found: dict[int, Watched] = defaultdict(Watched)
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        parent = psutil.Process(pid)
        for process in [parent, *parent.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                look(process, found[process.pid])
        time.sleep(1)
    return {pid: watched for pid, watched in found.items() if watched.titles}


def look(process: psutil.Process, watched: Watched) -> None:
    times = process.cpu_times()
    watched.titles.add(title_of(process))
    watched.last_cpu_s = times.user + times.system
    if watched.first_cpu_s is None:
        watched.first_cpu_s = watched.last_cpu_s
        watched.pss = process.memory_full_info().pss  # once: the kernel takes long to count it
    watched.nice = process.nice()


def title_of(process: psutil.Process) -> str:
    words = process.cmdline() or [process.name()]
    if words[0].startswith("ray"):
        return words[0].partition("(")[0].strip()
    scripts = [Path(word).name for word in words[:6] if word.endswith(".py") or word.startswith("jobs.")]
    return scripts[0] if scripts else Path(words[0]).name


def report(found: dict[int, Watched], seconds: float) -> None:
    """Print one line for each kind of process, and the sum of those that do no work."""
    kinds: dict[str, list[Watched]] = defaultdict(list)
    for watched in found.values():
        kinds[watched.name].append(watched)
    idle = [0, 0.0, 0.0]
    for name, group in sorted(kinds.items(), key=lambda kind: -sum(map(share_of, kind[1]))):
        share = sum(map(share_of, group)) / seconds
        pss = sum(watched.pss for watched in group) / 2**30
        nice = sorted({watched.nice for watched in group})
        print(f"  {len(group):3} {name:44} {share:7.1%} of a core {pss:6.2f} GiB  nice {', '.join(map(str, nice))}")
        if not name.startswith((*WORK, "jobs.train")):
            idle = [idle[0] + len(group), idle[1] + share, idle[2] + pss]
    print(f"  {idle[0]:3} besides the command, the worker and data tasks {idle[1]:7.1%} of a core {idle[2]:6.2f} GiB")


def share_of(watched: Watched) -> float:
    return watched.last_cpu_s - (watched.first_cpu_s or 0.0)


def stop(process: "subprocess.Popen[bytes]") -> None:
    """Kill the command and everything below it."""
    below = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    process.send_signal(signal.SIGKILL)
    process.wait()
    for child in below:
        with suppress(psutil.NoSuchProcess):
            child.kill()


if __name__ == "__main__":
    main()
