"""The detector as MLflow serves it. MLflow copies this file into the model and runs it there, beside `dfine_core`: it
imports nothing else of this project.

An image is a path, encoded bytes, their base64 text, or an array [H, W, 3] of uint8 RGB. As in training and evaluation,
EXIF orientation is not applied: boxes are in the pixels as they are stored.
"""

import base64
import binascii
import io
import json
import os
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import torch
from mlflow.pyfunc.model import PythonModel, PythonModelContext
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file

from dfine_core import Detector, ModelConfig
from dfine_core.config import LossConfig
from dfine_core.postprocess import postprocess
from dfine_core.weights import load_weights

BATCH = 8  # images at once
KEEP = 300  # detections of an image before the threshold
PIXEL_LIMIT = 89_478_485  # of one image, read from its header before any pixel is decoded


class ServedDetector(PythonModel):
    """`predict` answers one {"boxes", "scores", "labels", "names"} per image, best first."""

    def load_context(self, context: PythonModelContext) -> None:
        description = json.loads(Path(context.artifacts["description"]).read_text())
        config = description["config"]
        tuples = {name: tuple(value) for name, value in config.items() if isinstance(value, list)}
        self.config = ModelConfig(**config | tuples | {"loss": LossConfig(**config["loss"])})
        self.names: list[str] = description["categories"]  # by label
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.detector = Detector(self.config)
        load_weights(self.detector, load_file(context.artifacts["weights"]))
        self.detector.deploy().to(self.device)

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> list[dict[str, Any]]:
        """Boxes are xyxy in pixels of the image as it was given; they may reach over its border.

        Args:
            model_input: images in the column "image".
            params: "threshold" of the score.
        """
        threshold = float((params or {}).get("threshold", 0.4))
        values = list(model_input["image"])
        found: list[dict[str, Any]] = []
        for start in range(0, len(values), BATCH):
            found += self._detect([read_image(value) for value in values[start : start + BATCH]], threshold)
        return found

    @torch.inference_mode()
    def _detect(self, images: list[Image.Image], threshold: float) -> list[dict[str, Any]]:
        height, width = self.config.input_size
        stretched = [np.array(image.resize((width, height), Image.Resampling.BILINEAR)) for image in images]
        pixels = torch.from_numpy(np.stack(stretched)).to(self.device).permute(0, 3, 1, 2).float() / 255
        output = self.detector(pixels)
        sizes = torch.tensor([image.size for image in images], device=self.device)
        keep = min(KEEP, self.config.num_queries * self.config.num_classes)
        detections = postprocess(output.logits, output.boxes, sizes, keep)
        return [
            self._answer(boxes[scores >= threshold], scores[scores >= threshold], labels[scores >= threshold])
            for boxes, scores, labels in zip(detections.boxes, detections.scores, detections.labels, strict=True)
        ]

    def _answer(self, boxes: torch.Tensor, scores: torch.Tensor, labels: torch.Tensor) -> dict[str, Any]:
        return {
            "boxes": boxes.tolist(),
            "scores": scores.tolist(),
            "labels": labels.tolist(),
            "names": [self.names[label] for label in labels.tolist()],
        }


def read_image(value: str | os.PathLike[str] | bytes | NDArray[np.uint8] | list[Any]) -> Image.Image:
    """One image in RGB.

    Raises:
        ValueError: it is none, is broken or has too many pixels; says what was given.
    """
    if isinstance(value, np.ndarray | list):
        return _from_array(np.asarray(value))
    if isinstance(value, str) and not os.path.isfile(value):
        try:
            value = base64.b64decode(value, validate=True)
        except binascii.Error:
            raise ValueError(f"image {value[:80]!r} is neither a file here nor base64 text") from None
    try:
        image = Image.open(io.BytesIO(value) if isinstance(value, bytes) else value)
    except Exception as error:  # each of Pillow's formats raises errors of its own
        raise ValueError(f"an image cannot be opened: {error}") from error
    with image:
        if image.width * image.height > PIXEL_LIMIT:
            raise ValueError(f"an image of {image.width}x{image.height} pixels exceeds the limit of {PIXEL_LIMIT}")
        try:
            if image.mode.startswith("I;16"):
                return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
            return (image.convert("RGBA") if "transparency" in image.info else image).convert("RGB")
        except Exception as error:
            raise ValueError(f"a broken {image.format} image: {error}") from error


def _from_array(pixels: NDArray[Any]) -> Image.Image:
    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.size == 0 or pixels.dtype.kind not in "iu":
        raise ValueError(f"an image array must be [H, W, 3] of uint8, got {list(pixels.shape)} of {pixels.dtype}")
    if pixels.min() < 0 or pixels.max() > 255:
        raise ValueError(f"an image array must hold 0..255, got {pixels.min()}..{pixels.max()}")
    return Image.fromarray(pixels.astype(np.uint8))


mlflow.models.set_model(ServedDetector())
