"""Exported files in their own runtimes: equal detections are accepted, different ones refused."""

import hashlib
import json
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper

from dfine_core import load
from dfine_core.agreement import FULL
from dfine_core.checkpoints.weights import read_checkpoint
from dfine_core.inference import LoadedDetector
from dfine_core.runtimes.files import open_program
from dfine_core.thresholds import ClassThresholds
from jobs import export as export_job
from pipeline.config import ConfigError
from pipeline.evaluation.ground_truth import GroundTruth
from pipeline.export import check_images
from pipeline.export import export as exporting
from pipeline.export.check_images import CheckSet, from_shards, from_synthetic_images
from pipeline.export.export import ExportResult, export
from pipeline.export.formats import FORMATS
from pipeline.export.gate import check_files
from pipeline.export.gate_row import detect_function
from pipeline.export.source import ExportSource, at_input_size
from pipeline.export.writers import write_safetensors
from tests.support.synthetic_shards import synthetic_records, write_shards
from tests.support.varied_detectors import loaded, small

NUM_IMAGES = 7
traced = pytest.mark.slow  # tracing takes half a minute
UNCALIBRATED = [name for name, one in FORMATS.items() if not one.calibrated]
QUICK = ["onnx", "onnx-fp16", "released", "safetensors"]  # for a single layer, which Transformers does not support


@pytest.fixture(scope="module")
def model() -> LoadedDetector:
    thresholds = ClassThresholds((0.25, None, 0.5, *(None,) * 5), (None,) * 8, 0.9)
    return replace(loaded(small(num_layers=1)), thresholds=thresholds)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("exported")


@pytest.fixture(scope="module")
def exported(model: LoadedDetector, folder: Path) -> ExportResult:
    """One small export shared by all tests, because tracing is slow."""
    return export(model, QUICK, folder, from_synthetic_images(NUM_IMAGES, longest_side=96))


@traced
def test_exported_files_are_accepted_on_images(exported: ExportResult, folder: Path) -> None:
    assert [result.verdict.reason for result in exported.results] == [None] * len(QUICK), exported.table()
    assert sorted(file.name for file in folder.iterdir()) == sorted(
        ["export.json", *(FORMATS[name].file for name in QUICK)]
    )
    for result in exported.results:
        assert result.verdict.measured["detections"] == NUM_IMAGES * 20


def test_the_folder_of_an_export_opens_as_it_is(model: LoadedDetector, tmp_path: Path) -> None:
    export(model, ["safetensors"], tmp_path, from_synthetic_images(1, longest_side=96))
    opened = load(tmp_path)
    assert opened.path == str(tmp_path / "safetensors" / "model.safetensors")
    assert opened.thresholds == model.thresholds is not None
    for name, tensor in opened.detector.state_dict().items():
        assert torch.equal(tensor, model.detector.state_dict()[name]), name


