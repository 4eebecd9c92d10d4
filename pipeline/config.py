"""Schema of an experiment and of the cluster it runs on: every key with its type and default. Files: `config_files.py`.

An experiment defines the result. A cluster file says where it runs, and changes only the speed. Values that are left out
follow from the variant and the length of the run (`pipeline/training/schedule.py`); `--dry-run` prints them.
"""

import re
from collections.abc import Mapping
from dataclasses import fields
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)

from dfine_core.config import VARIANTS, LossConfig, ModelConfig, OptimizerConfig
from dfine_core.parts import BACKBONE, PARTS, parts_named
from dfine_core.thresholds import WANTED_PRECISION
from pipeline.augment_presets import with_preset
from pipeline.config_keys import Config, key_prefix, plain_message, unknown_key
from pipeline.data.augment.settings import AugmentSettings
from pipeline.data_settings import Data
from pipeline.errors import ConfigError as ConfigError
from pipeline.pretrained import weights_location
from pipeline.ray_job import absolute_location
from pipeline.recipes import Recipe, with_recipe
from pipeline.teacher_settings import TeacherSettings

MAX_MODEL_NAME, MAX_ALIAS, MAX_EXPERIMENT_NAME = 256, 255, 500  # characters that MLflow accepts
Share = Annotated[float, Field(ge=0, le=1)]
Stages = Literal["deim"] | tuple[NonNegativeInt, NonNegativeInt, NonNegativeInt] | tuple[Share, Share, Share]


def _a_folder_name(name: str) -> str:
    if not name or name.startswith(".") or any(sign in name for sign in "/\\\0 "):
        raise ValueError(f"{name!r} becomes a folder: letters, digits, '.', '_' and '-' alone")
    return name


def _a_model_name(name: str) -> str:
    if (
        not name.strip()
        or name in (".", "..")
        or len(name) > MAX_MODEL_NAME
        or any(sign in name for sign in "/:@'\"\\\n")
    ):
        raise ValueError(
            f"{name!r} cannot be the name of a registered model: 1 to {MAX_MODEL_NAME} characters, without / : @ quotes or \\"
        )
    return name


def _a_model_alias(alias: str) -> str:
    reserved = alias.lower() == "latest" or re.fullmatch(r"[vV]\d+", alias)
    if not re.fullmatch(r"[\w-]+", alias) or len(alias) > MAX_ALIAS or reserved:
        raise ValueError(
            f"{alias!r} cannot be the alias of a model: 1 to {MAX_ALIAS} letters, digits, '_' and '-', and neither 'latest' nor"
            " a version such as 'v1'"
        )
    return alias


def _a_list_of_parts(names: Any) -> Any:
    if isinstance(names, str):
        raise ValueError(f"{names!r} must be a list of parts, as in [backbone.stem, encoder]")
    return names


def _known_parts(names: tuple[str, ...]) -> tuple[str, ...]:
    parts_named(names)
    return names


def _an_experiment_name(name: str) -> str:
    if not name.strip() or len(name) > MAX_EXPERIMENT_NAME:
        raise ValueError(f"{name!r} cannot be the name of an MLflow experiment: 1 to {MAX_EXPERIMENT_NAME} characters")
    return name


# Names that MLflow, its search language and its URIs accept: a wrong one would be refused at the end of the run.
ModelName = Annotated[str, AfterValidator(_a_model_name)]
ModelAlias = Annotated[str, AfterValidator(_a_model_alias)]
FrozenParts = Annotated[tuple[str, ...], BeforeValidator(_a_list_of_parts), AfterValidator(_known_parts)]
FolderName = Annotated[str, AfterValidator(_a_folder_name)]
Location = Annotated[str, AfterValidator(absolute_location)]  # path or URI; a path becomes absolute
WeightsLocation = Annotated[str, AfterValidator(weights_location)]  # also a published name, or hf://org/name


MODEL_KEYS = tuple(f.name for f in fields(ModelConfig) if f.name not in ("num_classes", "loss", "activation"))


