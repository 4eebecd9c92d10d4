"""D-FINE network, from images to detections: backbone, hybrid encoder, decoder."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, Self, cast

import torch
from torch import Tensor, nn

from dfine_core.config import ModelConfig
from dfine_core.model.decoder import Decoder
from dfine_core.model.denoising import sample_queries_for
from dfine_core.model.hgnetv2 import HGNetv2
from dfine_core.model.hybrid_encoder import HybridEncoder
from dfine_core.structures import DenoisingQueries, DetectorOutput, Targets

# Derived from the input size, so neither kept nor loaded; `weights.save_released` writes them for other programs.
DERIVED_KEYS = ("decoder.anchors", "decoder.valid_mask")


class Detector(nn.Module):
    """Whole network. Its state dict has the released keys, less the two that follow from the input size."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.backbone = HGNetv2(config)
        self.decoder = Decoder(config)
        self.encoder = HybridEncoder(config, self.backbone.out_channels)
        nn.Module.register_load_state_dict_pre_hook(self, _prepare_state_dict)

    def forward(
        self,
        images: Tensor,
        targets: Sequence[Mapping[str, Tensor]] | Targets | None = None,
        denoising: DenoisingQueries | Literal[False] | None = None,
        *,
        generator: torch.Generator | None = None,
        every_layer: bool = False,
    ) -> DetectorOutput:
        """Detect objects, and in training predict for denoising queries too.

        Args:
            images: [B, 3, H, W] in [0, 1], not normalised by mean and deviation.
            targets: in training, one {"labels": (G,), "boxes": (G, 4) cxcywh in [0, 1]} per image, or packed.
            denoising: None samples a group from the targets, False does without.
            generator: source of the device's random numbers, for a denoising group that does not depend on global state.
            every_layer: in evaluation too, return the predictions of each layer (`output.matching`).

        Raises:
            ValueError: for an image size or targets that cannot be taken.
        """
        problems = self.config.size_problems(*images.shape[-2:])
        if problems:
            raise ValueError(problems[0].replace("input_size", "images of size"))
        queries = None
        if self.training and targets is not None and denoising is not False:
            packed = Targets.pack(targets, self.config.num_classes, images.device)
            queries = denoising or sample_queries_for(self.config, packed, generator)
        *maps, attended = self.encoder(self.backbone(images), with_attended=True)
        output: DetectorOutput = self.decoder(maps, queries, every_layer)
        return replace(output, encoder_map=attended) if self.training or every_layer else output

    def deploy(self, *, as_released: bool = False) -> Self:
        """Fuse convolutions with their norms and drop what only training needs, in place. Cannot be undone.

        Args:
            as_released: fuse the pyramid alone, for the published number of parameters; else backbone and projections, too.
        """
        self.eval()
        if not as_released:
            self.backbone.deploy()
        self.encoder.deploy(as_released=as_released)
        self.decoder.deploy(as_released=as_released)
        return self


def _prepare_state_dict(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: object) -> None:
    """Drop derived keys, and refuse weights whose distributions have another meaning than this model's."""
    config = cast(Detector, module).config
    for key in DERIVED_KEYS:
        state_dict.pop(prefix + key, None)
    for name in ("up", "reg_scale"):
        stored = state_dict.get(f"{prefix}decoder.{name}")
        if stored is not None and not math.isclose(float(stored), getattr(config, name), rel_tol=1e-6):
            raise ValueError(
                f"the weights were made with {name} = {float(stored):g}, this model has {getattr(config, name):g}:"
                f" build it with {name}={float(stored):g}, or re-bin the weights with dfine_core.checkpoints.rebinning"
            )
