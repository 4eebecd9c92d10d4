"""First weights of a run: another run's checkpoint, a released file, or a backbone, made to fit by names and bins."""

import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from safetensors.torch import load as tensors_from_bytes
from torch import Tensor

from dfine_core import Detector
from dfine_core.class_transfer import coco_names, match_classes, objects365_names, transfer_classes
from dfine_core.rebinning import rebin
from dfine_core.weights import load_weights, read_checkpoint
from pipeline.config import ConfigError
from pipeline.data import storage
from pipeline.training import checkpoint

CLASS_ROWS = "decoder.denoising_class_embed.weight"  # one row per class, and one for padding
SCALE = "decoder.reg_scale"


@dataclass(frozen=True)
class Origin:
    """What was loaded, for the log and for the record."""

    lines: tuple[str, ...]
    parent: dict[str, str]


def load_initial(detector: Detector, source: str, names: Sequence[str]) -> Origin:
    """Load the weights at `source` into a freshly built detector.

    Args:
        names: of the detector's classes.

    Raises:
        ConfigError: for weights that are missing, damaged or cannot be made to fit.
    """
    try:
        weights, source_names, parent = _read(source)
        if any(key.startswith("stem.") for key in weights):
            load_weights(detector.backbone, weights)
            return Origin((f"backbone from {source}",), parent)
        return _fit(detector, weights, source_names, names, source, parent)
    except FileNotFoundError:
        raise ConfigError(f"init: {source} does not exist") from None
    except ValueError as error:
        raise ConfigError(f"init: {source}: {error}") from None


def _read(source: str) -> tuple[dict[str, Tensor], Sequence[str | None] | None, dict[str, str]]:
    if storage.exists(storage.join(source, checkpoint.METADATA)):
        metadata = checkpoint.read_metadata(source)
        weights = checkpoint.read_tensors(source, "ema", metadata)
        parent = {
            "checkpoint": source,
            "run": metadata.run,
            "step": str(metadata.step),
            "sha256": metadata.sha256["ema"],
        }
        if metadata.tracking_key:
            parent["run_key"] = metadata.tracking_key
        return weights, [category.name for category in metadata.categories], parent
    content = storage.read_bytes(source)
    parent = {"file": source, "sha256": hashlib.sha256(content).hexdigest()}
    if source.endswith(".safetensors"):
        return tensors_from_bytes(content), None, parent
    return read_checkpoint(io.BytesIO(content)), None, parent  # type: ignore[arg-type]


def _fit(
    detector: Detector,
    weights: Mapping[str, Tensor],
    source_names: Sequence[str | None] | None,
    names: Sequence[str],
    source: str,
    parent: dict[str, str],
) -> Origin:
    config, lines = detector.config, [f"weights from {source}"]
    fitted = dict(weights)
    if config.regression == "fdr" and SCALE in fitted:
        fitted, report = rebin(fitted, reg_max=config.reg_max, reg_scale=config.reg_scale, up=config.up)
        if report.source != report.target:
            lines.append(str(report))
    rows = len(fitted[CLASS_ROWS]) - 1 if CLASS_ROWS in fitted else 0
    known = source_names or _names_of(rows, names)
    if known is not None and list(known) != list(names):
        match = match_classes(known, names)
        fitted = transfer_classes(fitted, detector.state_dict(), match)
        lines.append(str(match))
    load_weights(detector, fitted)
    if not all(torch.isfinite(p).all() for p in detector.parameters()):
        raise ValueError("holds values that are not finite")
    return Origin(tuple(lines), parent)


def _names_of(rows: int, names: Sequence[str]) -> Sequence[str | None] | None:
    """Class names of a file that does not tell them."""
    if rows == len(coco_names()):
        return coco_names()
    if rows == len(objects365_names()):
        return objects365_names()
    if rows != len(names):
        raise ValueError(
            f"it has {rows} classes without names, the data has {len(names)}: only files with 80 (COCO) or 366 (Objects365)"
            " classes, or with as many as the data, can be taken without names; a checkpoint folder of this project names them"
        )
    return None  # as many: taken in order