@traced
@pytest.mark.usefixtures("exported")
def test_the_report_names_source_versions_differences_and_digests(folder: Path, model: LoadedDetector) -> None:
    report = json.loads((folder / "export.json").read_text())
    assert report["names"] == list(model.names)
    assert report["input_size"] == [64, 64]
    assert report["checked_on"] == f"{NUM_IMAGES} generated images"
    assert report["versions"]["torch"] == version("torch")
    assert list(report["formats"]) == QUICK
    for name, entry in report["formats"].items():
        assert entry["accepted"]
        assert entry["tolerance"]["score"] == FORMATS[name].tolerance.score
        assert 0.9 < entry["measured"]["agreeing"] <= 1
        for file in entry["files"]:
            content = (folder / file["file"]).read_bytes()
            assert (file["bytes"], file["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())


def check_batches(model: LoadedDetector, name: str, path: Path) -> None:
    detect = detect_function(open_program(path))
    (batch,) = from_synthetic_images(3, longest_side=96).batches(model.config.input_size)
    for size in (1, 2, 3):
        actual = detect(batch.pixels[:size], batch.sizes[:size])
        expected = model.detect(batch.pixels[:size], batch.sizes[:size])
        assert actual.boxes.shape == expected.boxes.shape
        assert actual.scores.shape == expected.scores.shape
        torch.testing.assert_close(
            actual.scores[:, :5], expected.scores[:, :5], rtol=0, atol=FORMATS[name].tolerance.score
        )


@traced
@pytest.mark.parametrize("name", ["onnx", "onnx-fp16"])
@pytest.mark.usefixtures("exported")
def test_one_file_takes_one_two_or_three_images(folder: Path, model: LoadedDetector, name: str) -> None:
    check_batches(model, name, folder / FORMATS[name].file)


@pytest.mark.slow
def test_every_format_is_accepted_and_a_torch_program_takes_one_two_or_three_images(tmp_path: Path) -> None:
    model = loaded(small())
    done = export(model, UNCALIBRATED, tmp_path, from_synthetic_images(NUM_IMAGES, longest_side=96))
    assert done.accepted, done.table()
    check_batches(model, "torch-export", tmp_path / "detector.pt2")


@traced
def test_an_onnx_file_carries_its_metadata(exported: ExportResult, folder: Path, model: LoadedDetector) -> None:
    for name in ("onnx", "onnx-fp16"):
        session = onnxruntime.InferenceSession(folder / FORMATS[name].file, providers=["CPUExecutionProvider"])
        metadata = session.get_modelmeta().custom_metadata_map
        assert json.loads(metadata["names"]) == list(model.names)
        assert json.loads(metadata["input_size"]) == [64, 64]
        assert json.loads(metadata["thresholds"])["best_f1"] == [0.25, None, 0.5, *[None] * 5]
        assert metadata["weights_sha256"] == exported.source.digest
        assert metadata["made_by"].startswith("ray-dfine")
        assert [(one.name, one.type, one.shape[1:]) for one in session.get_inputs()] == [
            ("images", "tensor(float)", [3, 64, 64]),
            ("orig_target_sizes", "tensor(int64)", [2]),
        ]
        assert [(one.name, one.type) for one in session.get_outputs()] == [
            ("labels", "tensor(int64)"),
            ("boxes", "tensor(float)"),
            ("scores", "tensor(float)"),
        ]
        assert onnx.load(folder / FORMATS[name].file).opset_import[0].version >= 17


@traced
@pytest.mark.usefixtures("exported")
def test_half_precision_takes_half_the_space(folder: Path) -> None:
    whole, half = ((folder / FORMATS[name].file).stat().st_size for name in ("onnx", "onnx-fp16"))
    assert half < 0.65 * whole


@traced
@pytest.mark.usefixtures("exported")
def test_a_released_file_and_a_folder_hold_the_very_weights(folder: Path, model: LoadedDetector) -> None:
    released = read_checkpoint(folder / "detector.pth")
    again = load(folder / "safetensors", "cpu")
    assert again.config == model.config
    assert (again.names, again.category_ids) == (model.names, model.category_ids)
    for key, tensor in model.detector.state_dict().items():
        assert torch.equal(again.detector.state_dict()[key], tensor)
        assert torch.equal(released[key], tensor)


def changed_initializer(path: Path, target: Path) -> Path:
    """Copy of the file with the weights of its score heads increased by 1 %."""
    proto = onnx.load(path)
    heads = [one for one in proto.graph.initializer if sorted(one.dims) == [8, 128]]
    assert heads
    for head in heads:
        head.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(head) * np.float32(1.01), head.name))
    onnx.save(proto, target)
    return target


@traced
@pytest.mark.usefixtures("exported")
def test_a_file_with_tampered_weights_is_refused(folder: Path, model: LoadedDetector, tmp_path: Path) -> None:
    tampered = changed_initializer(folder / "detector.onnx", tmp_path / "detector.onnx")
    verdict = check_files(model, {"onnx": tampered}, from_synthetic_images(3, longest_side=96))["onnx"]
    assert "of its detections agree" in str(verdict.reason)


