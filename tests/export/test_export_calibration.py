"""Calibrations in exports: beside the weights of folders, as numbers in the metadata of other files."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dfine_core import load
from dfine_core.uncertainty.detector_calibration import DetectorCalibration
from pipeline.data.sources.synthetic import CLASSES
from pipeline.export.source import ExportSource, at_input_size
from pipeline.export.writers import write_huggingface, write_safetensors
from tests.support.calibrations import a_calibration
from tests.support.small_detectors import small_detector
from tests.support.synthetic_shards import synthetic_records


@pytest.mark.parametrize("write", [write_safetensors, write_huggingface])
def test_an_exported_folder_is_calibrated_for_its_own_weights(write: object, tmp_path: Path) -> None:
    model = replace(small_detector(CLASSES[:3]), calibration=a_calibration("of the run"))
    write(ExportSource(model), tmp_path / "exported")  # type: ignore[operator]
    opened = load(tmp_path / "exported", "cpu")
    digest = hashlib.sha256((tmp_path / "exported/model.safetensors").read_bytes()).hexdigest()
    assert opened.calibration == a_calibration(digest)
    image = synthetic_records(1)[0].image
    for one, other in zip(opened(image, coverage=0.9), model(image, coverage=0.9), strict=True):
        torch.testing.assert_close(one.scores, other.scores, rtol=1e-3, atol=1e-4)
        assert one.edge_intervals is not None
        torch.testing.assert_close(one.edge_intervals, other.edge_intervals, rtol=1e-2, atol=1e-1)


def test_the_metadata_of_files_has_the_numbers_of_the_calibration(tmp_path: Path) -> None:
    model = small_detector(CLASSES[:3])
    assert "calibration" not in ExportSource(model).description
    write_safetensors(ExportSource(model), tmp_path / "raw")
    assert not (tmp_path / "raw/calibration.json").exists()
    content = ExportSource(replace(model, calibration=a_calibration("of the run"))).description["calibration"]
    assert "reference" not in content
    read = DetectorCalibration.from_plain(json.loads(json.dumps(content)) | {"sha256": None})
    assert read == replace(a_calibration(), reference=None)


def test_another_input_size_has_no_calibration() -> None:
    model = replace(small_detector(), calibration=a_calibration())
    assert at_input_size(model, (64, 64)).calibration == a_calibration()
    assert at_input_size(model, (96, 96)).calibration is None
