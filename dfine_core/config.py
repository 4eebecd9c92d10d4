"""Configuration of a detector: every setting as a field, the five published variants as values.

Sources: D-FINE, arXiv:2410.13842, DEIM, arXiv:2412.04234, and their released configurations.
"""

import difflib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, ClassVar, Literal, Self

# Precisions of inference, see `dfine_core.precision`.
PrecisionName = Literal["auto", "fp32", "fp32-channels-last", "bf16", "bf16-channels-last", "fp16"]
# Source of an interval: a factor that was fitted to other images, or the central part of the edge's own distribution.
IntervalKind = Literal["conformal", "own"]


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Weights of the loss terms and of the matching cost, and the shape constants inside them."""

    __pydantic_config__: ClassVar[dict[str, str]] = {
        "extra": "forbid"
    }  # an experiment's file with another key is refused

    vfl: float = 1.0  # varifocal classification
    bbox: float = 5.0  # L1 of normalised cxcywh
    giou: float = 2.0
    fgl: float = 0.15  # fine-grained localisation, over the edge distributions
    ddf: float = 1.5  # decoupled distillation focal: the divergence that GO-LSD minimises
    ddf_temperature: float = 5.0
    vfl_alpha: float = 0.75
    vfl_gamma: float = 2.0
    # "vfl" or "mal": matchability-aware classification in place of the varifocal one, as in DEIM
    classification: Literal["vfl", "mal"] = "vfl"
    mal: float = 1.0
    mal_gamma: float = 1.5
    mal_alpha: float | None = None  # weight of the negatives; None: 1, as released
    match_class: float = 2.0
    match_bbox: float = 5.0
    match_giou: float = 2.0
    match_alpha: float = 0.25
    match_gamma: float = 2.0

    def __post_init__(self) -> None:
        problems = [
            f"{name} ({value}) must not be negative"
            for name, value in vars(self).items()
            if isinstance(value, int | float) and value < 0
        ]
        if self.classification not in ("vfl", "mal"):
            problems.append(f"classification ({self.classification!r}) must be 'vfl' or 'mal'")
        if self.ddf_temperature == 0:
            problems.append("ddf_temperature (0) must be positive")
        _refuse(problems)


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW as released.

    Groups of D-FINE (`released`) decay the backbone's norms and affine scalars. Those of DEIM (`deim`) train its norms at the
    full rate without decay. `fixed` ones train both at the backbone's rate without decay.
    """

    lr: float = 2e-4
    backbone_lr: float = 1e-4
    weight_decay: float = 1e-4
    decay_biases: bool = False  # encoder and decoder alone; the released l and x decay them
    param_groups: Literal["released", "deim", "fixed"] = "released"
    betas: tuple[float, float] = (0.9, 0.999)
    layer_decay: float = 1.0  # factor on a part's rate for each step of its depth, see `parts.DEPTH`

    @classmethod
    def for_variant(cls, name: str, **settings: Any) -> "OptimizerConfig":
        """Return the COCO recipe of a published variant (n, s, m, l, x), with any field replaced by `settings`.

        With the groups `deim`, biases are decayed in all variants but n. N, l and x keep the groups of D-FINE, because DEIM's
        rule for the backbone's norms does not match their names.
        """
        recipes: dict[str, dict[str, Any]] = {
            "n": {"lr": 8e-4, "backbone_lr": 4e-4},
            "s": {"lr": 2e-4, "backbone_lr": 1e-4},
            "m": {"lr": 2e-4, "backbone_lr": 2e-5},
            "l": {"lr": 2.5e-4, "backbone_lr": 1.25e-5, "weight_decay": 1.25e-4, "decay_biases": True},
            "x": {"lr": 2.5e-4, "backbone_lr": 2.5e-6, "weight_decay": 1.25e-4, "decay_biases": True},
        }
        if settings.get("param_groups") == "deim":
            groups = "deim" if name in ("s", "m") else "released"
            settings = {"decay_biases": name != "n", **settings, "param_groups": groups}
        return cls(**{**recipes[name], **settings})


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Configuration of one detector, built with `ModelConfig.variant("s", num_classes=9, ...)`; any field can be given by name.

    `bins = reg_max + 1` values per box edge; `reg_scale` and `up` shape the weighting function W(n) over them.
    """

    num_classes: int = 80
    input_size: tuple[int, int] = (640, 640)  # (height, width) of evaluation and export; training takes any size

    # HGNetv2
    backbone: Literal["B0", "B1", "B2", "B3", "B4", "B5", "B6"] = "B0"
    learnable_affine: bool = True
    backbone_stages: tuple[int, ...] = (1, 2, 3)  # stages handed on, strides 4, 8, 16, 32
    freeze_at: int = -1  # -1: nothing; 0: the stem; i > 0: also stages 0..i unless freeze_stem_only
    freeze_stem_only: bool = True
    freeze_norm: bool = False

    # Hybrid encoder
    encoder_dim: int = 256
    encoder_ffn_dim: int = 1024
    encoder_heads: int = 8
    expansion: float = 0.5  # share that gives the ELAN blocks' inner width
    depth: float = 0.34  # RepVGG blocks per ELAN stack, in units of 3
    positional_temperature: float = 10000.0
    # "released": as published, coordinates scrambled unless the map is square; "grid": each token's own row and column.
    # Both agree on square maps.
    positional_table: Literal["released", "grid"] = "released"

    # Decoder
    activation: Literal["relu", "silu"] = "relu"  # feed-forward networks and MLPs; D-FINE: relu, DEIM: silu
    decoder_dim: int = 256
    decoder_ffn_dim: int = 1024
    decoder_heads: int = 8
    num_layers: int = 3
    num_points: tuple[int, ...] = (3, 6, 3)  # sampling points per feature level
    num_queries: int = 300
    sampling: Literal["default", "discrete"] = "default"
    query_selection: Literal["default", "one2many", "agnostic"] = "default"
    learn_query_content: bool = False

    # Boxes
    regression: Literal["fdr", "direct"] = "fdr"  # "direct": conventional layer-by-layer refinement, no GO-LSD
    reg_max: int = 32
    reg_scale: float = 4.0
    up: float = 0.5

    # Contrastive denoising
    num_denoising: int = 100
    label_noise_ratio: float = 0.5
    box_noise_scale: float = 1.0

    # "float32": the integral, box decoding, matching and losses leave autocast; "released": they follow it, as published
    numerics: Literal["float32", "released"] = "float32"
    loss: LossConfig = field(default_factory=LossConfig)

    @classmethod
    def variant(cls, name: str, **settings: Any) -> Self:
        """Return the published variant `name` (n, s, m, l, x) with any field replaced by `settings`."""
        if name not in VARIANTS:
            raise ValueError(f"unknown variant {name!r}: choose one of {', '.join(VARIANTS)}")
        known = [f.name for f in fields(cls)]
        for key in settings:
            if key not in known:
                close = difflib.get_close_matches(key, known, n=3) or known
                raise ValueError(f"unknown setting {key!r} of the detector; did you mean {', '.join(close)}?")
        return cls(**{**VARIANTS[name], **settings})

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Self:
        """Read the JSON form that `to_plain` writes, where tuples are lists.

        Raises:
            ValueError: a field is unknown to this version, or a value is invalid.
        """
        known = {f.name for f in fields(cls)}
        unknown = [key for key in plain if key not in known]
        if unknown:
            raise ValueError(f"unknown settings of a detector: {', '.join(unknown)}; written by a newer version?")
        values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in plain.items()}
        if "loss" in plain:
            values["loss"] = LossConfig(**plain["loss"])
        return cls(**values)

    def to_plain(self) -> dict[str, Any]:
        """Return every field as JSON values: tuples become lists."""
        content: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return content

    def with_(self, **settings: Any) -> Self:
        """Return a copy with fields replaced, checked again."""
        return replace(self, **settings)

    @property
    def num_levels(self) -> int:
        """Number of feature levels."""
        return len(self.backbone_stages)

    @property
    def frozen_parts(self) -> int:
        """Number of parts of the backbone that `freeze_at` freezes, from the stem on."""
        return 0 if self.freeze_at < 0 else 1 if self.freeze_stem_only else self.freeze_at + 2

    @property
    def strides(self) -> tuple[int, ...]:
        """Strides of the feature levels in pixels, fine to coarse."""
        return tuple(4 * 2**stage for stage in self.backbone_stages)

    @property
    def num_bins(self) -> int:
        """Number of bins per box edge, N."""
        return self.reg_max + 1

    def level_shapes(self, height: int, width: int) -> list[tuple[int, int]]:
        """Sizes (h, w) of the feature levels of an image of `height` x `width` pixels."""
        return [(height // stride, width // stride) for stride in self.strides]

    def __post_init__(self) -> None:
        height, width = self.input_size
        problems = []
        if self.activation not in ("relu", "silu"):
            problems.append(f"activation ({self.activation!r}) must be 'relu' or 'silu'")
        if self.num_classes < 1:
            problems.append(f"num_classes ({self.num_classes}) must be at least 1")
        if self.reg_max < 4 or self.reg_max % 2:
            problems.append(
                f"reg_max ({self.reg_max}) must be an even number of at least 4: bins lie on both sides of zero"
            )
        if self.reg_scale <= 0 or self.up <= 0:
            problems.append(f"reg_scale ({self.reg_scale}) and up ({self.up}) must be positive")
        if self.num_layers < 1:
            problems.append(f"num_layers ({self.num_layers}) must be at least 1")
        if len(self.num_points) != self.num_levels:
            problems.append(
                f"num_points {self.num_points} must name one count for each of {self.num_levels} feature levels"
            )
        for name, dim, heads in (
            ("encoder_dim", self.encoder_dim, self.encoder_heads),
            ("decoder_dim", self.decoder_dim, self.decoder_heads),
        ):
            if dim % heads or dim % 4:
                problems.append(f"{name} ({dim}) must be divisible by its heads ({heads}) and by 4")
        if list(self.backbone_stages) != sorted(set(self.backbone_stages) & {0, 1, 2, 3}):
            problems.append(f"backbone_stages {self.backbone_stages} must be ascending stages out of 0, 1, 2, 3")
        if any(fine * 2 != coarse for fine, coarse in zip(self.strides, self.strides[1:], strict=False)):
            problems.append(f"backbone_stages {self.backbone_stages} must be neighbours: the encoder doubles strides")
        if height < 1 or width < 1:
            problems.append(f"input_size {self.input_size} must be a positive (height, width)")
        elif not problems:
            problems += self.size_problems(height, width)
        _refuse(problems)

    def size_problems(self, height: int, width: int) -> list[str]:
        """List the reasons why the network cannot take an image of `height` x `width`; empty if it can."""
        coarsest = self.strides[-1]
        if height % coarsest or width % coarsest:
            return [
                f"input_size ({height}, {width}) must be a multiple of {coarsest}, the coarsest stride;"
                f" the nearest is ({_round_to(height, coarsest)}, {_round_to(width, coarsest)})"
            ]
        tokens = sum(h * w for h, w in self.level_shapes(height, width))
        if tokens < self.num_queries:
            return [
                f"input_size ({height}, {width}) gives {tokens} feature positions, fewer than num_queries"
                f" ({self.num_queries}): enlarge the image or lower num_queries"
            ]
        return []


def _round_to(value: int, multiple: int) -> int:
    return max(multiple, round(value / multiple) * multiple)


def _refuse(problems: list[str]) -> None:
    if problems:
        raise ValueError("; ".join(problems))


_LARGE: dict[str, Any] = {
    "learnable_affine": False,
    "freeze_at": 0,
    "freeze_norm": True,
    "expansion": 1.0,
    "depth": 1.0,
    "num_layers": 6,
}

VARIANTS: dict[str, dict[str, Any]] = {
    "n": {
        "backbone": "B0",
        "backbone_stages": (2, 3),
        "encoder_dim": 128,
        "encoder_ffn_dim": 512,
        "expansion": 0.34,
        "depth": 0.5,
        "decoder_dim": 128,
        "decoder_ffn_dim": 512,
        "num_points": (6, 6),
    },
    "s": {"backbone": "B0"},
    "m": {"backbone": "B2", "expansion": 1.0, "depth": 0.67, "num_layers": 4},
    "l": {**_LARGE, "backbone": "B4"},
    "x": {**_LARGE, "backbone": "B5", "encoder_dim": 384, "encoder_ffn_dim": 2048, "reg_scale": 8.0},
}
