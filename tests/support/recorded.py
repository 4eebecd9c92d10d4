"""Golden recordings of the published detectors, and deterministic weights and inputs to repeat them with.

Every tensor is a function of its state-dict key, its shape and a seed, from NumPy's frozen legacy stream, so two programs
that agree on keys and shapes hold the same weights.
"""

import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dfine_core.config import LossConfig
from dfine_core.model.denoising import positive_slots
from dfine_core.structures import DenoisingQueries

FOLDER = Path(__file__).parents[1] / "golden"
DERIVED = ("decoder.anchors", "decoder.valid_mask")
CONSTANT = ("up", "reg_scale", "num_points_scale", "num_batches_tracked")


@dataclass(frozen=True)
class Recording:
    case: dict[str, Any]
    arrays: dict[str, np.ndarray]

    def tensor(self, name: str) -> Tensor:
        return torch.from_numpy(self.arrays[name])

    def json(self, name: str) -> Any:
        return json.loads(str(self.arrays[name]))

    @property
    def encoder_maps(self) -> list[Tensor]:
        return [self.tensor(name) for name in sorted(self.arrays) if name.startswith("encoder_")]


def denoising_queries(recording: Recording, targets: Sequence[Mapping[str, Tensor]]) -> DenoisingQueries:
    """Denoising group that the recorded program sampled for the same targets."""
    groups = int(recording.arrays["dn.groups"])
    image, query, target = positive_slots([len(each["labels"]) for each in targets], groups)
    return DenoisingQueries(
        labels=recording.tensor("dn.class").long(),
        reference_logits=recording.tensor("dn.bbox"),
        attention_mask=recording.tensor("dn.mask"),
        groups=groups,
        positive_image=image,
        positive_query=query,
        positive_target=target,
    )


def recordings(kind: str) -> list[str]:
    names = sorted(path.stem for path in FOLDER.glob(f"{kind}_*.npz"))
    assert names, f"no {kind} recordings in {FOLDER}"
    return names


def load(name: str) -> Recording:
    with np.load(FOLDER / f"{name}.npz", allow_pickle=False) as file:
        arrays = {key: file[key] for key in file.files}
    return Recording(json.loads(str(arrays["case"])), arrays)


def settings(case: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `ModelConfig` in which a recorded case differs from its variant: DEIM's activation, loss and freezing."""
    found: dict[str, Any] = {**case.get("decoder", {}), **case.get("backbone", {})}
    if case.get("criterion"):
        found["loss"] = LossConfig(classification=case["criterion"]["loss"], mal_gamma=case["criterion"]["gamma"])
    return found


def keys_and_shapes(variant: str) -> dict[str, list[int]]:
    shapes: dict[str, list[int]] = json.loads((FOLDER / f"keys_{variant}.json").read_text())
    return shapes


def deim_rates(variant: str) -> dict[str, Any]:
    """Parameter groups and learning rates that the released code of DEIM has on COCO."""
    rates: dict[str, Any] = json.loads((FOLDER / f"deim_lr_{variant}.json").read_text())
    return rates


@torch.no_grad()
def fill(model: nn.Module, seed: int) -> None:
    """Give every learnt tensor and running statistic its deterministic value."""
    for key, tensor in model.state_dict().items():
        leaf = key.rsplit(".", 1)[-1]
        if leaf in CONSTANT or not tensor.dtype.is_floating_point:
            continue
        stream = np.random.RandomState((zlib.crc32(key.encode()) ^ seed) & 0x7FFFFFFF)
        noise = torch.from_numpy(stream.standard_normal(tuple(tensor.shape)).astype(np.float32))
        if leaf == "running_var":
            noise = 1 + 0.1 * noise.abs()
        elif leaf == "scale" or (leaf == "weight" and tensor.dim() == 1):
            noise = 1 + 0.1 * noise
        elif tensor.dim() >= 2:
            noise = noise / max(1, tensor[0].numel()) ** 0.5
        else:
            noise = 0.1 * noise
        tensor.copy_(noise)


def images(batch: int, height: int, width: int, seed: int) -> Tensor:
    """Smooth random images [batch, 3, height, width] in [0, 1]."""
    shape = (batch, 3, max(2, height // 16), max(2, width // 16))
    coarse = torch.from_numpy(np.random.RandomState(seed).uniform(size=shape).astype(np.float32))
    return nn.functional.interpolate(coarse, size=(height, width), mode="bilinear", align_corners=False)


def targets(counts: list[int], num_classes: int, seed: int) -> list[dict[str, Tensor]]:
    """Boxes cxcywh inside the image, sides between 2 % and 70 % of it."""
    stream = np.random.RandomState(seed + 1)
    made = []
    for count in counts:
        size = np.exp(stream.uniform(np.log(0.02), np.log(0.7), size=(count, 2)))
        centre = size / 2 + stream.uniform(size=(count, 2)) * (1 - size)
        boxes = np.concatenate([centre, size], axis=1).astype(np.float32)
        labels = stream.randint(0, num_classes, size=(count,)).astype(np.int64)
        made.append({"labels": torch.from_numpy(labels), "boxes": torch.from_numpy(boxes)})
    return made


def batch_norms_to_eval(model: nn.Module) -> None:
    """Put batch norms into eval mode, as in the train recordings: batch statistics over tiny maps would amplify rounding."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
