"""Exported files as detectors: the whole path from an image file to named boxes is PyTorch's, in every runtime.

One small detector is traced once for all tests.
"""

import json
import pickle
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
import torch
from PIL import Image

from dfine_core import LoadedDetector, LoadError, load
from dfine_core.runtimes.files import RUNTIMES
from dfine_core.runtimes.loaded_program import LoadedProgram
from dfine_core.thresholds import ClassThresholds
from jobs import check_engine, predict
from pipeline.config import ConfigError
from pipeline.export.check_images import from_synthetic_images
from pipeline.export.export import ExportResult, export
from pipeline.export.gate import Timing
from pipeline.export.onnx_files import PORTABLE_OPERATORS
from pipeline.open_detector import open_detector
from tests.support.served_detector import request, served_by_command
from tests.support.synthetic_shards import synthetic_records, write_shards
from tests.support.varied_detectors import loaded, small

ROOT = Path(__file__).parent.parent.parent
FORMATS = ["onnx-portable", "openvino", "openvino-fp16", "torch-export", "safetensors"]
FILES = ["detector-portable.onnx", "openvino/detector.xml", "detector.pt2"]
pytestmark = pytest.mark.slow  # tracing takes half a minute


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """JPEG of 120 x 80 pixels that its EXIF orientation turns by 90 degrees."""
    path = tmp_path_factory.mktemp("photos") / "turned.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    (record,) = synthetic_records(1, longest_side=120)
    (path.parent / "plain.jpg").write_bytes(record.image)
    Image.open(path.parent / "plain.jpg").resize((120, 80)).save(path, exif=exif, quality=95)
    return path


@pytest.fixture(scope="module")
def model(photo: Path) -> LoadedDetector:
    """Detector whose thresholds keep some detections of the photos, and none whose score is near them."""
    bare = loaded(small(num_layers=1))
    everything = bare([photo, photo.parent / "plain.jpg"], threshold=0)
    scores = torch.cat([found.scores for found in everything]).sort(descending=True).values[10:60]
    gap = int((scores[:-1] - scores[1:]).argmax())
    least = float(scores[gap : gap + 2].mean())
    return replace(bare, thresholds=ClassThresholds((least,) * 7 + (None,), (None,) * 8, 0.9))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("exported")


@pytest.fixture(scope="module")
def exported(model: LoadedDetector, folder: Path) -> ExportResult:
    return export(model, FORMATS, folder, from_synthetic_images(4, longest_side=96), timing=Timing(1, 3))


def test_every_format_is_accepted_with_its_rows_and_latencies(exported: ExportResult) -> None:
    assert exported.accepted, exported.table()
    rows = {
        result.verdict.format: [(row.opening.runtime, row.opening.precision) for row in result.verdict.rows]
        for result in exported.results
    }
    both = [("openvino", "f32"), ("openvino", "default")]
    assert rows["onnx-portable"] == [("onnxruntime", "f32"), *both]
    assert rows["openvino"] == rows["openvino-fp16"] == both
    for result in exported.results[:4]:
        measured = result.verdict.measured
        assert 0 < measured["ms_p50"] <= measured["ms_p99"]
        assert measured["ms_pytorch_p50"] > 0
        assert measured["agreeing on a batch of one image repeated"] == 1
        assert "PyTorch" in exported.table()


def test_the_default_precision_is_a_row_that_names_its_arithmetic(exported: ExportResult, folder: Path) -> None:
    full, default = json.loads((folder / "export.json").read_text())["formats"]["openvino"]["openings"]
    assert full["accepted"]
    assert full["runtime"].endswith(" f32")
    assert default["runtime"].split()[-1] in ("f32", "bf16", "f16")
    assert default["accepted"] == (default["reason"] is None)
    if not default["accepted"]:
        assert "INFERENCE_PRECISION_HINT=f32" in exported.table()


@pytest.mark.usefixtures("exported")
def test_portable_onnx_has_the_stated_operators_and_opset_alone(folder: Path) -> None:
    proto = onnx.load(folder / "detector-portable.onnx")
    assert [(one.domain, one.version) for one in proto.opset_import] == [("", 17)]
    used = {node.op_type for node in proto.graph.node}
    assert used <= PORTABLE_OPERATORS
    assert "Gather" in used
    assert "GridSample" not in used
    assert not proto.functions


@pytest.mark.usefixtures("exported")
@pytest.mark.parametrize("file", FILES)
def test_an_exported_file_detects_like_its_detector_from_the_file_on(
    folder: Path, model: LoadedDetector, photo: Path, file: str
) -> None:
    opened = load(folder / file)
    assert isinstance(opened, LoadedProgram)
    assert (opened.names, opened.category_ids, opened.thresholds) == (model.names, model.category_ids, model.thresholds)
    assert opened.config == model.config
    assert opened.num_parameters == model.num_parameters
    assert Path(file).name in repr(opened)
    images = [photo, photo.parent / "plain.jpg", photo]
    for ours, theirs in zip(model(images, batch_size=2), opened(images, batch_size=2), strict=True):
        assert ours.names == theirs.names
        assert len(ours) > 0
        torch.testing.assert_close(theirs.boxes, ours.boxes, rtol=0, atol=0.02)
        torch.testing.assert_close(theirs.scores, ours.scores, rtol=0, atol=1e-4)
    again = pickle.loads(pickle.dumps(opened))
    assert again([photo])[0].names == opened([photo])[0].names


