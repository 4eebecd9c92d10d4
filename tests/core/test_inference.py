"""Loading of images and detectors: every source gives the same detections, and none runs code."""

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
from dfine_core import Detector, ImageDetections, LoadedDetector, LoadError, ModelConfig, load
from dfine_core.checkpoints.class_transfer import coco_names
from dfine_core.checkpoints.weights import save_released
from dfine_core.images import read_image
from dfine_core.inference import from_description, predict_batch, prepare
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
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    coarse = np.random.default_rng(0).integers(0, 256, (12, 15, 3), dtype=np.uint8)
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    Image.fromarray(coarse).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC).save(path)
    return path


def exported(folder: Path, weights: Path, config: ModelConfig = CONFIG) -> Path:
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(weights.read_bytes())
    (folder / "detector.json").write_text(json.dumps({"config": asdict(config), "categories": coco_names()}))
    return folder


def run_folder(folder: Path, detector: Detector) -> Path:
    """Run with two checkpoints: step 10 is the best and has the detector's weights, step 20 others."""
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
    detector: Detector, weights: Path, photo: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("sources")
    save_released(detector.state_dict(), CONFIG, folder / "released.pth")
    example = photo.read_bytes()
    save_detector(folder / "mlflow", config=CONFIG, weights=weights, categories=coco_names(), example=example)
    run = run_folder(folder / "run", detector)
    return {
        "released": folder / "released.pth",
        "mlflow": folder / "mlflow",
        "exported": exported(folder / "exported", weights),
        "run": run,
        "checkpoint": run / "checkpoints" / checkpoint.step_folder(10),
    }


def same(a: ImageDetections, b: ImageDetections) -> bool:
    tensors = all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("boxes", "scores", "labels"))
    return tensors and a.names == b.names


# Detectors


@pytest.mark.parametrize("kind", ["released", "mlflow", "run", "checkpoint"])
def test_every_kind_of_source_gives_equal_detections(kind: str, sources: dict[str, Path], photo: Path) -> None:
    (expected,) = load(sources["exported"], "cpu")(photo)
    assert 0 < len(expected.scores) < 300
    assert (expected.scores >= 0.4).all()
    loaded = load(sources[kind], "cpu")
    assert loaded.config.input_size == CONFIG.input_size
    assert loaded.names == coco_names()
    (found,) = loaded(photo)
    assert same(found, expected)
    opened = open_detector(str(sources[kind]))
    assert opened.origin == loaded.origin
    assert same(opened(photo)[0], expected)


def test_category_ids_are_the_data_s_the_published_ones_or_the_labels(sources: dict[str, Path]) -> None:
    assert load(sources["run"], "cpu").category_ids[:2] == (7, 8)
    assert load(sources["released"], "cpu").category_ids[-1] == 90
    assert load(sources["exported"], "cpu").category_ids == tuple(range(CLASSES))


@pytest.mark.parametrize("variant", ["n", "s", *(pytest.param(name, marks=pytest.mark.slow) for name in "mlx")])
def test_variant_classes_bins_and_size_are_read_off_a_released_file(variant: str, tmp_path: Path) -> None:
    config = ModelConfig.variant(variant, num_classes=366, input_size=(640, 512), reg_max=24, up=0.25)
    save_released(Detector(config).state_dict(), config, tmp_path / "released.pth")
    loaded = load(tmp_path / "released.pth", "cpu")
    assert loaded.config == config
    assert loaded.names[:2] == ("class_0", "Person")
    assert loaded.category_ids[1] == 1


def test_it_detects_what_evaluation_detects(sources: dict[str, Path], detector: Detector, photo: Path) -> None:
    pixels = stretch(decode_rgb(photo.read_bytes(), WIDTH, HEIGHT), CONFIG.input_size)
    with torch.no_grad():
        output = detector(torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255)
    scores, order = output.logits[0].sigmoid().flatten().sort(descending=True)
    query = order // CLASSES
    centre, size = output.boxes[0][query].split(2, -1)
    boxes = torch.cat([centre - size / 2, centre + size / 2], -1) * torch.tensor([WIDTH, HEIGHT, WIDTH, HEIGHT])
    (found,) = load(sources["exported"], "cpu")(photo, threshold=0.0)
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
    assert found.scores.shape == (2, 300)  # out of 75 queries x 80 classes
    few = Detector(CONFIG.with_(num_classes=2)).eval()
    with torch.no_grad():
        assert predict_batch(few, pixels, sizes)[0].scores.shape == (2, 150)


