"""Schema of an experiment and of the cluster it runs on: every key with its type and default. Files: `config_files.py`.

An experiment says what is learnt and how: it defines the result. A cluster file says where, and changes nothing but speed. What
is left out follows from the variant and the length of the run (`pipeline/training/schedule.py`); `--dry-run` prints it.
"""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from dfine_core.config import VARIANTS, LossConfig, ModelConfig, OptimizerConfig
from pipeline.data.augment.augment import AugmentSettings
from pipeline.data.stream.plan import DEFAULT_WINDOW_ROWS, DecodeIn
from pipeline.errors import UserError
from pipeline.ray_job import lasting

Share = Annotated[float, Field(ge=0, le=1)]


def _a_folder_name(name: str) -> str:
    if not name or name.startswith(".") or any(sign in name for sign in "/\\\0 "):
        raise ValueError(f"{name!r} becomes a folder: letters, digits, '.', '_' and '-' alone")
    return name


FolderName = Annotated[str, AfterValidator(_a_folder_name)]
Location = Annotated[str, AfterValidator(lasting)]  # path or URI; absolute in a submitted job


class ConfigError(UserError, ValueError):
    """A file or a value that cannot be taken, with every problem that was found."""


class Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


def unknown_key(key: object, known: Sequence[str]) -> str:
    """Message about a key that is not known, with those that it resembles."""
    close = difflib.get_close_matches(str(key), known, n=3)
    return f"unknown key {key!r}; " + (f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(known)}")


def key_prefix(location: Sequence[Any]) -> str:
    """Location of an error as a dotted key, to stand before its message; empty for the whole file."""
    return ".".join(map(str, location)) + ": " if location else ""


def plain_message(text: str) -> str:
    """Pydantic's message without the prefix that it gives to a validator's own."""
    return text.removeprefix("Value error, ")


MODEL_KEYS = tuple(f.name for f in fields(ModelConfig) if f.name not in ("num_classes", "loss"))


class Data(Config):
    train: Location  # manifest, or its folder; a path or a URI
    val: Location | None = None  # evaluated on; without it a run only trains
    decode_in: DecodeIn = "task"
    prefetch: PositiveInt = 2  # micro-batches ready in each worker
    window_rows: PositiveInt = DEFAULT_WINDOW_ROWS  # rows are shuffled within stretches of about this length


class Model(Config):
    """A published variant, and any field of `dfine_core.ModelConfig` beside it. The class count comes from the data."""

    model_config = ConfigDict(frozen=True, extra="allow")
    variant: Literal["n", "s", "m", "l", "x"] = "s"

    @model_validator(mode="before")
    @classmethod
    def _fields_of_the_detector(cls, value: Any) -> Any:
        if not isinstance(value, Mapping) or value.get("variant", "s") not in VARIANTS:
            return value
        known = ("variant", *MODEL_KEYS)
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
        return {"variant": value.get("variant", "s"), **{key: getattr(config, key) for key in MODEL_KEYS}}

    def config(self, num_classes: int, loss: LossConfig) -> ModelConfig:
        return ModelConfig(num_classes=num_classes, loss=loss, **(self.model_extra or {}))


_MODEL = TypeAdapter(ModelConfig)


class Schedule(Config):
    """How long, in what portions. `epochs` (or `steps`) is the one number to choose."""

    epochs: PositiveInt | None = None
    steps: PositiveInt | None = None
    global_batch: PositiveInt | None = None  # images per step, over all workers; by the variant if left out
    micro_batch: PositiveInt | None = None  # images that a worker holds at a time; all of its share if left out
    clean_epochs: NonNegativeInt | None = None  # at the end: stage two, without strong augmentation
    warmup_steps: NonNegativeInt | None = None
    final_factor: Share = 1.0  # of the learning rate at the end, reached by a cosine; 1 keeps it constant, as released

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("give either epochs or steps")
        if self.epochs is not None and self.clean_epochs is not None and self.clean_epochs > self.epochs:
            raise ValueError(f"clean_epochs ({self.clean_epochs}) must lie in 0..epochs ({self.epochs})")
        return self


class Optimizer(Config):
    """AdamW. What is left out is the variant's COCO recipe; rates are for a global batch of `reference_batch` images."""

    lr: PositiveFloat | None = None
    backbone_lr: NonNegativeFloat | None = None
    weight_decay: NonNegativeFloat | None = None
    decay_biases: bool | None = None
    groups: Literal["released", "fixed"] = "released"
    betas: tuple[Share, Share] = (0.9, 0.999)
    reference_batch: PositiveInt | None = None
    clip_norm: PositiveFloat = 0.1  # of the whole gradient

    def config(self, variant: str, scale: float) -> OptimizerConfig:
        """With rates multiplied by `scale`."""
        given = self.model_dump(exclude={"reference_batch", "clip_norm"}, exclude_none=True)
        recipe = OptimizerConfig.for_variant(variant, **given)
        return OptimizerConfig(**{**vars(recipe), "lr": recipe.lr * scale, "backbone_lr": recipe.backbone_lr * scale})


