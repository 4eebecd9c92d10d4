"""The logged model: loaded by MLflow elsewhere, it detects exactly what the trained detector detects."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from mlflow import MlflowClient
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save_file

from dfine_core import Detector, ModelConfig
from dfine_core.model.postprocess import postprocess
from pipeline.data.augment.decode import decode_rgb, stretch
from pipeline.tracking.mlflow_writer import MlflowWriter
from pipeline.tracking.model import log_detector, save_detector
from pipeline.tracking.outbox import Outbox
from pipeline.tracking.settings import TrackingSettings
from pipeline.tracking.tracker import DatasetInput, Tracker

with warnings.catch_warnings():  # on import, MLflow warns about type hints of its own
    warnings.simplefilter("ignore")
    from pipeline.tracking.served_detector import PythonModelContext, ServedDetector

# MLflow's database layer uses options that SQLAlchemy 2.1 has deprecated; this project does not call SQLAlchemy.
pytestmark = pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SADeprecationWarning")

CATEGORIES = ("cat", "dog", "traffic light")
CONFIG = ModelConfig.variant("n", num_classes=len(CATEGORIES), input_size=(96, 128), num_queries=50)
WIDTH, HEIGHT = 173, 141

# A foreign program: another folder, nothing of this project on its path.
PREDICTION = """
import base64, json, sys
import mlflow, numpy as np, pandas as pd
uri, tracking_uri, path = sys.argv[1:]
mlflow.set_tracking_uri(tracking_uri)
model = mlflow.pyfunc.load_model(uri)
encoded = open(path, "rb").read()
pixels = np.load(path + ".npy")
inputs = {
    "path": [path], "bytes": [encoded], "base64": [base64.b64encode(encoded).decode()], "array": [pixels],
}
outputs = {
    kind: model.predict(pd.DataFrame({"image": values}), params={"threshold": 0.0}) for kind, values in inputs.items()
}
outputs["records"] = model.predict([{"image": path}], params={"threshold": 0.0})
outputs["ten"] = model.predict(pd.DataFrame({"image": [path] * 10}), params={"threshold": 0.0})[9:]
outputs["default threshold"] = model.predict(pd.DataFrame({"image": [path]}))
import dfine_core
print(json.dumps({"outputs": outputs, "dfine_core": dfine_core.__file__, "pipeline": "pipeline" in sys.modules}))
"""


@pytest.fixture(scope="module")
def detector() -> Detector:
    torch.manual_seed(0)
    made = Detector(CONFIG).eval()
    with torch.no_grad():  # scores on both sides of the default threshold
        for head in made.decoder.dec_score_head:
            head.bias += 4.2
    return made


@pytest.fixture(scope="module")
def image_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A PNG, with its pixels as .npy next to it."""
    coarse = np.random.default_rng(0).integers(0, 256, (12, 15, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
    path = tmp_path_factory.mktemp("image") / "image.png"
    image.save(path)
    np.save(f"{path}.npy", np.asarray(image))
    return path


@pytest.fixture(scope="module")
def weights(detector: Detector, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "weights.safetensors"
    save_file({key: tensor.clone() for key, tensor in detector.state_dict().items()}, path)
    return path


def expected(detector: Detector, image_path: Path) -> tuple[NDArray[np.float32], NDArray[np.float32], list[int]]:
    """Boxes, scores and labels of an evaluation, with the decoding of the training."""
    pixels = stretch(decode_rgb(image_path.read_bytes(), WIDTH, HEIGHT), CONFIG.input_size)
    with torch.inference_mode():
        output = detector(torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255)
        detections = postprocess(output.logits, output.boxes, torch.tensor([[WIDTH, HEIGHT]]), 150)
    return detections.boxes[0].numpy(), detections.scores[0].numpy(), detections.labels[0].tolist()


@pytest.mark.slow  # another process imports MLflow and torch
def test_a_registered_model_loads_elsewhere_and_detects_the_same(
    detector: Detector, weights: Path, image_path: Path, tmp_path: Path
) -> None:
    settings = TrackingSettings.resolve(tmp_path, experiment="e", run_name="r", uri=f"sqlite:///{tmp_path}/mlflow.db")
    with Tracker(tmp_path / "outbox", settings) as tracker:
        val = DatasetInput("shapes/val", f"sha256:{'a1' * 32}", "/shapes/val", "validation")
        tracker.begin({}, {}, [val])
        tracker.metrics({"val/AP": 0.5}, step=40)
        log_detector(
            tracker,
            config=CONFIG,
            weights=weights,
            categories=CATEGORIES,
            metrics={"val/AP": 0.5},
            example=image_path.read_bytes(),
            step=40,
            dataset=val,
            registered_model_name="dfine",
            alias="champion",
        )
        outbox = Outbox(tmp_path / "outbox", None)
        (event,) = [event for _, event in outbox.next_events(10) if event["kind"] == "model"]
        assert tracker.flush(60)

        # The same event once more, as after a crash before it was noted: one model, one version.
        writer = MlflowWriter(settings, run_key=tracker.run_key, started_at=0, content_of=outbox.content_of)
        writer.open_run(tracker.run_id)
        writer.send([event])
    client = MlflowClient(settings.uri)
    run = client.get_run(str(tracker.run_id))
    (logged,) = client.search_logged_models([run.info.experiment_id])
    assert (logged.name, logged.source_run_id) == ("detector", run.info.run_id)
    assert [(model.model_id, model.step) for model in run.outputs.model_outputs] == [(logged.model_id, 40)]
    assert [row.step for row in client.get_metric_history(run.info.run_id, "val/AP")] == [40]
    assert [(metric.key, metric.value, metric.step) for metric in logged.metrics] == [("val/AP", 0.5, 40)]
    (used,) = run.inputs.dataset_inputs
    assert [(metric.dataset_name, metric.dataset_digest) for metric in logged.metrics] == [
        (used.dataset.name, used.dataset.digest)
    ]
    assert used.dataset.name == "shapes/val"
    assert [version.version for version in client.search_model_versions("name = 'dfine'")] == [1]

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    done = subprocess.run(
        [sys.executable, "-I", "-c", PREDICTION, "models:/dfine@champion", settings.uri, str(image_path)],
        cwd=elsewhere,
        env={"PATH": os.environ["PATH"], "HOME": str(elsewhere), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert "/code/dfine_core/" in report["dfine_core"], "it used the project's own code"
    assert not report["pipeline"]

    boxes, scores, labels = expected(detector, image_path)
    deployed_boxes, deployed_scores, _ = expected(fresh_deployed(detector), image_path)
    outputs = report["outputs"]
    assert list(outputs) == ["path", "bytes", "base64", "array", "records", "ten", "default threshold"]
    strong = int((scores >= 0.4).sum())
    assert 0 < strong < len(scores)
    for kind, (output,) in outputs.items():
        count = strong if kind == "default threshold" else len(scores)
        assert output["labels"] == labels[:count], kind
        assert output["names"] == [CATEGORIES[label] for label in labels[:count]]
        np.testing.assert_allclose(output["scores"], deployed_scores[:count], rtol=0, atol=1e-6)
        np.testing.assert_allclose(output["boxes"], deployed_boxes[:count], rtol=1e-5, atol=1e-5)
        # Fusing convolutions and norms rounds otherwise than computing them one after the other.
        np.testing.assert_allclose(output["scores"], scores[:count], rtol=0, atol=1e-5)
        np.testing.assert_allclose(output["boxes"], boxes[:count], rtol=0, atol=1e-5 * WIDTH)


def fresh_deployed(detector: Detector) -> Detector:
    copy = Detector(CONFIG)
    copy.load_state_dict(detector.state_dict())
    return copy.deploy()


@pytest.fixture(scope="module")
def saved(weights: Path, image_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "model"
    save_detector(folder, config=CONFIG, weights=weights, categories=CATEGORIES, example=image_path.read_bytes())
    return folder


def test_it_detects_what_evaluation_detects(detector: Detector, saved: Path, image_path: Path) -> None:
    artifacts = {"weights": saved / "artifacts/weights.safetensors", "description": saved / "artifacts/detector.json"}
    context = PythonModelContext({name: str(path) for name, path in artifacts.items()}, {})
    served = ServedDetector()
    served.load_context(context)
    boxes, scores, labels = expected(detector, image_path)
    for value in (str(image_path), image_path.read_bytes(), np.load(f"{image_path}.npy")):
        (output,) = served.predict(context, pd.DataFrame({"image": [value]}), {"threshold": 0.0})
        assert output["labels"] == labels
        np.testing.assert_allclose(output["scores"], scores, rtol=0, atol=1e-5)
        np.testing.assert_allclose(output["boxes"], boxes, rtol=0, atol=1e-5 * WIDTH)
    (output,) = served.predict(context, pd.DataFrame({"image": [str(image_path)]}))
    assert 0 < len(output["scores"]) == (scores >= 0.4).sum() < len(scores)


def test_a_saved_model_holds_no_pickle_and_no_foreign_path(saved: Path) -> None:
    files = [path for path in saved.rglob("*") if path.is_file()]
    assert (saved / "code" / "dfine_core" / "model" / "detector.py") in files
    suffixes = {path.suffix for path in files}
    assert suffixes <= {"", ".py", ".json", ".yaml", ".txt", ".safetensors"}
    project = str(Path(__file__).parents[2])
    assert not [path for path in files if path.suffix != ".safetensors" and project in path.read_text()]


def test_categories_must_be_as_many_as_the_detector_has_classes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="1 categories for a detector of num_classes 3"):
        save_detector(tmp_path / "m", config=CONFIG, weights=tmp_path, categories=["cat"], example=b"")
