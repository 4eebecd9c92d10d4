"""Batch prediction on its own Ray: killed in the middle it resumes, with the detections of a single process."""

import json
import re
import subprocess
from dataclasses import asdict
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from safetensors.torch import save_file

from pipeline.predict.inputs import list_inputs
from pipeline.predict.predict import IN_PROCESS, PredictOptions, predict
from pipeline.predict.predicted_images import predicted_images
from tests.support.processes import kill_driver, one_thread, start_command, wait_for
from tests.support.s3_server import s3_bucket
from tests.support.small_detectors import small_detector
from tests.support.synthetic_shards import synthetic_records, write_shards

pytestmark = pytest.mark.slow
IMAGES, PART_SIZE = 240, 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("predict")
    loaded = small_detector()
    (folder / "detector").mkdir()
    state = {key: tensor.clone() for key, tensor in loaded.detector.state_dict().items()}
    save_file(state, folder / "detector" / "model.safetensors")
    description = {"config": asdict(loaded.config), "categories": loaded.names}
    (folder / "detector" / "detector.json").write_text(json.dumps(description))
    (folder / "photos").mkdir()
    for number, record in enumerate(synthetic_records(IMAGES, longest_side=64)):
        (folder / "photos" / f"{number:04d}.jpg").write_bytes(record.image)
    (folder / "photos" / "broken.jpg").write_bytes(b"text")
    return folder


def start(folder: Path, source: str, out: str, log: Path, *options: str) -> subprocess.Popen[str]:
    given = (str(folder / "detector"), source, "--out", out, "--precision", "fp32")
    return start_command(log, "jobs.predict", *given, *options)


def test_a_killed_prediction_resumes_with_its_parts(folder: Path) -> None:
    out, log = folder / "out", folder / "log"
    options = ("--workers", "2", "--part-size", str(PART_SIZE), "--num-images", "2", "--num-explanations", "1")
    driver = start(folder, str(folder / "photos"), str(out), log, *options)

    def parts() -> list[Path]:
        return sorted((out / "parts").glob("*.parquet"))

    wait_for(lambda: len(parts()) >= 6, driver, log)
    kill_driver(driver)
    kept = {path: path.stat().st_mtime_ns for path in parts()}
    assert 6 <= len(kept) < (IMAGES + 1) / PART_SIZE
    assert not (out / "detections.json").exists()

    driver = start(folder, str(folder / "photos"), str(out), log, *options)
    assert driver.wait(timeout=400) == 0, log.read_text()[-4000:]
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert len(parts()) == -(-(IMAGES + 1) // PART_SIZE)
    assert "1 could not be read" in log.read_text()
    assert not list((out / "parts").glob(".*"))

    alone = folder / "alone"
    settings = PredictOptions(
        precision="fp32", workers=IN_PROCESS, part_size=PART_SIZE, num_images=0, num_explanations=1
    )
    with one_thread():
        predict(small_detector(), list_inputs([str(folder / "photos")]), str(alone), settings)
    expected, actual = (pq.read_table(path / "parts").to_pylist() for path in (alone, out))
    assert len(expected) == IMAGES + 1
    assert actual == expected


def test_inputs_and_results_may_be_in_an_object_store(folder: Path) -> None:
    shards = write_shards(folder / "shards", synthetic_records(10, longest_side=64))
    with s3_bucket() as bucket:
        from pipeline import storage

        for path in Path(shards.uri).iterdir():
            storage.write_atomic(f"{bucket}/in/val/{path.name}", path.read_bytes())
        storage.write_atomic(f"{bucket}/in/photo.jpg", (folder / "photos" / "0000.jpg").read_bytes())
        driver = start(
            folder, f"{bucket}/in/val", f"{bucket}/out", folder / "s3.log", "--num-images", "2", "--workers", "1"
        )
        assert driver.wait(timeout=200) == 0, (folder / "s3.log").read_text()[-4000:]
        described = json.loads(storage.read_bytes(f"{bucket}/out/images.json"))
        assert len(described["images"]) == 10
        assert storage.exists(f"{bucket}/out/contact_sheet.jpg")
        assert len(list(predicted_images(f"{bucket}/out"))) == 10
        options = PredictOptions(precision="fp32", workers=IN_PROCESS, num_images=0)
        result = predict(small_detector(), list_inputs([f"{bucket}/in/*.jpg"]), f"{bucket}/pattern", options)
        assert result.num_images == 1


def test_a_few_images_in_this_process_give_the_files_of_ray_bit_for_bit(folder: Path) -> None:
    outs = {"here": folder / "here", "ray": folder / "on_ray"}
    fixed = "--precision", "fp32"  # the default is measured at each start, and may differ
    for name, options in (("here", ()), ("ray", ("--workers", "1"))):
        log = folder / f"{name}.log"
        driver = start(
            folder, str(folder / "photos" / "00*.jpg"), str(outs[name]), log, "--part-size", "50", *fixed, *options
        )
        assert driver.wait(timeout=200) == 0, log.read_text()[-4000:]
        assert "100%" in log.read_text()
        assert not re.search(r"\.cc:\d+|Actor with class name|pid=", log.read_text())  # of Ray
    files = [
        {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}
        for out in outs.values()
    ]
    assert len([name for name in files[0] if name.startswith("parts/")]) >= 2
    assert files[0] == files[1]
