"""The detector that MLflow serves. MLflow copies this file into the model and runs it there, next to `dfine_core`; so it
imports nothing else of this project.

An image is a path, encoded bytes, their base64 text, or an array [H, W, 3] of uint8 RGB.
"""

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
from mlflow.pyfunc.model import PythonModel, PythonModelContext

from dfine_core.checkpoints.calibration_file import calibration_beside
from dfine_core.image_detections import ImageDetections
from dfine_core.inference import from_description


class ServedDetector(PythonModel):
    """Detector behind MLflow's `predict`."""

    def load_context(self, context: PythonModelContext) -> None:
        """Load the detector from the model's artifacts."""
        description, weights = (Path(context.artifacts[name]) for name in ("description", "weights"))
        content = weights.read_bytes()
        loaded = from_description(description.read_bytes(), content, str(weights)).deploy()
        self.loaded = replace(
            loaded, calibration=calibration_beside(weights.parent, hashlib.sha256(content).hexdigest())
        )

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> list[dict[str, Any]]:
        """Detect in every image; return {"boxes", "scores", "labels", "names"} for each, best detections first.

        Boxes are xyxy in pixels of the given image; they may extend beyond its border.

        Args:
            model_input: images in the column "image".
            params: "threshold" of the score; without it the detector's own, class by class.
        """
        given = (params or {}).get("threshold")
        threshold = None if given is None else float(given)
        return [_as_plain(detections) for detections in self.loaded(list(model_input["image"]), threshold)]


def _as_plain(detections: ImageDetections) -> dict[str, Any]:
    return {
        "boxes": detections.boxes.tolist(),
        "scores": detections.scores.tolist(),
        "labels": detections.labels.tolist(),
        "names": list(detections.names),
    }


mlflow.models.set_model(ServedDetector())
