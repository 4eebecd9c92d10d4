"""Benchmark of a detector: against a subject of known speed; operation counts against the published ones."""

import contextlib
import io
import json
import os
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn

from dfine_core import Detector, ModelConfig
from dfine_core.checkpoints.weights import save_released
from jobs import benchmark as benchmark_job
from pipeline.benchmark import MODEL_PARTS, Subject, detector_subject, gflops, measure, open_subject
from pipeline.config import ConfigError
from tests.support.small_detectors import small_detector

CPU = torch.device("cpu")


def sleeper(seconds: float) -> Subject:
    return Subject(
        name="sleeper",
        run=lambda images, _: time.sleep(seconds * (1 + 9 * (len(images) > 1))),
        input_size=(32, 32),
        device=CPU,
        hardware="a bed",
        runtime="night",
    )


def test_what_sleeps_20_ms_has_a_latency_of_20_ms_and_its_throughput() -> None:
    report = measure(sleeper(0.02), batch_sizes=[1, 8], calls=10, seconds=1.5)
    assert report.calls == 10
    assert 20 <= report.latency_ms["p50"] < 80  # a busy machine wakes late
    assert report.latency_ms["p50"] <= report.latency_ms["p90"] <= report.latency_ms["p99"]
    assert 10 < report.images_per_second[1] <= 50  # type: ignore[operator]
    assert 10 < report.images_per_second[8] <= 40  # type: ignore[operator]
    for part in ("sleeper", "a bed, night", "10 calls", "unknown", "batch 8"):
        assert part in report.table()


def test_a_batch_that_does_not_fit_is_reported_as_out_of_memory() -> None:
    def run(images: Tensor, _: Tensor) -> None:
        if len(images) > 4:
            raise torch.OutOfMemoryError

    subject = Subject("n", run, (32, 32), CPU, "h", "r")
    report = measure(subject, batch_sizes=[4, 8], calls=5, seconds=0.1)
    assert report.images_per_second[4] is not None
    assert report.images_per_second[8] is None
    assert "batch 8     out of memory" in report.table()


@pytest.mark.slow  # counting imports torch's compiler, for seven seconds
def test_gflops_are_the_published_ones_and_grow_with_the_image() -> None:
    found = gflops(ModelConfig.variant("n"))
    assert sum(found[part] for part in MODEL_PARTS) == pytest.approx(7.17, rel=0.03)
    small = gflops(ModelConfig.variant("n", input_size=(320, 320)))
    assert small["backbone"] == pytest.approx(found["backbone"] / 4, rel=0.01)


def test_a_detector_is_measured_as_it_is_delivered() -> None:
    subject = detector_subject(small_detector())
    expected = Detector(small_detector().config).deploy()
    assert subject.parameters == sum(parameter.numel() for parameter in expected.parameters())
    found = subject.run(torch.rand(2, 3, 64, 64), torch.tensor([[100, 50]] * 2))
    assert found.scores.shape == (2, 160)  # type: ignore[attr-defined]


class Mean(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, images: Tensor, sizes: Tensor) -> Tensor:
        return images.mean((1, 2, 3)) * sizes[:, 0] * self.weight.sum()


@pytest.mark.parametrize("batch", [None, 2])
def test_exported_programs_have_a_known_input_size_and_batch_size(batch: int | None, tmp_path: Path) -> None:
    shapes = ({0: torch.export.Dim("batch")},) * 2 if batch is None else None
    example = torch.zeros(2, 3, 64, 96), torch.ones(2, 2, dtype=torch.int64)
    torch.export.save(torch.export.export(Mean(), example, dynamic_shapes=shapes), tmp_path / "m.pt2")
    subject = open_subject(str(tmp_path / "m.pt2"), device=CPU)
    assert (subject.input_size, subject.batch_size, subject.parameters) == ((64, 96), batch, 3)
    report = measure(subject, batch_sizes=[1, 3], calls=3, seconds=0.1)
    assert list(report.images_per_second) == ([1, 3] if batch is None else [2])


