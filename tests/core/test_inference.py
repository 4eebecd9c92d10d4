"""Images and detectors from wherever they lie: every way in gives the same detections, and none runs code."""

import base64
import io
import json
import os
import pickle
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import dfine_core
from dfine_core import Detector, ImageDetections, LoadedDetector, ModelConfig, load
from dfine_core.checkpoints.class_transfer import coco_names
from dfine_core.checkpoints.weights import save_released
from dfine_core.images import read_image
from dfine_core.inference import LoadError, from_description, predict_batch, prepare
from pipeline.config import ConfigError
from pipeline.data.augment.decode import decode_rgb, stretch
from pipeline.data.shards.manifest import Category
from pipeline.open_detector import open_detector
from pipeline.tracking.model import save_detector
from pipeline.training import checkpoint
from pipeline.training.stage_two import EvaluationHistory

pytestmark = pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SADeprecationWarning")

CLASSES = 80
CONFIG = ModelConfig.variant("n", num_classes=CLASSES, input_size=(96, 160), num_queries=75, reg_max=16)
WIDTH, HEIGHT = 173, 141


@pytest.fixture(scope="module")
def detector() -> Detector:
    torch.manual_seed(0)
    made = Detector(CONFIG).eval()
    with torch.no_grad():  # scores on both sides of the default threshold
        for head in made.decoder.dec_score_head:
            head.bias += 3.1
    return made


@pytest.fixture(scope="module")
def weights(detector: Detector, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    save_file({key: tensor.clone() for key, tensor in detector.state_dict().items()}, path)
    return path


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    coarse = np.random.default_rng(0).integers(0, 256, (12, 15, 3), dtype=np.uint8)
    path = tmp_path_factory.mktemp("picture") / "picture.png"
    Image.fromarray(coarse).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC).save(path)
    return path


def exported(folder: Path, weights: Path, config: ModelConfig = CONFIG) -> Path:
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(weights.read_bytes())
    (folder / "detector.json").write_text(json.dumps({"config": asdict(config), "categories": coco_names()}))
    return folder


def run_folder(folder: Path, detector: Detector) -> Path:
    """Of two checkpoints: step 10 is the best and has the detector's weights, step 20 others."""
    state = {key: tensor.clone() for key, tensor in detector.state_dict().items()}
    other = {key: tensor * 2 if "dec_score" in key else tensor for key, tensor in state.items()}
    for step, tensors in ((10, state), (20, other)):
        metadata = checkpoint.Metadata(
            run="run",
            step=step,
            epoch=0,
            stage=1,
            history=EvaluationHistory(best_ap=0.5, best_step=10),
            global_batch_size=4,
            micro_batch_size=4,
            workers=1,
            skipped_steps=0,
            model=asdict(CONFIG),
            categories=tuple(Category(label=i, original_id=i + 7, name=name) for i, name in enumerate(coco_names())),
            data={},
        )
        checkpoint.write(checkpoint.Snapshot(metadata, {}, {"ema": tensors}), str(folder / "checkpoints"))
    return folder


@pytest.fixture(scope="module")
def sources(
    detector: Detector, weights: Path, picture: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("sources")
    save_released(detector.state_dict(), CONFIG, folder / "released.pth")
    example = picture.read_bytes()
    save_detector(folder / "mlflow", config=CONFIG, weights=weights, categories=coco_names(), example=example)
    run = run_folder(folder / "run", detector)
    return {
        "released": folder / "released.pth",
        "mlflow": folder / "mlflow",
        "exported": exported(folder / "exported", weights),
        "run": run,
        "checkpoint": run / "checkpoints" / checkpoint.folder_name(10),
    }


def same(a: ImageDetections, b: ImageDetections) -> bool:
    tensors = all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("boxes", "scores", "labels"))
    return tensors and a.names == b.names


# Detectors


@pytest.mark.parametrize("kind", ["released", "mlflow", "run", "checkpoint"])
def test_every_kind_of_source_gives_equal_detections(kind: str, sources: dict[str, Path], picture: Path) -> None:
    (expected,) = load(sources["exported"], "cpu")(picture)
    assert 0 < len(expected.scores) < 300
    assert (expected.scores >= 0.4).all()
    loaded = load(sources[kind], "cpu")
    assert loaded.config.input_size == CONFIG.input_size
    assert loaded.names == coco_names()
    (found,) = loaded(picture)
    assert same(found, expected)
    opened = open_detector(str(sources[kind]))
    assert opened.origin == loaded.origin
    assert same(opened(picture)[0], expected)


