"""Settings of the augmentation: probabilities and ranges."""

from dataclasses import dataclass, replace
from typing import ClassVar

Interval = tuple[float, float]


@dataclass(frozen=True)
class AugmentSettings:
    """Probability and range of every augmentation; the defaults are the released recipe.

    Intervals are bounds of uniform distributions.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}  # unknown keys of an experiment file are errors

    photometric_probability: float = 0.5  # for each of brightness, contrast, saturation, hue and channel order
    brightness: Interval = (0.875, 1.125)
    contrast: Interval = (0.5, 1.5)
    saturation: Interval = (0.5, 1.5)
    hue: Interval = (-0.05, 0.05)
    zoom_out_probability: float = 0.5
    zoom_out_factor: Interval = (1.0, 4.0)
    iou_crop_probability: float = 0.8
    iou_crop_options: tuple[float, ...] = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0)  # minimum IoU; 1 means no crop
    iou_crop_scale: Interval = (0.3, 1.0)  # per side
    iou_crop_aspect: Interval = (0.5, 2.0)
    iou_crop_trials: int = 40  # per option
    flip_probability: float = 0.5
    min_box_size: float = 1.0  # px, both before and after resizing

    # Beyond the released recipe. Large-scale jitter replaces zoom-out and IoU crop; the others are in mixing.py.
    large_scale_jitter_probability: float = 0.0
    large_scale_jitter_scale: Interval = (0.1, 2.0)
    mosaic_probability: float = 0.0
    mosaic_centre: Interval = (0.3, 0.7)  # fraction of each side of the canvas
    mixup_probability: float = 0.0
    mixup_weight: Interval = (0.45, 0.55)  # weight of the other image
    copy_paste_probability: float = 0.0
    copy_paste_object_probability: float = 0.5  # per object of the other image
    copy_paste_max_covered: float = 0.7  # objects covered by more than this fraction are dropped

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name.endswith("_probability") and not 0 <= value <= 1:
                raise ValueError(f"{name} ({value}) must lie in 0..1")
        if max(self.iou_crop_options, default=0) < 1:
            raise ValueError(
                f"iou_crop_options {self.iou_crop_options} must include 1 (no crop): there may be no crop that reaches any"
                " of the others"
            )

    @property
    def mixes(self) -> bool:
        """Whether samples are made of several images."""
        return any((self.mosaic_probability, self.copy_paste_probability, self.mixup_probability))

    def clean(self) -> "AugmentSettings":
        """Settings of the last epochs: flip and resize alone."""
        return replace(
            self,
            photometric_probability=0,
            zoom_out_probability=0,
            iou_crop_probability=0,
            large_scale_jitter_probability=0,
            mosaic_probability=0,
            mixup_probability=0,
            copy_paste_probability=0,
        )
