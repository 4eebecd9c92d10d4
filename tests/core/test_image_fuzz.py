"""Thousands of mutated image files: each is read or refused by the project's own error, in bounded time and memory."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.fuzzed_images import valid_images

COUNT = 20_000


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_a_mutated_file_is_read_or_refused(seed: int) -> None:
    command = [sys.executable, "-m", "tests.support.fuzzed_images", str(seed), str(COUNT // 2)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=550)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert sum(result["outcomes"].values()) == COUNT // 2
    formats = {name.split(":")[0] for name in result["outcomes"]}
    assert formats == set(valid_images())
    for outcome in ("read", "refused"):
        assert sum(count for name, count in result["outcomes"].items() if name.endswith(outcome)) > COUNT // 20
    assert result["slowest"][0] < 10, result
    assert result["largest_kib"] < 2_000_000, result