def test_category_ids_are_the_data_s_the_published_ones_or_the_labels(sources: dict[str, Path]) -> None:
    assert load(sources["run"], "cpu").category_ids[:2] == (7, 8)
    assert load(sources["released"], "cpu").category_ids[-1] == 90
    assert load(sources["exported"], "cpu").category_ids == tuple(range(CLASSES))


@pytest.mark.parametrize("variant", ["n", "s", *(pytest.param(name, marks=pytest.mark.slow) for name in "mlx")])
def test_a_released_file_tells_its_variant_classes_bins_and_size(variant: str, tmp_path: Path) -> None:
    config = ModelConfig.variant(variant, num_classes=366, input_size=(640, 512), reg_max=24, up=0.25)
    save_released(Detector(config).state_dict(), config, tmp_path / "released.pth")
    loaded = load(tmp_path / "released.pth", "cpu")
    assert loaded.config == config
    assert loaded.names[:2] == ("class_0", "Person")
    assert loaded.category_ids[1] == 1


def test_it_detects_what_evaluation_detects(sources: dict[str, Path], detector: Detector, picture: Path) -> None:
    pixels = stretch(decode_rgb(picture.read_bytes(), WIDTH, HEIGHT), CONFIG.input_size)
    with torch.no_grad():
        output = detector(torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255)
    scores, order = output.logits[0].sigmoid().flatten().sort(descending=True)
    query = order // CLASSES
    centre, size = output.boxes[0][query].split(2, -1)
    boxes = torch.cat([centre - size / 2, centre + size / 2], -1) * torch.tensor([WIDTH, HEIGHT, WIDTH, HEIGHT])
    (found,) = load(sources["exported"], "cpu")(picture, threshold=0.0)
    assert found.labels.tolist() == (order % CLASSES)[:300].tolist()
    torch.testing.assert_close(found.scores, scores[:300])
    torch.testing.assert_close(found.boxes, boxes[:300])


def test_floating_pixels_and_bytes_give_equal_detections_up_to_300_or_all_pairs(detector: Detector) -> None:
    pixels = torch.randint(0, 256, (2, 3, *CONFIG.input_size), dtype=torch.uint8)
    sizes = torch.tensor([[160, 96], [320, 50]])
    with torch.no_grad():
        found, output = predict_batch(detector, pixels, sizes)
        floating, _ = predict_batch(detector, pixels.float() / 255, sizes)
        _, layers = predict_batch(detector, pixels, sizes, every_layer=True)
    assert all(torch.equal(getattr(found, name), getattr(floating, name)) for name in ("labels", "boxes", "scores"))
    assert output.matching is None
    assert layers.matching is not None
    assert found.scores.shape == (2, 300)  # of 75 queries x 80 classes
    few = Detector(CONFIG.with_(num_classes=2)).eval()
    with torch.no_grad():
        assert predict_batch(few, pixels, sizes)[0].scores.shape == (2, 150)


def test_paths_bytes_arrays_and_pictures_single_or_several_are_one(sources: dict[str, Path], picture: Path) -> None:
    loaded = load(str(sources["exported"]), "cpu")
    (expected,) = loaded([picture])
    pixels = np.asarray(Image.open(picture))
    for image in (str(picture), picture, picture.read_bytes(), pixels, Image.open(picture)):
        (found,) = loaded(image)
        assert same(found, expected), type(image)
    assert all(same(found, expected) for found in loaded(pixels[None]))
    several = loaded([pixels, pixels[:50], picture], batch=2)
    assert [len(found.scores) > 0 for found in several] == [True] * 3
    torch.testing.assert_close(several[2].boxes, expected.boxes)
    assert loaded([]) == []


def test_deployed_it_detects_the_same_up_to_rounding(sources: dict[str, Path], picture: Path) -> None:
    loaded = load(sources["exported"], "cpu")
    (plain,) = loaded(picture)
    (fused,) = loaded.deploy()(picture)
    torch.testing.assert_close(fused.boxes, plain.boxes, rtol=1e-5, atol=1e-3)


class RunsCode:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_a_file_that_would_run_code_is_refused_and_does_not(tmp_path: Path) -> None:
    for name, write in (
        ("torch.pth", torch.save),
        ("plain.pth", lambda x, f: Path(f).write_bytes(pickle.dumps(x, protocol=2))),
    ):
        write({"model": RunsCode(tmp_path / "ran")}, tmp_path / name)
        with pytest.raises(LoadError):
            load(tmp_path / name)
    assert not (tmp_path / "ran").exists()