@pytest.mark.usefixtures("exported")
def test_an_exported_file_refuses_what_needs_a_network(folder: Path, tmp_path: Path) -> None:
    opened = load(folder / "detector-portable.onnx")
    with pytest.raises(LoadError, match="save the detector that it was made of"):
        opened.save(tmp_path / "saved")
    with pytest.raises(AttributeError, match="an exported file has no decoder"):
        _ = opened.detector.decoder
    with pytest.raises(ValueError, match="precision of an exported file is fixed"):
        opened.with_precision("bf16")
    with pytest.raises(ConfigError, match="give the detector that it was made of"):
        open_detector(str(folder / "detector-portable.onnx"))


@pytest.mark.usefixtures("exported")
def test_a_file_without_metadata_is_refused_with_the_way_out(folder: Path, tmp_path: Path) -> None:
    proto = onnx.load(folder / "detector-portable.onnx")
    del proto.metadata_props[:]
    onnx.save(proto, tmp_path / "bare.onnx")
    with pytest.raises(LoadError, match="its metadata has no names and no config"):
        load(tmp_path / "bare.onnx")
    with pytest.raises(LoadError, match="no such file"):
        load(tmp_path / "gone.onnx")
    (tmp_path / "broken.xml").write_text("<net")
    with pytest.raises(LoadError, match="cannot be opened by openvino"):
        load(tmp_path / "broken.xml")


@pytest.mark.usefixtures("exported")
def test_predict_takes_an_exported_file(folder: Path, photo: Path, tmp_path: Path) -> None:
    counts = []
    for name in ("detector-portable.onnx", "safetensors"):
        predict.main([str(folder / name), str(photo.parent), "--out", str(tmp_path / name), "--workers", "0"])
        found = json.loads((tmp_path / name / "detections.json").read_text())
        counts.append([(each["image_id"], each["category_id"]) for each in found])
    assert counts[0] == counts[1]
    assert counts[0]


@pytest.mark.usefixtures("exported")
def test_serve_takes_an_exported_file_and_turns_photos_as_their_exif_says(
    folder: Path, model: LoadedDetector, photo: Path, tmp_path: Path
) -> None:
    images = [photo.read_bytes(), (photo.parent / "plain.jpg").read_bytes()]
    with served_by_command(tmp_path / "log", folder / "detector-portable.onnx") as (port, _):
        status, _, described = request(port, "/model")
        assert (status, described["precision"]) == (200, "fp32")
        answers = [request(port, "/detect", content, Content_Type="image/jpeg") for content in images]
        refused = request(port, "/detect?coverage=0.9", images[0], Content_Type="image/jpeg")
    assert described["names"] == list(model.names)
    for (status, _, answer), expected in zip(answers, model(images), strict=True):
        assert status == 200
        (found,) = answer["detections"]
        assert answer["threshold"] == model.threshold_text()
        assert found["names"] == list(expected.names)
        assert len(expected) > 0
        torch.testing.assert_close(torch.tensor(found["scores"]), expected.scores, rtol=0, atol=1e-4)
        torch.testing.assert_close(torch.tensor(found["boxes"]), expected.boxes, rtol=0, atol=0.02)
    (turned,) = answers[0][2]["detections"]
    assert (turned["width"], turned["height"]) == (80, 120)
    assert refused[0] == 422
    assert "an exported file has no distributions of edges" in refused[2]["error"]


@pytest.mark.usefixtures("exported")
def test_check_engine_accepts_a_file_and_refuses_another_one(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = write_shards(tmp_path / "val", synthetic_records(5, longest_side=96))
    arguments = [str(folder / "safetensors"), shards.uri, "--num-images", "4"]
    file, report = str(folder / "detector-portable.onnx"), tmp_path / "verdict.json"
    check_engine.main([file, *arguments, "--json", str(report)])
    assert "detections agree" in capsys.readouterr().out
    assert json.loads(report.read_text())["accepted"]
    proto = onnx.load(file)
    heads = [one for one in proto.graph.node if one.op_type == "Softmax"]
    for head in heads:
        head.op_type = "Sigmoid"
        del head.attribute[:]
    onnx.save(proto, tmp_path / "changed.onnx")
    with pytest.raises(SystemExit) as ended:
        check_engine.main([str(tmp_path / "changed.onnx"), *arguments])
    assert ended.value.code == 1
    assert "REFUSED" in capsys.readouterr().out


EXAMPLES = dict(
    zip(
        ("ONNX Runtime", "OpenVINO"),
        re.findall(r"without this project\n\n```python\n(.*?)```", (ROOT / "docs/export.md").read_text(), re.DOTALL),
        strict=True,
    )
)


@pytest.mark.usefixtures("exported")
@pytest.mark.parametrize(("name", "file"), [("ONNX Runtime", FILES[0]), ("OpenVINO", FILES[1])])
def test_the_example_of_the_page_finds_what_the_detector_finds(
    name: str, file: str, folder: Path, model: LoadedDetector, photo: Path, tmp_path: Path
) -> None:
    code = EXAMPLES[name]
    assert len(code.splitlines()) <= 40
    assert "dfine" not in code
    (tmp_path / "example.py").write_text(code)
    command = [sys.executable, str(tmp_path / "example.py"), str(folder / file), str(photo)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300, cwd=tmp_path).stdout
    (expected,) = model([photo])
    lines = [line.rsplit(maxsplit=5) for line in printed.splitlines()]
    assert [line[0] for line in lines] == list(expected.names)
    numbers = torch.tensor([[float(text) for text in line[1:]] for line in lines])
    torch.testing.assert_close(numbers[:, 0], expected.scores, rtol=0, atol=2e-4)
    torch.testing.assert_close(numbers[:, 1:], expected.boxes, rtol=0, atol=0.05)


def test_runtimes_are_told_apart_by_their_suffixes() -> None:
    suffixes = [runtime.suffix for runtime in RUNTIMES]
    assert len(set(suffixes)) == len(suffixes) == 3