@traced
@pytest.mark.usefixtures("exported")
def test_a_file_that_is_cut_short_is_refused(folder: Path, model: LoadedDetector, tmp_path: Path) -> None:
    for name in ("onnx", "released"):
        content = (folder / FORMATS[name].file).read_bytes()
        (tmp_path / FORMATS[name].file).write_bytes(content[: len(content) // 2])
        verdict = check_files(model, {name: tmp_path / FORMATS[name].file}, from_synthetic_images(1, longest_side=64))[
            name
        ]
        assert str(verdict.reason).startswith("cannot be opened"), verdict


def _tampered(source: ExportSource, path: Path) -> None:
    write_safetensors(ExportSource(loaded(source.model.config, seed=1)), path)


def test_a_refused_file_lies_apart_and_takes_the_earlier_one_with_it(
    model: LoadedDetector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert export(model, ["safetensors"], tmp_path, from_synthetic_images(2, longest_side=64)).accepted
    assert (tmp_path / "safetensors" / "detector.json").exists()
    monkeypatch.setitem(exporting.FORMATS, "safetensors", replace(FORMATS["safetensors"], write=_tampered))
    done = export(model, ["safetensors", "released"], tmp_path, from_synthetic_images(2, longest_side=64))
    assert not done.accepted
    assert sorted(file.name for file in tmp_path.iterdir()) == ["detector.pth", "export.json", "refused"]
    assert (tmp_path / "refused" / "safetensors" / "detector.json").exists()
    report = json.loads((tmp_path / "export.json").read_text())["formats"]
    assert not report["safetensors"]["accepted"]
    assert "agree" in report["safetensors"]["reason"]
    assert report["released"]["accepted"]
    assert "REFUSED" in done.table()


def test_nothing_is_replaced_that_no_export_has_written(model: LoadedDetector, tmp_path: Path) -> None:
    images = from_synthetic_images(2, longest_side=64)
    mine = tmp_path / "mine"
    (mine / "safetensors").mkdir(parents=True)
    (mine / "safetensors/thesis.txt").write_text("years")
    with pytest.raises(ConfigError, match="holds other files \\(safetensors\\)"):
        export(model, ["safetensors"], mine, images)
    assert [path.name for path in mine.rglob("*")] == ["safetensors", "thesis.txt"]

    out = tmp_path / "out"
    assert export(model, ["safetensors"], out, images).accepted
    assert export(model, ["released"], out, images).accepted
    assert export(model, ["safetensors", "released"], out, images).accepted  # all of them its own
    for name in ("notes.txt", "model.safetensors"):
        (out / "safetensors" / name).write_text("by hand")
        with pytest.raises(ConfigError, match=f"safetensors/{name} would be replaced, and no export has written it"):
            export(model, ["safetensors"], out, images)
        assert (out / "safetensors" / name).read_text() == "by hand"
        (out / "safetensors" / name).unlink()
    assert export(model, ["released"], out, images).accepted


def test_a_format_that_cannot_be_written_is_refused_and_the_others_are_exported(tmp_path: Path) -> None:
    rectangular = loaded(small(input_size=(64, 96)))
    done = export(rectangular, ["huggingface", "safetensors"], tmp_path, from_synthetic_images(2, longest_side=64))
    assert "cannot express positional_table" in str(done.results[0].verdict.reason)
    assert done.results[1].verdict.accepted
    assert not (tmp_path / "huggingface").exists()


def test_another_input_size_keeps_the_weights(tmp_path: Path) -> None:
    model = loaded(small())
    larger = at_input_size(model, (96, 96))
    assert larger.config == model.config.with_(input_size=(96, 96))
    assert ExportSource(larger).digest == ExportSource(model).digest
    done = export(
        larger, ["huggingface", "released", "safetensors"], tmp_path, from_synthetic_images(3, longest_side=96)
    )
    assert done.accepted, done.table()
    size = json.loads((tmp_path / "huggingface" / "preprocessor_config.json").read_text())["size"]
    assert size == {"height": 96, "width": 96}
    assert load(tmp_path / "safetensors").config.input_size == (96, 96)
    with pytest.raises(ValueError, match="must be a multiple of 32"):
        at_input_size(model, (100, 100))


# The command


def labelled(check_set: CheckSet, model: LoadedDetector) -> GroundTruth:
    """Ground truth replaced by the best detection of each image, so that AP is not 0."""
    assert check_set.ground_truth is not None
    found = [model.detect(batch.pixels, batch.sizes) for batch in check_set.batches(model.config.input_size)]
    box = torch.cat([part.boxes[:, 0] for part in found]).numpy()
    return replace(
        check_set.ground_truth,
        image=np.arange(len(box)),
        box=box,
        label=torch.cat([part.labels[:, 0] for part in found]).numpy().astype(np.int32),
        area=(box[:, 2:] - box[:, :2]).prod(1),
        crowd=np.zeros(len(box), np.bool_),
    )


@pytest.fixture(scope="module")
def stored(model: LoadedDetector, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stored") / "detector"
    write_safetensors(ExportSource(model), path)
    return path


def test_the_command_compares_average_precision_on_shards(
    stored: Path,
    model: LoadedDetector,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shards = write_shards(tmp_path / "val", synthetic_records(8, longest_side=64))

    def with_ground_truth(_: object, images: int) -> CheckSet:
        check_set = from_shards(shards, images)
        return replace(check_set, ground_truth=labelled(check_set, model))

    monkeypatch.setattr(check_images, "from_shards", with_ground_truth)
    out = tmp_path / "out"
    export_job.main(
        [str(stored), "--to", "released", "safetensors", "--out", str(out), "--check", shards.uri, "--num-images", "6"]
    )
    assert "the first 6 images of" in capsys.readouterr().out
    measured = json.loads((out / "export.json").read_text())["formats"]["released"]["measured"]
    assert measured["AP_exported"] == measured["AP_pytorch"] > 0.2


def test_the_command_fails_when_a_file_is_refused(
    stored: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        export_job.main(
            [
                str(stored),
                "--to",
                "huggingface",
                "--out",
                str(tmp_path),
                "--input-size",
                "64",
                "96",
                "--num-images",
                "1",
            ]
        )
    assert ended.value.code == 1
    assert "REFUSED" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--input-size", "100"], "must be a multiple of 32"),
        (["--num-images", "0"], "nothing is accepted without a comparison"),
        (["--check", "/nowhere"], "there is none"),
        (["--attach", "shapes"], "name a run"),
        (["--to", "onnx-int8"], "onnx-int8 needs images with ground truth: name a shard set by --calibrate"),
    ],
)
def test_the_command_refuses_invalid_arguments(
    stored: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit, match=message):
        export_job.main([str(stored), "--to", "released", "--out", str(tmp_path), *arguments])
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["s", "l"])
def test_larger_variants_at_another_size_are_accepted(variant: str, tmp_path: Path) -> None:
    config = small().variant(variant, num_classes=8, input_size=(128, 128), num_queries=100)
    other = at_input_size(loaded(config), (160, 160))
    done = export(other, UNCALIBRATED, tmp_path, from_synthetic_images(4, longest_side=200))
    assert done.accepted, done.table()


@pytest.mark.slow
def test_other_settings_are_accepted(tmp_path: Path) -> None:
    settings: list[dict[str, object]] = [
        {"sampling": "discrete", "reg_max": 16, "input_size": (64, 96)},
        {"regression": "direct", "query_selection": "one2many", "learn_query_content": True},
        {"query_selection": "agnostic", "positional_table": "grid", "input_size": (96, 64)},
    ]
    for number, some in enumerate(settings):
        done = export(
            loaded(small(**some)),
            ["onnx", "torch-export"],
            tmp_path / str(number),
            from_synthetic_images(3, longest_side=96),
        )
        assert done.accepted, done.table()


def test_the_tolerances_are_those_of_the_documentation() -> None:
    assert (FULL.score, FULL.box, FULL.ap) == (1e-4, 1e-4, 0.001)
