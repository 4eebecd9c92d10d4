"""Facts about this machine's CPU."""

import math
import os
from functools import cache
from pathlib import Path

BF16_INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "bf16")  # the last one is ARM's
CPU_MAX = Path("/sys/fs/cgroup/cpu.max")
CFS_QUOTA, CFS_PERIOD = (Path("/sys/fs/cgroup/cpu", f"cpu.cfs_{name}_us") for name in ("quota", "period"))


@cache
def description() -> str:
    """Text of /proc/cpuinfo; empty where there is none, as outside of Linux."""
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return ""


def made_by_amd() -> bool:
    """Whether the CPU is one of AMD's."""
    return "AuthenticAMD" in description()


def multiplies_bf16() -> bool:
    """Whether the CPU has instructions for products of bf16 numbers."""
    return not set(BF16_INSTRUCTIONS).isdisjoint(description().split())


def available_cores() -> int:
    """Count the cores that this process may use: those of its affinity, as far as the quota of its container goes; at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min(cores, _quota())))


def _quota() -> float:
    """Return the cores' worth of time that a container may take; infinite without a limit."""
    try:  # cgroup v2: "max 100000" or "200000 100000"
        quota, period = CPU_MAX.read_text(encoding="utf-8").split()
        return math.inf if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        pass
    try:  # cgroup v1: -1 is no limit
        taken = int(CFS_QUOTA.read_text(encoding="utf-8"))
        return math.inf if taken <= 0 else taken / int(CFS_PERIOD.read_text(encoding="utf-8"))
    except (OSError, ValueError, ZeroDivisionError):
        return math.inf