class Model(Config):
    """A published variant and any field of `dfine_core.ModelConfig`. The number of classes comes from the data."""

    model_config = ConfigDict(frozen=True, extra="allow")
    variant: Literal["n", "s", "m", "l", "x"] = "s"
    activation: Literal["relu", "silu"] | None = None  # default: that of the initial weights, else the recipe's

    @model_validator(mode="before")
    @classmethod
    def _fields_of_the_detector(cls, value: Any) -> Any:
        if not isinstance(value, Mapping) or value.get("variant", "s") not in VARIANTS:
            return value
        known = ("variant", "activation", *MODEL_KEYS)
        problems = [unknown_key(key, known) for key in value if key not in known]
        if "num_classes" in value:
            problems = ["num_classes comes from the data's manifest: leave it out"]
        given = {key: v for key, v in value.items() if key in MODEL_KEYS}
        try:
            config = _MODEL.validate_python({**VARIANTS[value.get("variant", "s")], **given})
        except ValidationError as error:
            problems += [f"{key_prefix(e['loc'])}{plain_message(e['msg'])}" for e in error.errors()]
        if problems:
            raise ValueError("; ".join(problems))
        own = {"variant": value.get("variant", "s"), "activation": value.get("activation")}
        return own | {key: getattr(config, key) for key in MODEL_KEYS}

    def config(self, num_classes: int, loss: LossConfig) -> ModelConfig:
        """Complete configuration of the detector."""
        activation = self.activation or "relu"
        return ModelConfig(num_classes=num_classes, loss=loss, activation=activation, **(self.model_extra or {}))


_MODEL = TypeAdapter(ModelConfig)


class Schedule(Config):
    """Length of the run and size of its steps. `epochs` (or `steps`) is the one number to choose."""

    epochs: PositiveInt | None = None
    steps: PositiveInt | None = None
    global_batch_size: PositiveInt | None = None  # images per step over all workers; default: the variant's recipe
    micro_batch_size: PositiveInt | None = None  # images per forward pass of a worker; default: its whole share
    no_aug_epochs: NonNegativeInt | None = None  # last epochs, without strong augmentation (stage two)
    # First dense, ordinary and clean epoch of the augmentation, or shares of the epochs; deim: derived from the length.
    stages: Stages | None = None
    warmup_steps: NonNegativeInt | None = None  # 0: none
    warmup_power: PositiveFloat = 1  # 1: linear, as in D-FINE; 2: quadratic, as in DEIM
    # After the warm-up. constant: as in D-FINE. cosine: down to `min_lr_ratio` at the end. flat_cosine, as in DEIM: constant for
    # `flat_epochs`, a cosine, then `min_lr_ratio` in the last epochs. Default: cosine if `min_lr_ratio` is below 1.
    shape: Literal["constant", "cosine", "flat_cosine"] | None = None
    min_lr_ratio: Share = 1.0  # final / initial learning rate
    flat_epochs: NonNegativeFloat | None = None  # below 1: share of the run; default: until the middle of stage one

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("give either epochs or steps")
        if self.epochs is not None and self.no_aug_epochs is not None and self.no_aug_epochs > self.epochs:
            raise ValueError(f"no_aug_epochs ({self.no_aug_epochs}) must lie in 0..epochs ({self.epochs})")
        return self

    @model_validator(mode="after")
    def _stages_in_order(self) -> Self:
        if self.stages is None or self.stages == "deim":
            return self
        if list(self.stages) != sorted(self.stages):
            raise ValueError(f"stages {list(self.stages)} must ascend: first dense, ordinary and clean epoch")
        if self.no_aug_epochs is not None:
            raise ValueError(f"give either no_aug_epochs ({self.no_aug_epochs}) or stages {list(self.stages)}")
        return self


class Optimizer(Config):
    """AdamW. Defaults are the variant's COCO recipe; rates are for a global batch of `base_batch_size` images."""

    lr: PositiveFloat | None = None
    backbone_lr: NonNegativeFloat | None = None
    weight_decay: NonNegativeFloat | None = None
    decay_biases: bool | None = None
    param_groups: Literal["released", "deim", "fixed"] = "released"
    betas: tuple[Share, Share] = (0.9, 0.999)
    base_batch_size: PositiveInt | None = None  # default: the batch of the variant's recipe
    scale_lr: Literal["linear", "sqrt", "none"] = "linear"  # with global_batch_size / base_batch_size
    max_grad_norm: PositiveFloat = 0.1  # limit for the norm of all gradients together
    layer_decay: Annotated[float, Field(gt=0, le=1)] = (
        1.0  # factor on the rate, once for each part further from the head
    )
    # Parts that do not change (`dfine_core/parts.py`), besides those of model.freeze_at, until the run has made so many steps or
    # epochs; neither: to the end.
    freeze: FrozenParts = ()
    thaw_steps: PositiveInt | None = None
    thaw_epochs: PositiveInt | None = None

    @model_validator(mode="after")
    def _one_time_to_thaw(self) -> Self:
        given = [key for key in ("thaw_steps", "thaw_epochs") if getattr(self, key) is not None]
        if len(given) == 2:
            raise ValueError(f"give either thaw_steps ({self.thaw_steps}) or thaw_epochs ({self.thaw_epochs})")
        if given and not self.freeze:
            raise ValueError(
                f"{given[0]} ({getattr(self, given[0])}) needs parts to thaw: give freeze, or leave it out"
            )
        return self

    def config(self, variant: str, lr_factor: float) -> OptimizerConfig:
        """Fill in the recipe of the variant, and multiply the rates by `lr_factor`."""
        others = {"base_batch_size", "scale_lr", "max_grad_norm", "freeze", "thaw_steps", "thaw_epochs"}
        given = self.model_dump(exclude=others, exclude_none=True)
        recipe = OptimizerConfig.for_variant(variant, **given)
        rates = {"lr": recipe.lr * lr_factor, "backbone_lr": recipe.backbone_lr * lr_factor}
        return OptimizerConfig(**{**vars(recipe), **rates})


