"""Settings of teachers: frozen networks, or boxes made once, that a training learns from besides the true boxes."""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator

from pipeline.pretrained import weights_location
from pipeline.ray_job import absolute_location

Location = Annotated[str, AfterValidator(absolute_location)]
WeightsLocation = Annotated[str, AfterValidator(weights_location)]
_NO_OTHER_KEYS: dict[str, Any] = {"extra": "forbid"}  # an unknown key of an experiment file is an error


@dataclass(frozen=True, kw_only=True)
class Adaptation:
    """Change of a weight after every epoch, towards a share of the gradient in the encoder's transformer block."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _NO_OTHER_KEYS

    share: float  # of the sum of all absolute gradients
    tolerance: float
    default: float | None = None  # weight from stage two on; None: the first weight

    def __post_init__(self) -> None:
        if not 0 < self.share < 1 or not 0 <= self.tolerance < min(self.share, 1 - self.share):
            raise ValueError(
                f"share ({self.share:g}) must lie between 0 and 1, and tolerance ({self.tolerance:g}) must leave it there"
            )
        _refuse_negative(default=self.default or 0)


@dataclass(frozen=True, kw_only=True)
class FeatureTeacher:
    """Frozen vision model whose patch features the encoder's map is projected to."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _NO_OTHER_KEYS

    model: Location  # local folder of a Transformers model with patch tokens, such as DINOv2 or DINOv3
    weight: float = 15.0  # the first one, if it is adapted
    adapt: Adaptation | None = None

    def __post_init__(self) -> None:
        _refuse_negative(weight=self.weight)


@dataclass(frozen=True, kw_only=True)
class DetectorTeacher:
    """Larger detector of this family, trained here."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _NO_OTHER_KEYS

    weights: WeightsLocation  # a run, a checkpoint, an exported folder, a published name or a file
    map_weight: float = 5.0  # of its encoder's map; 0: without
    edge_weight: float = 1.0  # of its edge distributions; 0: without
    edge_temperature: float = 1.0

    def __post_init__(self) -> None:
        _refuse_negative(map_weight=self.map_weight, edge_weight=self.edge_weight)
        if self.edge_temperature <= 0:
            raise ValueError(f"edge_temperature ({self.edge_temperature:g}) must be positive")
        if self.map_weight == self.edge_weight == 0:
            raise ValueError("map_weight and edge_weight are both 0, so nothing is learned: leave teacher.detector out")


@dataclass(frozen=True, kw_only=True)
class BoxTeacher:
    """Boxes with scores, made once by any detector: a second target set."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _NO_OTHER_KEYS

    folder: Location  # that `dfine prepare teacher` wrote
    weight: float = 1.0
    unmatched: float = 0.5  # weight of a query that no box of the teacher took

    def __post_init__(self) -> None:
        _refuse_negative(weight=self.weight, unmatched=self.unmatched)


@dataclass(frozen=True, kw_only=True)
class TeacherSettings:
    """Teachers of a training; none by default. Several may be combined."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _NO_OTHER_KEYS

    features: FeatureTeacher | None = None
    detector: DetectorTeacher | None = None
    boxes: BoxTeacher | None = None
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # of frozen networks; auto: bf16 on CUDA, fp32 on the CPU

    @property
    def in_use(self) -> bool:
        """Whether there is a teacher."""
        return any((self.features, self.detector, self.boxes))


def _refuse_negative(**values: float) -> None:
    for name, value in values.items():
        if not value >= 0:
            raise ValueError(f"{name} ({value:g}) must not be negative")
