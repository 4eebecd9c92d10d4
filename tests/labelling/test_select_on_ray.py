"""Choosing images on its own Ray: two detectors, killed in the middle and resumed, choose what a single process chooses."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from pipeline.labelling.select import SelectOptions, select
from pipeline.predict.inputs import list_inputs
from pipeline.predict.predict import IN_PROCESS
from tests.support.processes import kill_driver, one_thread, start_command, wait_for
from tests.support.small_detectors import small_detector
from tests.support.synthetic_shards import synthetic_records

pytestmark = pytest.mark.slow
IMAGES, PART_SIZE, COUNT = 120, 4, 30


def selected(out: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((out / "selected.json").read_text())
    return {**content, "next": content["next"].replace(str(out), "OUT")}


def test_two_detectors_on_ray_choose_what_one_chooses_also_after_a_kill(tmp_path: Path) -> None:
    photos, out, alone, log = (tmp_path / name for name in ("photos", "out", "alone", "log"))
    photos.mkdir()
    for number, record in enumerate(synthetic_records(IMAGES, longest_side=64)):
        (photos / f"{number:04d}.jpg").write_bytes(record.image)
    (photos / "broken.jpg").write_bytes(b"text")
    detector = small_detector().save(tmp_path / "detector")
    options = ("--count", f"{COUNT}", "--part-size", f"{PART_SIZE}", "--workers", "2")
    command = (str(detector), str(photos), "--out", str(out), *options)

    def parts() -> list[Path]:
        return sorted((out / "parts").glob("*.parquet"))

    driver = start_command(log, "jobs.select", *command)
    wait_for(lambda: len(parts()) >= 4, driver, log)
    kill_driver(driver)
    kept = {path: path.stat().st_mtime_ns for path in parts()}
    assert 4 <= len(kept) < (IMAGES + 1) / PART_SIZE
    assert not (out / "selected.json").exists()

    driver = start_command(log, "jobs.select", *command)
    assert driver.wait(timeout=400) == 0, log.read_text()[-4000:]
    assert {path: path.stat().st_mtime_ns for path in kept} == kept

    settings = SelectOptions(count=COUNT, part_size=PART_SIZE, workers=IN_PROCESS)
    with one_thread():
        select(small_detector(), list_inputs([str(photos)]), 0, str(alone), settings)
    assert pq.read_table(out / "parts").to_pylist() == pq.read_table(alone / "parts").to_pylist()
    assert selected(out) == selected(alone)
    assert len(selected(out)["chosen"]) == COUNT
    files = [{str(path.relative_to(each)) for path in each.rglob("*") if path.is_file()} for each in (out, alone)]
    assert files[0] == files[1]
    assert len([name for name in files[0] if name.startswith("images/")]) == COUNT