class AveragedWeights(Config):
    """Exponential moving average of the weights, evaluated and shipped; defaults follow from the length of the run."""

    decay: Annotated[float, Field(ge=0, lt=1)] | None = None
    warmup_steps: NonNegativeInt | None = None


class Numerics(Config):
    """Precision, compilation and memory layout."""

    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"  # auto: bf16 on CUDA, fp32 on the CPU
    tf32: bool = True  # for fp32 matrix products on CUDA
    compile: Literal["auto", "off", "detector", "step"] = "off"  # graphs; auto: step on CUDA in long trainings
    channels_last: Literal["auto"] | bool = "auto"  # auto: on the CPU, where convolutions are faster in this layout
    sync_batch_norm: bool = False  # statistics over all workers instead of each micro-batch; CUDA only

    @field_validator("compile", mode="before")
    @classmethod
    def _no_switch(cls, value: object) -> object:
        if value is True:
            raise ValueError("true is no longer a choice: write step (detector, matching costs and losses) or detector")
        return "off" if value is False else value  # YAML reads `off` as false


class Evaluation(Config):
    """Evaluations during and after training."""

    every_epochs: PositiveInt = 1
    every_steps: PositiveInt | None = None  # instead of epochs
    patience: PositiveInt | None = (
        None  # evaluations without an improvement beyond their noise that end a stage; null: none does
    )
    micro_batch_size: PositiveInt | None = None  # default: twice that of training
    num_images: NonNegativeInt = 6  # validation images rendered with ground truth and detections
    asynchronous: bool = False  # in stage one, on resources of its own (`Cluster.evaluation_*`)
    before_training: bool = False  # also evaluate the initial weights
    latency: bool = False  # measure the latency of the best weights at the end
    wanted_precision: Share = WANTED_PRECISION  # the lowest score of every class that reaches it is reported


class Checkpoints(Config):
    """Checkpoints in addition to those at evaluations, and how many are kept."""

    every_steps: PositiveInt | None = None  # in addition to every evaluation
    every_minutes: PositiveFloat | None = 10  # since the last checkpoint; null: never by the clock
    keep: PositiveInt = 2  # latest checkpoints; the best ones are kept in addition


class NonFinite(Config):
    """Handling of NaN and infinite losses or gradients: all workers skip the step, and count it."""

    max_consecutive: PositiveInt = 5  # then the run rewinds to its last checkpoint; the second time it stops
    max_saved: NonNegativeInt = 3  # steps whose batch is kept for `dfine replay`


class Tracking(Config):
    """MLflow: where runs are tracked, and under which names."""

    uri: str | None = None  # default: MLFLOW_TRACKING_URI, or a SQLite file in `storage`
    experiment: Annotated[str, AfterValidator(_an_experiment_name)] = "dfine"
    tags: dict[str, str] = Field(default_factory=dict)
    registered_model_name: ModelName | None = None  # registers the best weights under this name
    alias: ModelAlias | None = None  # alias of the registered version
    every_steps: PositiveInt = 10  # between two reports of losses and speed

    @model_validator(mode="after")
    def _an_alias_belongs_to_a_registered_model(self) -> Self:
        if self.alias and not self.registered_model_name:
            raise ValueError(
                f"alias {self.alias!r} belongs to a registered model: give registered_model_name, or leave alias out"
            )
        return self