def with_member(path: Path, name: str, content: bytes) -> Path:
    """Copy of a .pt2 file whose member that ends in `name` is replaced, or added."""
    changed = path.with_name(f"changed-{path.name}")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(changed, "w", zipfile.ZIP_STORED) as new:
        root = old.namelist()[0].split("/")[0]
        for member in old.namelist():
            if not member.endswith(name):
                new.writestr(member, old.read(member))
        new.writestr(f"{root}/{name}", content)
    return changed


def test_an_exported_program_that_would_unpickle_an_object_is_refused(tmp_path: Path) -> None:
    class RunsCode:
        def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
            return os.mkdir, (str(tmp_path / "ran"),)

    example = torch.zeros(2, 3, 64, 96), torch.ones(2, 2, dtype=torch.int64)
    path = tmp_path / "m.pt2"
    torch.export.save(torch.export.export(Mean(), example), path)
    stream = io.BytesIO()
    torch.save(RunsCode(), stream)
    for name, message in (
        ("data/sample_inputs/model.pt", "cannot be opened"),
        ("data/constants/opaque_obj_0", "contains code"),
    ):
        with pytest.raises(ConfigError, match=message):
            open_subject(str(with_member(path, name, stream.getvalue())), device=CPU)
    assert not (tmp_path / "ran").exists()
    with contextlib.suppress(Exception):  # torch alone runs it, and fails afterwards
        torch.export.load(with_member(path, "data/sample_inputs/model.pt", stream.getvalue()))
    assert (tmp_path / "ran").exists()


def onnx_file(path: Path, batch: str | int = "batch") -> Path:
    """Identity model with the inputs of an exported detector."""
    helper, kind = onnx.helper, onnx.TensorProto
    shapes = {"images": (kind.FLOAT, [batch, 3, 64, 96]), "orig_target_sizes": (kind.INT64, [batch, 2])}
    graph = helper.make_graph(
        [helper.make_node("Identity", [name], [f"same {name}"]) for name in shapes],
        "same",
        [helper.make_tensor_value_info(name, *shape) for name, shape in shapes.items()],
        [helper.make_tensor_value_info(f"same {name}", *shape) for name, shape in shapes.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)
    return path


@pytest.mark.parametrize("batch", ["batch", 2])
def test_onnx_files_have_a_known_input_size_and_batch_size(batch: str | int, tmp_path: Path) -> None:
    subject = open_subject(str(onnx_file(tmp_path / "m.onnx", batch)), device=CPU)
    assert (subject.input_size, subject.batch_size) == ((64, 96), None if batch == "batch" else 2)
    report = measure(subject, batch_sizes=[1, 3], calls=3, seconds=0.1)
    assert list(report.images_per_second) == ([1, 3] if batch == "batch" else [2])
    assert "onnxruntime" in report.runtime


OPTIONS = ["--device", "cpu", "--batch-sizes", "1", "--calls", "3", "--seconds", "0.3"]


def test_the_command_prints_a_table_and_writes_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = str(onnx_file(tmp_path / "m.onnx"))
    benchmark_job.main([source, *OPTIONS, "--json", str(tmp_path / "speed.json")])
    assert "latency     p50" in capsys.readouterr().out
    written = json.loads((tmp_path / "speed.json").read_text())
    assert written["input_size"] == [64, 96]
    assert written["images_per_second"]["1"] > 0
    for wrong, message in (("nowhere.onnx", "does not exist"), (str(tmp_path), "no detector")):
        with pytest.raises(SystemExit, match=message):
            benchmark_job.main([wrong])
    with pytest.raises(SystemExit, match="precision of an exported file is fixed"):
        benchmark_job.main([source, "--precision", "fp16"])


@pytest.mark.slow
def test_the_command_counts_the_operations_of_a_trained_detector(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded = small_detector(("person",), input_size=(160, 160))
    save_released(loaded.detector.state_dict(), loaded.config, tmp_path / "small.pth")
    benchmark_job.main([str(tmp_path / "small.pth"), *OPTIONS])
    assert "GFLOPs      0." in capsys.readouterr().out
