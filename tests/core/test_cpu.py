"""Number of cores that a process may use."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dfine_core import cpu
from dfine_core.cpu import available_cores


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"max": "max 100000"}, 8),
        ({"max": "250000 100000"}, 3),
        ({"max": "20000 100000"}, 1),
        ({"max": "1600000 100000"}, 8),
        ({"quota": "-1", "period": "100000"}, 8),
        ({"quota": "200000", "period": "100000"}, 2),
        ({"quota": "200000"}, 8),
        ({"max": "nonsense", "quota": "200000", "period": "100000"}, 2),
        ({}, 8),
    ],
)
def test_the_quota_of_a_container_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], cores: int
) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    for constant, name in (("CPU_MAX", "max"), ("CFS_QUOTA", "quota"), ("CFS_PERIOD", "period")):
        monkeypatch.setattr(cpu, constant, tmp_path / name)
    assert available_cores() == cores


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no affinity")
def test_the_affinity_of_the_process_counts() -> None:
    one = "os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})"
    program = f"import os; {one}; from dfine_core.cpu import available_cores; print(available_cores())"
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert printed == "1\n"
