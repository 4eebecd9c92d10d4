"""Calibration of a detector, as `dfine calibrate` writes it to `calibration.json`; `from_json` reads it."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

from dfine_core.uncertainty.drift import DriftReference
from dfine_core.uncertainty.edge_calibration import EdgeCalibration
from dfine_core.uncertainty.score_calibration import ScoreCalibration

FILE = "calibration.json"
LEVELS = (0.5, 0.8, 0.9, 0.95)  # coverages that are fitted


@dataclass(frozen=True)
class DetectorCalibration:
    """Half-widths of edges at several coverages, and scores as probabilities."""

    edges: tuple[EdgeCalibration, ...]  # every edge by itself, by rising coverage
    boxes: tuple[EdgeCalibration, ...]  # the four edges of a box together
    scores: ScoreCalibration
    images: int  # that it was fitted on
    sha256: str | None  # of the weights' file
    reference: DriftReference | None = None  # values of the images, which new ones are compared with

    def fitted(self, *, joint: bool = False) -> tuple[EdgeCalibration, ...]:
        """Half-widths at every fitted coverage: of each edge by itself, or jointly of the four of a box."""
        return self.boxes if joint else self.edges

    def find(self, coverage: float, *, joint: bool = False) -> EdgeCalibration | None:
        """Half-widths at a coverage; None if it was not fitted."""
        return next((each for each in self.fitted(joint=joint) if abs(each.coverage - coverage) < 1e-9), None)

    def at(self, coverage: float, *, joint: bool = False) -> EdgeCalibration:
        """Half-widths at one of the fitted coverages.

        Raises:
            ValueError: there are others.
        """
        found = self.find(coverage, joint=joint)
        if found is not None:
            return found
        known = ", ".join(f"{calibration.coverage:g}" for calibration in self.fitted(joint=joint))
        raise ValueError(f"coverage ({coverage:g}) must be one of those that were fitted: {known}")

    def to_json(self, **more: Any) -> bytes:
        """Content of the file; `more` is written beside the calibration and ignored by `from_json`."""
        content = {
            "edges": [calibration.to_plain() for calibration in self.edges],
            "boxes": [calibration.to_plain() for calibration in self.boxes],
            "scores": self.scores.to_plain(),
            "images": self.images,
            "sha256": self.sha256,
            "reference": None if self.reference is None else self.reference.to_plain(),
        }
        return json.dumps(content | more, indent=1).encode()

    def metadata(self) -> dict[str, Any]:
        """Plain values for the metadata of a file that holds the weights too: without digest and reference."""
        left_out = ("sha256", "reference")
        return {name: value for name, value in json.loads(self.to_json()).items() if name not in left_out}

    def bound_to(self, weights: bytes) -> Self:
        """The same calibration for a file with the same weights."""
        return replace(self, sha256=hashlib.sha256(weights).hexdigest())

    @property
    def digest(self) -> str:
        """SHA-256 over everything that was fitted."""
        return hashlib.sha256(replace(self, sha256=None).to_json()).hexdigest()

    @classmethod
    def from_json(cls, content: bytes) -> Self:
        """Read the content of the file.

        Raises:
            ValueError: it is no calibration.
        """
        try:
            return cls.from_plain(json.loads(content))
        except RecursionError:
            raise ValueError("calibration cannot be read: nested too deeply") from None

    @classmethod
    def from_plain(cls, content: Mapping[str, Any]) -> Self:
        """Read plain values.

        Raises:
            ValueError: they are no calibration.
        """
        try:
            edges, boxes = (
                tuple(EdgeCalibration.from_plain(each) for each in content[key]) for key in ("edges", "boxes")
            )
            sha256 = content["sha256"]
            scores, images = ScoreCalibration.from_plain(content["scores"]), int(content["images"])
            plain = content.get("reference")
            reference = None if plain is None else DriftReference.from_plain(plain)
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"calibration cannot be read: {error!r}") from None
        if not (sha256 is None or isinstance(sha256, str)) or any(each.joint for each in edges):
            raise ValueError("calibration cannot be read: its edges or its sha256 are of another kind")
        return cls(edges, boxes, scores, images, sha256, reference)