def test_paths_bytes_arrays_and_images_single_or_several_are_one(sources: dict[str, Path], photo: Path) -> None:
    loaded = load(str(sources["exported"]), "cpu")
    (expected,) = loaded([photo])
    pixels = np.asarray(Image.open(photo))
    for image in (str(photo), photo, photo.read_bytes(), pixels, Image.open(photo)):
        (found,) = loaded(image)
        assert same(found, expected), type(image)
    assert all(same(found, expected) for found in loaded(pixels[None]))
    several = loaded([pixels, pixels[:50], photo], batch_size=2)
    assert [len(found.scores) > 0 for found in several] == [True] * 3
    torch.testing.assert_close(several[2].boxes, expected.boxes)
    assert loaded([]) == []


def test_deployed_it_detects_the_same_up_to_rounding(sources: dict[str, Path], photo: Path) -> None:
    loaded = load(sources["exported"], "cpu")
    (plain,) = loaded(photo)
    (fused,) = loaded.deploy()(photo)
    torch.testing.assert_close(fused.boxes, plain.boxes, rtol=1e-5, atol=1e-3)


# Draw, save, print


def test_a_saved_detector_opens_again_with_equal_detections(
    sources: dict[str, Path], photo: Path, tmp_path: Path
) -> None:
    loaded = load(sources["run"], "cpu")
    folder = loaded.save(tmp_path / "new" / "saved")
    assert sorted(path.name for path in folder.iterdir()) == ["detector.json", "model.safetensors"]
    again = load(folder, "cpu")
    assert (again.config, again.names, again.category_ids) == (loaded.config, loaded.names, loaded.category_ids)
    assert same(again(photo)[0], loaded(photo)[0])
    again.save(folder)  # over itself
    assert same(load(folder, "cpu")(photo)[0], loaded(photo)[0])


def test_a_detector_is_saved_neither_fused_nor_among_other_files(sources: dict[str, Path], tmp_path: Path) -> None:
    loaded = load(sources["exported"], "cpu")
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(FileExistsError, match=r"notes\.txt"):
        loaded.save(tmp_path)
    with pytest.raises(ValueError, match=r"save it before"):
        loaded.deploy().save(tmp_path / "fused")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_printing_a_detector_names_origin_classes_size_and_device(sources: dict[str, Path]) -> None:
    loaded = load(sources["run"], "cpu")
    text = str(loaded)
    assert len(text.splitlines()) <= 7
    assert loaded.path == f"{sources['checkpoint']}/ema.safetensors"
    numbers = sum(parameter.numel() for parameter in loaded.detector.parameters())
    stored = Path(loaded.path).stat().st_size
    assert loaded.size_bytes == pytest.approx(stored, rel=0.02)  # the file has a header besides
    for part in (
        f"from {sources['checkpoint']}",
        loaded.path,
        "80: person, bicycle",
        "72 more",
        "160 x 96 pixels",
        f"{numbers / 1e6:.2f} million",
        f"{loaded.size_bytes / 1e6:.1f} MB",
        "cpu",
    ):
        assert part in text, part
    released = load(sources["released"], "cpu")
    assert released.path == released.origin == str(sources["released"])


@pytest.mark.parametrize("threshold", [-0.1, 1.5, float("nan"), 40])
def test_a_threshold_outside_0_to_1_is_refused(threshold: float, sources: dict[str, Path], photo: Path) -> None:
    with pytest.raises(ValueError, match=rf"threshold \({threshold}\) must lie in 0\.\.1"):
        load(sources["exported"], "cpu")(photo, threshold=threshold)


def test_iterating_gives_every_detection_as_plain_values(sources: dict[str, Path], photo: Path) -> None:
    (found,) = load(sources["exported"], "cpu")(photo)
    rows = list(found)
    assert len(rows) == len(found) == len(found.scores) > 0
    assert [row.name for row in rows] == list(found.names)
    assert torch.tensor([row.box for row in rows]).equal(found.boxes)
    assert [row.label for row in rows] == found.labels.tolist()
    assert [row.score for row in rows] == found.scores.tolist()


