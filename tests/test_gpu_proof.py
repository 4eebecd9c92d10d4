"""The proof for a GPU, run small on the CPU: its rows, and a failure that costs no other section."""

import json
from pathlib import Path
from unittest.mock import patch

import pytest

from benchmarks import gpu_proof
from benchmarks.gpu_sections import SECTIONS, Proof


def rows_of(folder: Path) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = json.loads((folder / "rows.json").read_text())["rows"]
    assert rows
    return rows


def test_a_section_that_fails_or_hangs_is_a_row(tmp_path: Path) -> None:
    proof = Proof(device="cpu", size=64)
    jobs = [
        ("speed", proof.of(compiled="no such mode"), 100.0),
        ("golden", proof, 0.01),
        ("distortion", proof, 100.0),
    ]
    with patch.object(gpu_proof, "plan", lambda *_: jobs):
        gpu_proof.main(["--cpu", "--out", str(tmp_path)])
    failed, slow, found = rows_of(tmp_path)
    assert "compile" in str(failed["failed"])
    assert slow["failed"] == "not done after 0 s"
    assert float(str(found["plain ms"])) > 0
    assert "## distortion" in (tmp_path / "table.md").read_text()


def test_what_there_is_no_time_for_is_a_row_too(tmp_path: Path) -> None:
    gpu_proof.main(["--cpu", "--out", str(tmp_path), "--minutes", "0"])
    rows = rows_of(tmp_path)
    assert {row["section"] for row in rows} == set(SECTIONS)
    assert {row["failed"] for row in rows} == {"skipped: no time left"}


@pytest.mark.slow
def test_the_proof_runs_on_a_cpu(tmp_path: Path) -> None:
    wanted = ["golden", "sampling", "distortion", "resume", "speed"]
    gpu_proof.main(["--cpu", "--out", str(tmp_path), "--sections", *wanted])
    rows = rows_of(tmp_path)
    assert not [row for row in rows if "failed" in row]
    by_section = {name: [row for row in rows if row["section"] == name] for name in wanted}
    assert all(row["equal"] for row in by_section["golden"])
    assert all(row["resumed equal"] and row["repeated equal"] for row in by_section["resume"])
    assert all(float(str(row["images/s"])) > 0 for row in by_section["speed"])


@pytest.mark.slow
def test_two_ranks_and_a_whole_training_run_by_ray(tmp_path: Path) -> None:
    gpu_proof.main(["--cpu", "--out", str(tmp_path), "--sections", "collectives", "training"])
    nccl, gloo, training = rows_of(tmp_path)
    assert nccl["result"] == "no GPU"
    assert gloo["result"] == "as expected"
    assert 0 <= float(str(training["waits for data"])) <= 1
