"""Activation of weights that lie in a file alone: stated in the file, or told by its frozen norms or its name.

An activation has no parameters, so weights of D-FINE (ReLU) and of DEIM (SiLU) have the same keys and shapes, and each loads into
the network of the other, which then computes something else.
"""

import json
import logging
import os
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

STATED = "activation"  # key beside the weights of a `.pth`, and in the metadata of a safetensors file
ACTIVATIONS = ("relu", "silu")
MAX_HEADER = 100_000_000  # bytes; the limit of safetensors itself
_BY_NAME = {"deim": "silu", "dfine": "relu", "d-fine": "relu"}  # in this order: files of DEIM name both
log = logging.getLogger(__name__)


def recognise_activation(weights: Mapping[str, Tensor], path: str, stated: str | None) -> str | None:
    """Find out the activation that a detector in a file was trained with; None if nothing tells.

    Frozen norms of the backbone tell ReLU: D-FINE freezes them in L and X, and so do the fine-tunings of DEIM that start from it.

    Args:
        stated: in the file, by this project.

    Raises:
        ValueError: what is stated is no activation.
    """
    if stated is not None:
        if stated not in ACTIVATIONS:
            raise ValueError(f"{path}: its activation {stated!r} is none of {', '.join(ACTIVATIONS)}")
        return stated
    norms = [key.removesuffix(".running_var") for key in weights if _in_backbone(key)]
    if norms and not any(f"{norm}.num_batches_tracked" in weights for norm in norms):
        return "relu"
    words = re.sub(r"[^a-z-]+", "_", os.path.basename(path).lower())
    return next((activation for word, activation in _BY_NAME.items() if word in words), None)


def settle_activation(weights: Mapping[str, Tensor], path: str, stated: str | None, given: str | None) -> str:
    """Activation to build a detector with: the given one, else the recognised one, else D-FINE's with a warning.

    Raises:
        ValueError: the file states another one than is given.
    """
    found = recognise_activation(weights, path, stated)
    if given is not None and stated not in (None, given):
        raise ValueError(f"{path}: its weights were trained with {stated}, not {given}")
    if given is None and found is None:
        log.warning(
            "%s does not name its activation: taken as D-FINE's (relu). For weights of DEIM give activation='silu', or make a"
            " folder that names it: dfine weights convert %s --activation silu --to safetensors --out FOLDER",
            *(path, path),
        )
    elif given is None and stated is None and found == "silu":
        log.warning("%s: taken as weights of DEIM (silu), by the name of the file", path)
    return given or found or "relu"


def stated_in_pickle(content: Any) -> str | None:
    """Activation beside the weights in the content of a `.pth`."""
    found = content.get(STATED) if isinstance(content, dict) else None
    return found if isinstance(found, str) else None


def stated_in_safetensors(content: bytes) -> str | None:
    """Activation in the metadata of a safetensors file; None for a file that is damaged, too."""
    length = int.from_bytes(content[:8], "little")
    if length > min(len(content) - 8, MAX_HEADER):
        return None
    try:
        metadata = json.loads(content[8 : 8 + length]).get("__metadata__") or {}
    except (ValueError, AttributeError, RecursionError):
        return None
    found = metadata.get(STATED) if isinstance(metadata, dict) else None
    return found if isinstance(found, str) else None


def _in_backbone(key: str) -> bool:
    return key.startswith("backbone.") and key.endswith(".running_var")