def test_what_is_no_detector_is_refused_with_what_was_found(sources: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("")
    torch.save({"w": torch.ones(1)}, tmp_path / "other.pth")
    for source, message in (
        (tmp_path, "it holds .*notes.txt"),
        (tmp_path / "nowhere", "does not exist"),
        (tmp_path / "nowhere.pth", "No such file"),
        (tmp_path / "other.pth", "not the weights of a detector"),
    ):
        with pytest.raises(LoadError, match=message):
            load(source)
        with pytest.raises(ConfigError, match=message):
            open_detector(str(source))


@pytest.mark.parametrize("source", ["models:/none@champion", "models:/none/1", "runs:/0123"])
def test_what_only_mlflow_knows_is_opened_by_the_pipeline_alone(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(LoadError, match=r"pipeline\.open_detector\.open_detector opens"):
        load(source)
    with pytest.raises(ConfigError, match="set MLFLOW_TRACKING_URI"):
        open_detector(source)


def test_a_damaged_checkpoint_is_named(detector: Detector, tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run", detector)
    path = run / "checkpoints" / checkpoint.folder_name(10) / "ema.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(LoadError, match=r"ema\.safetensors: is damaged"):
        load(run)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"categories": ["cat"]}, "1 categories for a detector of num_classes 80"),
        ({"config": {"num_heads": 3}}, "unknown settings of a detector: num_heads"),
        ({"config": {**asdict(CONFIG), "reg_max": 32}}, "reg_max 16, the model 32"),
    ],
)
def test_a_description_that_does_not_fit_is_refused(change: dict[str, Any], message: str, weights: Path) -> None:
    content = {"config": asdict(CONFIG), "categories": coco_names(), **change}
    with pytest.raises(LoadError, match=message):
        from_description(json.dumps(content).encode(), weights.read_bytes(), "here", "cpu")


def test_the_package_offers_what_opens_a_detector() -> None:
    assert dfine_core.load is load
    assert LoadedDetector.__name__ in dfine_core.__all__


# Images


def test_preparing_is_what_evaluation_does_to_images(picture: Path) -> None:
    image = read_image(picture)
    prepared = prepare([image, image.crop((0, 0, 50, 60))], (64, 96))
    assert prepared.shape == (2, 3, 64, 96)
    assert prepared.dtype == torch.uint8
    expected = stretch(decode_rgb(picture.read_bytes(), WIDTH, HEIGHT), (64, 96))
    assert np.array_equal(prepared[0].permute(1, 2, 0).numpy(), expected)
    assert prepare([], (64, 96)).shape == (0, 3, 64, 96)


def test_a_broken_image_among_others_is_named(sources: dict[str, Path], picture: Path) -> None:
    with pytest.raises(ValueError, match="image 1: a broken PNG image"):
        load(sources["exported"], "cpu")([picture, picture.read_bytes()[:2000]])


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def test_odd_images_become_rgb_as_in_training() -> None:
    levels = np.arange(256, dtype=np.uint16).reshape(16, 16)
    for image, kind in (
        (Image.fromarray(levels.astype(np.uint8)), "PNG"),
        (Image.fromarray(levels * 257), "PNG"),
        (Image.fromarray(levels.astype(np.uint8)).convert("P"), "GIF"),
        (Image.merge("RGBA", [Image.fromarray(levels.astype(np.uint8))] * 4), "PNG"),
        (Image.merge("CMYK", [Image.fromarray(levels.astype(np.uint8))] * 4), "JPEG"),
    ):
        data = encoded(image, kind)
        assert np.array_equal(np.asarray(read_image(data)), decode_rgb(data, 16, 16)), (image.mode, kind)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (b"not an image", "cannot be opened"),
        ("/nowhere/image.jpg", "neither a file here nor base64"),
        (base64.b64encode(b"text").decode(), "cannot be opened"),
        (encoded(Image.effect_noise((64, 64), 90).convert("RGB"), "JPEG")[:700], "broken JPEG"),
        (np.zeros((4, 4), np.uint8), r"must be \[H, W, 3\]"),
        (np.zeros((4, 4, 3), np.float32), "uint8"),
        (np.full((4, 4, 3), 300), r"0\.\.255"),
    ],
)
def test_what_is_no_image_is_refused_with_the_reason(value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_image(value)  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")  # Pillow's own, before ours
def test_a_small_file_of_very_many_pixels_is_not_decoded() -> None:
    bomb = encoded(Image.new("1", (12_000, 8_000)), "PNG")
    assert len(bomb) < 100_000
    with pytest.raises(ValueError, match="12000x8000 pixels exceeds the limit"):
        read_image(bomb)