class AveragedWeights(Config):
    """The exponential moving average that is evaluated and shipped; by the length of the run if left out."""

    decay: Annotated[float, Field(ge=0, lt=1)] | None = None
    warmup_steps: NonNegativeInt | None = None


class Numerics(Config):
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"  # auto: bf16 on CUDA, fp32 on the CPU
    tf32: bool = True  # matrix products of fp32 on CUDA
    compile: bool = False
    channels_last: bool = False
    sync_batch_norm: bool = False  # batch statistics over all workers instead of each micro-batch; on CUDA alone


class Evaluation(Config):
    every_epochs: PositiveInt = 1
    every_steps: PositiveInt | None = None  # instead of epochs
    micro_batch: PositiveInt | None = None  # twice the training's if left out
    pictures: NonNegativeInt = 6  # validation images drawn with truth and detections
    beside: bool = False  # in stage one on other resources, while the training goes on; see `Cluster`
    before_training: bool = False  # also evaluate the weights that it starts from
    latency: bool = False  # at the end, time the best weights on one image


class Checkpoints(Config):
    every_steps: PositiveInt | None = None  # besides one at every evaluation
    keep: PositiveInt = 2  # of the latest; the best ones stay besides


class NotFinite(Config):
    """What happens to a loss or gradient that is NaN or infinite: the step is skipped everywhere, and counted."""

    in_a_row: PositiveInt = 5  # then the run goes back to its last checkpoint; the second time it stops
    saved: NonNegativeInt = 3  # steps whose batch is kept for `jobs.replay`


class Tracking(Config):
    uri: str | None = None  # MLFLOW_TRACKING_URI, or a SQLite file in `storage`
    experiment: str = "dfine"
    tags: dict[str, str] = {}
    register_as: str | None = None  # name of the model version made of the best weights
    alias: str | None = None  # given to that version
    every_steps: PositiveInt = 10  # between two reports of losses and speed


class Experiment(Config):
    name: FolderName | None = None  # of the run; the file's name if left out
    # Folder or URI in which runs keep their files, reachable from every node.
    storage: Location = Field(default="runs", validate_default=True)
    seed: NonNegativeInt = 0
    init: Location | None = None  # weights to start from: a checkpoint or a released file
    data: Data
    model: Model = Model()
    loss: LossConfig = LossConfig()
    schedule: Schedule
    optimizer: Optimizer = Optimizer()
    ema: AveragedWeights = AveragedWeights()
    augment: AugmentSettings = AugmentSettings()
    multiscale_repeat: NonNegativeInt = 0  # how often the base size counts among the sizes of a step; 0 keeps one size
    numerics: Numerics = Numerics()
    evaluation: Evaluation = Evaluation()
    checkpoints: Checkpoints = Checkpoints()
    not_finite: NotFinite = NotFinite()
    tracking: Tracking = Tracking()

    @model_validator(mode="after")
    def _multiscale_needs_squares(self) -> Self:
        height, width = self.model.config(1, self.loss).input_size
        if self.multiscale_repeat and height != width:
            raise ValueError(f"multiscale_repeat needs a square input_size, which is {height} x {width}: set it to 0")
        return self


class Cluster(Config):
    """Where an experiment runs."""

    address: str | None = None  # of a running Ray; RAY_ADDRESS, or a cluster of this machine's own
    workers: PositiveInt | tuple[PositiveInt, PositiveInt] | None = None  # (least, most); one per GPU, or one
    gpus_per_worker: NonNegativeFloat | None = None  # 1 where the cluster has GPUs
    cpus_per_worker: NonNegativeFloat = 0.5
    threads_per_worker: PositiveInt | None = None  # of PyTorch on the CPU; an equal share of the cores
    resources_per_worker: dict[str, PositiveFloat] = {}
    autoscaling: bool = False  # nodes come when they are asked for: do not refuse what the cluster does not have yet
    evaluation_cpus: NonNegativeFloat = 1.0  # of an evaluation beside the training
    evaluation_gpus: NonNegativeFloat = 0.0
    accelerator_type: str | None = None
    placement: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = "PACK"
    max_failures: NonNegativeInt = 3  # restarts of the workers before the run fails
    max_preemptions: NonNegativeInt = 20
    # Limit on one start or restart of all workers, the wait for new nodes included; the fourth that passes it ends the run.
    start_timeout_s: PositiveFloat = 120
    collective_timeout_s: PositiveFloat = (
        300  # a worker that waits longer for the others fails, and so restarts them all
    )
    silent_s: PositiveFloat = 60  # a worker that has not made a step for so long is named

    @model_validator(mode="after")
    def _least_before_most(self) -> Self:
        if isinstance(self.workers, tuple) and self.workers[0] > self.workers[1]:
            raise ValueError(f"workers {self.workers} must be (least, most)")
        return self
