"""D-FINE of Transformers as an independent implementation: renamed weights give the same logits and boxes."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoImageProcessor, DFineForObjectDetection

from dfine_core import ModelConfig, load
from dfine_core.checkpoints.transformers_layout import from_transformers
from dfine_core.images import read_image
from dfine_core.inference import prepare
from dfine_core.thresholds import ClassThresholds
from pipeline.export.huggingface import (
    save_transformers,
    transformers_config,
    transformers_detector,
    unsupported_settings,
)
from pipeline.export.source import ExportSource
from pipeline.export.writers import write_huggingface
from tests.support.synthetic_shards import synthetic_records
from tests.support.varied_detectors import loaded, varied_detector

NAMES = ("cat", "dog", "traffic light")


def config_of(variant: str, **settings: object) -> ModelConfig:
    values: dict[str, object] = {"num_classes": 3, "input_size": (128, 128), "num_queries": 30, **settings}
    return ModelConfig.variant(variant, **values)


def saved_processor(folder: Path) -> Path:
    """Folder with the image processor of a written detector."""
    config = config_of("n")
    save_transformers(config, varied_detector(config).state_dict(), NAMES, folder)
    return folder


def largest_differences(config: ModelConfig) -> tuple[float, float]:
    """Largest differences of logits and boxes, query by query."""
    detector = varied_detector(config)
    theirs = transformers_detector(config, detector.state_dict(), NAMES).eval()
    images = torch.rand(2, 3, *config.input_size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        our, their = detector(images), theirs(pixel_values=images)
    assert our.logits.std() > 0.05
    return (our.logits - their.logits).abs().max().item(), (our.boxes - their.pred_boxes).abs().max().item()


@pytest.mark.parametrize(
    "config",
    [
        config_of("n"),
        config_of("s"),
        config_of("n", input_size=(96, 160), positional_table="grid", num_points=(4, 2)),
        pytest.param(config_of("s", reg_max=16, reg_scale=8.0, up=0.4, sampling="discrete"), marks=pytest.mark.slow),
        *(pytest.param(config_of(variant), marks=pytest.mark.slow) for variant in "mlx"),
    ],
    ids=lambda config: f"{config.backbone} {config.input_size} {config.reg_max}",
)
def test_logits_and_boxes_equal_those_of_transformers(config: ModelConfig) -> None:
    logits, boxes = largest_differences(config)
    assert logits < 1e-4
    assert boxes < 1e-5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"regression": "direct"}, "only boxes from distributions"),
        ({"activation": "silu"}, "its heads have ReLU"),
        ({"query_selection": "one2many"}, "only the default"),
        ({"learn_query_content": True}, "fails on the first image"),
        ({"num_layers": 1}, "needs at least two"),
        ({"input_size": (96, 160)}, "only the table 'grid'"),
        ({"positional_temperature": 9999.5}, "only whole numbers"),
    ],
)
def test_settings_that_transformers_cannot_express_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        transformers_config(config_of("n", **settings), NAMES)
    assert unsupported_settings(config_of("n")) is None


def test_the_released_table_really_differs_on_rectangles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Justifies the refusal."""
    monkeypatch.setattr("pipeline.export.huggingface.unsupported_settings", lambda _: None)
    logits, _ = largest_differences(config_of("n", input_size=(96, 160)))
    assert logits > 1e-4


@pytest.mark.parametrize("variant", ["n", *(pytest.param(each, marks=pytest.mark.slow) for each in "smlx")])
def test_a_written_folder_is_read_back_bit_for_bit(variant: str, tmp_path: Path) -> None:
    config = config_of(variant)
    detector = varied_detector(config)
    save_transformers(config, detector.state_dict(), NAMES, tmp_path / "hf")
    again = load(tmp_path / "hf", "cpu")
    assert again.names == NAMES
    assert again.config.with_(positional_table="released") == config
    ours, read = detector.state_dict(), again.detector.state_dict()
    assert ours.keys() == read.keys()
    assert all(torch.equal(tensor, read[key]) for key, tensor in ours.items())


@pytest.mark.parametrize("variant", ["n", *(pytest.param(each, marks=pytest.mark.slow) for each in "smlx")])
def test_a_model_made_by_transformers_opens_here_with_its_logits_and_boxes(variant: str, tmp_path: Path) -> None:
    torch.manual_seed(5)
    theirs = DFineForObjectDetection(transformers_config(config_of(variant), NAMES)).eval()
    theirs.save_pretrained(tmp_path / "hf")
    AutoImageProcessor.from_pretrained(saved_processor(tmp_path / "processor")).save_pretrained(tmp_path / "hf")
    ours = load(tmp_path / "hf", "cpu").detector
    images = torch.rand(2, 3, 128, 128, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        our, their = ours(images), theirs(pixel_values=images)
    assert (our.logits - their.logits).abs().max() < 1e-5
    assert (our.boxes - their.pred_boxes).abs().max() < 1e-5
    dumped = from_transformers(theirs.state_dict())  # names of modules in memory
    assert all(torch.equal(dumped[key], tensor) for key, tensor in ours.state_dict().items())


def test_thresholds_travel_in_the_configuration_which_transformers_still_reads(tmp_path: Path) -> None:
    thresholds = ClassThresholds((0.25, None, 0.5), (None, None, 0.75), 0.9)
    model = replace(loaded(config_of("n")), thresholds=thresholds)
    write_huggingface(ExportSource(model), tmp_path / "hf")
    assert load(tmp_path / "hf", "cpu").thresholds == thresholds
    opened = DFineForObjectDetection.from_pretrained(tmp_path / "hf")
    assert opened.config.thresholds == thresholds.to_plain()


def test_a_folder_opens_like_any_other_with_its_classes_and_image_processor(tmp_path: Path) -> None:
    config = config_of("n")
    detector = varied_detector(config)
    save_transformers(config, detector.state_dict(), NAMES, tmp_path / "hf")
    assert {file.suffix for file in (tmp_path / "hf").iterdir()} == {".json", ".safetensors"}
    model = DFineForObjectDetection.from_pretrained(tmp_path / "hf")
    processor = AutoImageProcessor.from_pretrained(tmp_path / "hf")
    assert model.config.id2label == dict(enumerate(NAMES))

    image = read_image(synthetic_records(1, longest_side=200)[0].image)
    theirs = processor(images=image, return_tensors="pt")["pixel_values"]
    ours = prepare([image], config.input_size).float() / 255
    assert theirs.shape == ours.shape
    assert (theirs - ours).abs().max() < 2 / 255  # two implementations of one filter
    with torch.no_grad():
        their, our = model(pixel_values=ours), detector(ours)
    assert (their.logits - our.logits).abs().max() < 1e-4
    assert (their.pred_boxes - our.boxes).abs().max() < 1e-5
