"""The detector as MLflow serves it. MLflow copies this file into the model and runs it there, beside `dfine_core`: it
imports nothing else of this project.

An image is a path, encoded bytes, their base64 text, or an array [H, W, 3] of uint8 RGB.
"""

from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
from mlflow.pyfunc.model import PythonModel, PythonModelContext

from dfine_core.inference import DEFAULT_THRESHOLD, ImageDetections, from_description


class ServedDetector(PythonModel):
    """`predict` answers one {"boxes", "scores", "labels", "names"} per image, best first."""

    def load_context(self, context: PythonModelContext) -> None:
        description, weights = (Path(context.artifacts[name]) for name in ("description", "weights"))
        self.loaded = from_description(description.read_bytes(), weights.read_bytes(), str(weights)).deploy()

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> list[dict[str, Any]]:
        """Boxes are xyxy in pixels of the image as it was given; they may reach over its border.

        Args:
            model_input: images in the column "image".
            params: "threshold" of the score.
        """
        threshold = float((params or {}).get("threshold", DEFAULT_THRESHOLD))
        return [_answer(found) for found in self.loaded(list(model_input["image"]), threshold)]


def _answer(found: ImageDetections) -> dict[str, Any]:
    return {
        "boxes": found.boxes.tolist(),
        "scores": found.scores.tolist(),
        "labels": found.labels.tolist(),
        "names": list(found.names),
    }


mlflow.models.set_model(ServedDetector())
