"""Settings of the augmentation: probabilities and ranges."""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

TILES = 4  # images of a mosaic

Interval = tuple[float, float]


@dataclass(frozen=True)
class AugmentSettings:
    """Probability and range of every augmentation; the defaults are the released recipe.

    Intervals are bounds of uniform distributions.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}  # unknown keys of an experiment file are errors

    # Values of keys that are left out, see `pipeline/augment_presets.yaml`.
    preset: Literal["aerial", "microscopy", "documents", "fixed_camera"] | None = None

    photometric_probability: float = 0.5  # for each of brightness, contrast, saturation, hue and channel order
    brightness: Interval = (0.875, 1.125)
    contrast: Interval = (0.5, 1.5)
    saturation: Interval = (0.5, 1.5)
    hue: Interval = (-0.05, 0.05)
    channel_permutation: bool = True  # False: colours keep their channels
    zoom_out_probability: float = 0.5
    zoom_out_factor: Interval = (1.0, 4.0)
    iou_crop_probability: float = 0.8
    iou_crop_options: tuple[float, ...] = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0)  # minimum IoU; 1 means no crop
    iou_crop_scale: Interval = (0.3, 1.0)  # per side
    iou_crop_aspect: Interval = (0.5, 2.0)
    iou_crop_trials: int = 40  # per option
    flip_probability: float = 0.5
    min_box_size: float = 1.0  # px, both before and after resizing

    # Off by default, as the released recipe has none of them. They act in all epochs, as the flip does.
    vertical_flip_probability: float = 0.0
    quarter_turn_probability: float = 0.0  # by 90, 180 or 270 degrees; 0.75: all four directions are equally likely
    # Beyond the released recipe, and off by default. Large-scale jitter replaces zoom-out and IoU crop.
    large_scale_jitter_probability: float = 0.0
    large_scale_jitter_scale: Interval = (0.1, 2.0)
    # Mosaic replaces zoom-out and IoU crop; in the dense stage alone.
    mosaic_probability: float = 0.0
    mosaic_short_side: int = 320  # px that each of the four images is resized to
    mosaic_rotation: float = 10.0  # degrees, either way
    mosaic_translation: float = 0.1  # share of each side of the mosaic, either way
    mosaic_scale: Interval = (0.5, 1.5)
    # Mixup of a whole micro-batch; in the dense stage alone.
    mixup_probability: float = 0.0
    mixup_ratio: Interval = (0.45, 0.55)  # weight of an image's own pixels
    # Copy-paste within a micro-batch that is not mixed up; until the clean epochs.
    copy_paste_probability: float = 0.0
    copy_paste_objects: int = 3  # pasted into each image, at most
    copy_paste_min_area: float = 100.0  # px^2 on the canvas; smaller objects are not pasted
    copy_paste_ratio: Interval = (0.45, 0.55)  # weight of the pixels below a pasted object; 0: opaque
    copy_paste_ring: Interval = (0.1, 0.25)  # pasted around an object, as a share of its sides

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name.endswith("_probability") and not 0 <= value <= 1:
                raise ValueError(f"{name} ({value}) must lie in 0..1")
        if max(self.iou_crop_options, default=0) < 1:
            raise ValueError(
                f"iou_crop_options {self.iou_crop_options} must include 1 (no crop): there may be no crop that reaches any"
                " of the others"
            )
        if self.mosaic_short_side < 1:
            raise ValueError(f"mosaic_short_side ({self.mosaic_short_side}) must be 1 or more")
        if not 0 < self.mosaic_scale[0] <= self.mosaic_scale[1]:
            raise ValueError(f"mosaic_scale {self.mosaic_scale} must be (smallest, largest), both > 0")
        for name in ("mixup_ratio", "copy_paste_ratio"):
            low, high = getattr(self, name)
            if not 0 <= low <= high <= 1:
                raise ValueError(f"{name} ({low}, {high}) must be (smallest, largest) in 0..1")

    def clean(self) -> "AugmentSettings":
        """Settings of warm-up and clean epochs: flips, quarter turns and resize alone."""
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

    def ordinary(self) -> "AugmentSettings":
        """Settings of the epochs after the dense stage: neither mosaic nor mixup."""
        return replace(self, mosaic_probability=0, mixup_probability=0)