class Experiment(Config):
    """Experiment file: everything that defines the result of a run."""

    name: FolderName | None = None  # name of the run; default: the file's name
    # Folder or URI that holds the runs, reachable from every node.
    storage: Location = Field(default="runs", validate_default=True)
    recipe: Recipe = "dfine"  # values of the keys that the file leaves out, see `pipeline/recipes.py`
    seed: NonNegativeInt = 0
    init: WeightsLocation | None = None  # initial weights: a published name, run, checkpoint, file or model of MLflow
    data: Data
    model: Model = Model()
    loss: LossConfig = LossConfig()
    teacher: TeacherSettings = TeacherSettings()
    schedule: Schedule
    optimizer: Optimizer = Optimizer()
    ema: AveragedWeights = AveragedWeights()
    augment: AugmentSettings = AugmentSettings()
    base_size_repeat: NonNegativeInt = 0  # weight of the base size among the multi-scale sizes; 0: one size
    numerics: Numerics = Numerics()
    evaluation: Evaluation = Evaluation()
    checkpoints: Checkpoints = Checkpoints()
    non_finite: NonFinite = NonFinite()
    tracking: Tracking = Tracking()

    @model_validator(mode="before")
    @classmethod
    def _values_of_preset_and_recipe(cls, value: Any) -> Any:
        return with_recipe(with_preset(value)) if isinstance(value, Mapping) else value

    @model_validator(mode="after")
    def _patience_needs_evaluations(self) -> Self:
        if self.evaluation.patience is not None and self.data.val is None:
            raise ValueError(f"evaluation.patience ({self.evaluation.patience}) needs a data.val, or leave it out")
        return self

    @model_validator(mode="after")
    def _something_is_trained(self) -> Self:
        config = self.model.config(1, self.loss)
        frozen = set(parts_named(self.optimizer.freeze))
        if frozen and frozen | set(BACKBONE[: config.frozen_parts]) == set(PARTS):
            raise ValueError(
                f"optimizer.freeze {list(self.optimizer.freeze)} and model.freeze_at ({config.freeze_at}) freeze all parts, so"
                " nothing would be trained: leave one out"
            )
        return self

    @model_validator(mode="after")
    def _a_teacher_needs_a_part_that_learns(self) -> Self:
        frozen, teacher = set(parts_named(self.optimizer.freeze)), self.teacher
        if teacher.features is not None and teacher.features.adapt is not None and "encoder" in frozen:
            raise ValueError(
                "teacher.features.adapt follows the gradient of the encoder, which optimizer.freeze holds: leave one of them out"
            )
        teaches_map = teacher.features is not None or (teacher.detector is not None and teacher.detector.map_weight > 0)
        if teaches_map and frozen >= {*BACKBONE, "encoder"}:
            raise ValueError(
                "teacher: its map is learned by backbone and encoder, and optimizer.freeze holds both: leave one of them out"
            )
        return self

    @model_validator(mode="after")
    def _multiscale_needs_squares(self) -> Self:
        height, width = self.model.config(1, self.loss).input_size
        if self.base_size_repeat and height != width:
            raise ValueError(f"base_size_repeat needs a square input_size, which is {height} x {width}: set it to 0")
        return self


class Cluster(Config):
    """Cluster file: where an experiment runs."""

    address: str | None = None  # running Ray cluster to use; default: RAY_ADDRESS, or a new local cluster
    workers: PositiveInt | tuple[PositiveInt, PositiveInt] | None = (
        None  # number or (least, most); default: one per GPU
    )
    gpus_per_worker: NonNegativeFloat | None = None  # default: 1 if the cluster has GPUs
    cpus_per_worker: NonNegativeFloat = 0.5
    threads_per_worker: PositiveInt | None = None  # PyTorch threads on the CPU; default: an equal share of the cores
    resources_per_worker: dict[str, PositiveFloat] = Field(default_factory=dict)
    autoscaling: bool = False  # do not refuse requests that the cluster has no nodes for yet
    evaluation_cpus: NonNegativeFloat = 1.0  # per asynchronous evaluation
    evaluation_gpus: NonNegativeFloat = 0.0
    accelerator_type: str | None = None
    placement: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = "PACK"
    max_failures: NonNegativeInt = 3  # restarts of the workers before the run fails
    max_preemptions: NonNegativeInt = 20
    # Limit on one start or restart of all workers, new nodes included; the fourth start that exceeds it ends the run.
    start_timeout_s: PositiveFloat = 120
    collective_timeout_s: PositiveFloat = 300  # longest wait for a worker that hangs; then all are started again
    heartbeat_timeout_s: PositiveFloat = 60  # a worker without progress for longer is named

    @model_validator(mode="after")
    def _least_before_most(self) -> Self:
        if isinstance(self.workers, tuple) and self.workers[0] > self.workers[1]:
            raise ValueError(f"workers {self.workers} must be (least, most)")
        return self
