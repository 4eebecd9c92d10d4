"""A frozen vision model of Transformers as a teacher: images in, a map of patch features out.

The model lies in a local folder: its `config.json` names a class of Transformers, and safetensors hold the weights. No code of
the folder runs, nothing is unpickled, nothing is fetched.
"""

import hashlib
import inspect
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.config import ConfigError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

STRIDE = 32  # of the detector's coarsest map
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, unless the folder has its own
CONFIG, PREPROCESSOR = "config.json", "preprocessor_config.json"
TRIED_GRID = (2, 3)  # patches, to see whether a model keeps their places


@dataclass(frozen=True)
class VisionFolder:
    """Facts about a model's folder, found without reading its weights."""

    path: Path
    config: "PretrainedConfig"
    patch_size: int
    width: int  # channels of the features
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def build(self) -> nn.Module:
        """Build the model with random weights, on the default device."""
        from transformers import AutoModel

        model: nn.Module = AutoModel.from_config(self.config, trust_remote_code=False)  # type: ignore[no-untyped-call]
        return model.eval()

    def load(self) -> nn.Module:
        """Load the model, frozen.

        Raises:
            ConfigError: the weights are not those of the configuration.
        """
        from transformers import AutoModel
        from transformers.utils import logging

        logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        try:
            model, found = AutoModel.from_pretrained(
                self.path,
                config=self.config,
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
                dtype=torch.float32,
            )
        except Exception as error:  # noqa: BLE001 - the library raises many kinds for files that are damaged
            raise ConfigError(f"teacher.features.model: {self.path} cannot be loaded: {error}") from None
        missing = sorted(name for name in found["missing_keys"] if "pooler" not in name)
        if missing or found["mismatched_keys"]:
            lacking = ", ".join([*missing, *(str(key) for key in found["mismatched_keys"])][:3])
            raise ConfigError(f"teacher.features.model: {self.path} lacks weights of its model: {lacking}")
        frozen: nn.Module = model.eval().requires_grad_(False)
        return frozen

    def digest(self) -> str:
        """SHA-256 of the configuration and the weights, in hex."""
        sha256 = hashlib.sha256()
        for file in [self.path / CONFIG, *_weight_files(self.path)]:
            sha256.update(file.name.encode())
            with file.open("rb") as content:
                sha256.update(hashlib.file_digest(content, "sha256").digest())
        return sha256.hexdigest()


def open_vision_folder(location: str) -> VisionFolder:
    """Examine the folder of a vision model.

    Raises:
        ConfigError: it is no folder of a model with patch tokens, or the library that reads it is not installed.
    """
    where = "teacher.features.model"
    path = Path(location)
    if not (path / CONFIG).is_file():
        raise ConfigError(
            f"{where}: {location} has no {CONFIG}: give the local folder of a Transformers model, such as a copy of DINOv2"
        )
    if not _weight_files(path):
        raise ConfigError(
            f"{where}: {location} has no safetensors: other formats run code when they are read. Save the model again with"
            " `model.save_pretrained(folder)`"
        )
    try:
        from transformers import AutoConfig
    except ImportError:
        raise ConfigError(f"{where} needs Transformers: pip install 'ray-dfine[teachers]'") from None
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        size = getattr(config, "patch_size", None)
        folder = VisionFolder(path, config, int(size), int(config.hidden_size), *_normalisation(path))  # type: ignore[arg-type]
        tokens = _tokens_of(folder)
    except Exception as error:  # noqa: BLE001 - models of every kind are tried
        raise ConfigError(f"{where}: {location} is no vision model with patch tokens: {_first_line(error)}") from None
    if tokens < TRIED_GRID[0] * TRIED_GRID[1]:
        raise ConfigError(
            f"{where}: {location} is no vision model with patch tokens: it gives {tokens} tokens for"
            f" {TRIED_GRID[0]} x {TRIED_GRID[1]} patches; plain vision transformers such as DINOv2 and DINOv3 fit"
        )
    return folder


def teacher_size(height: int, width: int, patch_size: int) -> tuple[int, int]:
    """Size of the images that a teacher sees, so that its patches lie as the positions of the student's coarsest map."""
    return height // STRIDE * patch_size, width // STRIDE * patch_size


class VisionTeacher(nn.Module):
    """A frozen model with its preprocessing. Its parameters never change and get no gradient."""

    def __init__(self, folder: VisionFolder, model: nn.Module, dtype: torch.dtype):
        super().__init__()
        self.patch_size, self.width, self.dtype = folder.patch_size, folder.width, dtype
        self.model = model.to(dtype)
        self.register_buffer("mean", torch.tensor(folder.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(folder.std).view(1, 3, 1, 1), persistent=False)
        self._arguments = _size_arguments(model)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Features of all patches, [B, C, H / 32, W / 32] in float32.

        Args:
            images: [B, 3, H, W] in [0, 1], as the student sees them.
        """
        height, width = images.shape[-2:]
        size = teacher_size(height, width, self.patch_size)
        images = (images.float() - self.get_buffer("mean")) / self.get_buffer("std")
        if (2 * size[0], 2 * size[1]) == (height, width):
            images = F.avg_pool2d(images, 2)
        else:
            images = F.interpolate(images, size=size, mode="bilinear", align_corners=False, antialias=True)
        with torch.autocast(images.device.type, enabled=False):
            tokens = self.model(pixel_values=images.to(self.dtype), **self._arguments).last_hidden_state
        grid = height // STRIDE, width // STRIDE
        patches: Tensor = tokens[:, tokens.shape[1] - grid[0] * grid[1] :]  # class and register tokens come first
        return patches.transpose(1, 2).unflatten(-1, grid).float()


def _tokens_of(folder: VisionFolder) -> int:
    """Number of tokens for a small image, found without computing."""
    rows, columns = TRIED_GRID
    with torch.device("meta"):
        model = folder.build()
        images = torch.empty(1, 3, rows * folder.patch_size, columns * folder.patch_size)
        tokens = model(pixel_values=images, **_size_arguments(model)).last_hidden_state
    if tokens.ndim != 3 or tokens.shape[-1] != folder.width:
        raise ValueError(f"its output has the shape {tuple(tokens.shape)}")
    return int(tokens.shape[1])


def _size_arguments(model: nn.Module) -> dict[str, Any]:
    """Arguments with which a model takes images of any size; some do so without being asked."""
    name = "interpolate_pos_encoding"
    return {name: True} if name in inspect.signature(model.forward).parameters else {}


def _weight_files(path: Path) -> list[Path]:
    return sorted(path.glob("*.safetensors"))


def _normalisation(path: Path) -> Iterator[tuple[float, ...]]:
    file = path / PREPROCESSOR
    content = json.loads(file.read_text()) if file.is_file() else {}
    for key, default in (("image_mean", MEAN), ("image_std", STD)):
        values = tuple(float(value) for value in content.get(key, default))
        if len(values) != 3:
            raise ValueError(f"{PREPROCESSOR}: {key} has {len(values)} values instead of 3")
        yield values


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