def test_drawing_marks_the_boxes_and_leaves_the_rest_and_the_source_as_they_were(photo: Path) -> None:
    white = Image.new("RGB", (200, 150), "white")
    boxes = torch.tensor([[40.0, 60, 120, 120], [150, 2, 190, 146]])
    found = ImageDetections(boxes, torch.tensor([0.9, 0.5]), torch.tensor([0, 1]), ("cat", "dog"))
    rendered = np.asarray(found.draw(white))
    assert rendered.shape == (150, 200, 3)
    assert (np.asarray(white) == 255).all()
    coloured = (rendered != 255).any(-1)
    assert coloured[60:121, 40].all()  # left edge
    assert coloured[120, 40:121].all()  # lower edge
    assert not coloured[63:118, 43:118].any()  # the caption stands above its box, not in it
    assert coloured[45:58, 42:60].any()
    assert not coloured[:, :38].any()
    assert tuple(rendered[100, 40]) != tuple(rendered[100, 150])  # a colour for each class
    assert found.draw(photo).size == (WIDTH, HEIGHT)
    nothing = ImageDetections(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64), ())
    assert np.array_equal(np.asarray(nothing.draw(white)), np.asarray(white))


@pytest.mark.parametrize(
    "box",
    [(10.0, 0, 80, 60), (120.0, 40, 199, 149), (-30.0, -20, 60, 50), (150.0, 100, 260, 190), (90.0, 70, 40, 30)],
)
def test_a_caption_stays_in_the_image_and_beside_its_box_where_there_is_room(box: tuple[float, ...]) -> None:
    white = Image.new("RGB", (200, 150), "white")
    found = ImageDetections(torch.tensor([box]), torch.tensor([0.5]), torch.tensor([2]), ("traffic light",))
    rendered = np.asarray(found.draw(white))
    left, right = sorted(np.clip((box[0], box[2]), 0, 199).astype(int))
    top, bottom = sorted(np.clip((box[1], box[3]), 0, 149).astype(int))
    assert (rendered[top + 3 : bottom - 2, left + 3 : right - 2] == 255).all()
    outside = rendered.copy()
    outside[top : bottom + 1, left : right + 1] = 255
    assert (outside != 255).any()


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


def test_a_folder_or_file_without_a_detector_is_refused_with_its_content(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("")
    torch.save({"w": torch.ones(1)}, tmp_path / "other.pth")
    for source, message in (
        (tmp_path, "it holds .*notes.txt"),
        (tmp_path / "nowhere", "does not exist"),
        (tmp_path / "nowhere.pth", r"nowhere\.pth does not exist"),
        (tmp_path / "other.pth", "not the weights of a detector"),
    ):
        with pytest.raises(LoadError, match=message):
            load(source)
        with pytest.raises(ConfigError, match=message):
            open_detector(str(source))


@pytest.mark.parametrize("source", ["models:/none@champion", "models:/none/1", "runs:/0123"])
def test_mlflow_uris_are_opened_by_the_pipeline_alone(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(LoadError, match=r"pipeline\.open_detector\.open_detector opens"):
        load(source)
    with pytest.raises(ConfigError, match="set MLFLOW_TRACKING_URI"):
        open_detector(source)


def test_a_damaged_checkpoint_is_named(detector: Detector, tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run", detector)
    path = run / "checkpoints" / checkpoint.step_folder(10) / "ema.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(LoadError, match=r"ema\.safetensors: is damaged"):
        load(path.parent)


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


def test_the_package_exports_the_functions_that_open_a_detector() -> None:
    assert dfine_core.load is load
    assert LoadedDetector.__name__ in dfine_core.__all__


# Images


def test_preparing_is_what_evaluation_does_to_images(photo: Path) -> None:
    image = read_image(photo)
    prepared = prepare([image, image.crop((0, 0, 50, 60))], (64, 96))
    assert prepared.shape == (2, 3, 64, 96)
    assert prepared.dtype == torch.uint8
    expected = stretch(decode_rgb(photo.read_bytes(), WIDTH, HEIGHT), (64, 96))
    assert np.array_equal(prepared[0].permute(1, 2, 0).numpy(), expected)
    assert prepare([], (64, 96)).shape == (0, 3, 64, 96)


def test_a_broken_image_among_others_is_named(sources: dict[str, Path], photo: Path) -> None:
    with pytest.raises(ValueError, match="image 1: a broken PNG image"):
        load(sources["exported"], "cpu")([photo, photo.read_bytes()[:2000]])


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
def test_a_value_that_is_no_image_is_refused_with_the_reason(value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_image(value)  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")  # Pillow's own, before ours
def test_a_small_file_of_very_many_pixels_is_not_decoded() -> None:
    bomb = encoded(Image.new("1", (12_000, 8_000)), "PNG")
    assert len(bomb) < 100_000
    with pytest.raises(ValueError, match="12000x8000 pixels exceeds the limit"):
        read_image(bomb)
