"""Facts about this machine's CPU."""

from functools import cache
from pathlib import Path

BF16_INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "bf16")  # the last one is ARM's


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
