"""Prove and measure this project on the GPU of this machine, in ten minutes, with one command.

    python -m benchmarks.gpu_proof                     # writes gpu_proof/rows.json and gpu_proof/table.md
    python -m benchmarks.gpu_proof --cpu               # the same code, small, on a CPU: what a test runs
    python -m benchmarks.gpu_proof --sections golden sampling

Every section is a process of its own with a time limit, and every row is kept as soon as it is there: a section that fails or
hangs becomes a row that names the reason, and costs no other one. Sections are in `gpu_sections.py`. After `--minutes`, those
that have not begun are recorded as skipped.
"""

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_sections import MARK, SECTIONS, Proof

VARIANTS, BATCHES = ("n", "s", "l", "x"), (8, 32)
COMPILED = (("n", 8), ("l", 32), ("l", 8), ("n", 32))  # in this order, as far as time allows
Row = dict[str, Any]


def plan(proof: Proof, wanted: Sequence[str]) -> list[tuple[str, Proof, float]]:
    """Sections in order, each with its settings and its limit in seconds."""
    small = proof.device == "cpu"
    eager = [("n", 2)] if small else [(v, b) for b in BATCHES for v in VARIANTS]
    compiled = [] if small else COMPILED
    jobs = [
        ("golden", proof, 90),
        ("sampling", proof, 60),
        ("distortion", proof, 60),
        ("resume", proof, 60),
        ("speed", proof.of("l" if not small else "n", 8 if not small else 2, fused=False), 60),
        *(("speed", proof.of(variant, batch), 60) for variant, batch in eager),
        ("gradients", proof.of("n", 2, compiled="detector"), 120),
        ("gradients", proof.of("n", 2, compiled="step"), 120),
        ("collectives", proof.of(backend="nccl"), 60),
        ("collectives", proof.of(backend="gloo"), 60),
        ("training", proof, 120),
        *(("speed", proof.of(v, b, compiled=mode), 180) for v, b in compiled for mode in ("detector", "step")),
    ]
    return [job for job in jobs if job[0] in wanted]


def run_section(name: str, proof: Proof, limit: float) -> list[Row]:
    """Rows of a section; a failure is the last of them."""
    started_at = time.monotonic()
    command = [sys.executable, "-m", "benchmarks.gpu_sections", name, json.dumps(vars(proof))]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=proof.environment(),
        start_new_session=True,
    ) as process:
        try:
            printed, problem = process.communicate(timeout=limit)[0], None
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # and what it has started
            printed, problem = process.communicate()[0], f"not done after {limit:.0f} s"
    rows = [json.loads(line.removeprefix(MARK)) for line in printed.splitlines() if line.startswith(MARK)]
    if problem is None and process.returncode:
        lines = [line for line in printed.splitlines() if line.strip() and not line.startswith(MARK)]
        problem = lines[-1][-300:] if lines else f"exit status {process.returncode}"
    if problem:
        rows.append({"case": proof.label(), "failed": problem})
    spent = round(time.monotonic() - started_at, 1)
    return [{"section": name, **row, "section_s": spent} for row in rows]


def markdown(machine: str, rows: Sequence[Row]) -> str:
    """One table for each section."""
    text = [f"# Proof on {machine}\n"]
    for section in dict.fromkeys(row["section"] for row in rows):
        found = [
            {k: v for k, v in row.items() if k not in ("section", "section_s")}
            for row in rows
            if row["section"] == section
        ]
        columns = list(dict.fromkeys(key for row in found for key in row))
        text += [f"\n## {section}\n", "| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
        text += ["| " + " | ".join(cell(row.get(column, "")) for column in columns) + " |" for row in found]
    return "\n".join(text) + "\n"


def cell(value: object) -> str:
    """Value of a table."""
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "/").replace("\n", " ")


def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true", help="small sizes on the CPU")
    parser.add_argument("--sections", nargs="+", choices=list(SECTIONS), default=list(SECTIONS))
    parser.add_argument("--minutes", type=float, default=9.5, help="no section begins after these")
    parser.add_argument("--out", type=Path, default=Path("gpu_proof"))
    args = parser.parse_args(argv)
    if not args.cpu and not torch.cuda.is_available():
        parser.error("there is no GPU here: --cpu runs the same code small")
    device = "cpu" if args.cpu else "cuda"
    name = "CPU" if args.cpu else torch.cuda.get_device_name()
    machine = f"{name}, torch {torch.__version__}, Python {platform.python_version()}"
    args.out.mkdir(parents=True, exist_ok=True)
    until = time.monotonic() + 60 * args.minutes
    rows: list[Row] = []
    for name, proof, limit in plan(Proof(device=device, size=64 if args.cpu else 640), args.sections):
        left = until - time.monotonic()
        if left <= 0:
            found: list[Row] = [{"section": name, "case": proof.label(), "failed": "skipped: no time left"}]
        else:
            found = run_section(name, proof, limit if args.cpu else min(limit, left))
        for row in found:
            print(" ".join(f"{key}={cell(value)}" for key, value in row.items()), flush=True)
        rows += found
        (args.out / "rows.json").write_text(json.dumps({"machine": machine, "rows": rows}, indent=1))
        (args.out / "table.md").write_text(markdown(machine, rows))


if __name__ == "__main__":
    main()
