"""What follows from the length of a run: its steps, stages, warm-ups, rates and evaluations, as plain arithmetic.

A user says how long (`schedule.epochs`) and how large the batch is; the rest scales with these unless it is given.
"""

from dataclasses import dataclass

from dfine_core.config import OptimizerConfig
from dfine_core.learning_rate import learning_rate_factor
from pipeline.config import ConfigError, Experiment

BASE_BATCH_SIZE = {"n": 128, "s": 32, "m": 32, "l": 32, "x": 32}  # of the published recipes
CLEAN_SHARE = 0.09  # of the epochs, at the end; the published recipes spend 0.075 to 0.17 so
EMA_HORIZON_SHARE = 0.2  # of the run that the average looks back over at most, lest it is still the start at the end


@dataclass(frozen=True, kw_only=True)
class Schedule:
    images: int  # of the training set
    global_batch_size: int
    micro_batch_size: int
    steps_per_epoch: int
    steps: int
    strong_epochs: int | None  # strong augmentation and multi-scale end before this epoch; None: they never do
    stage_two_step: int | None  # the first without strong augmentation
    warmup_steps: int
    min_lr_ratio: float
    ema_decay: float
    ema_warmup_steps: int
    evaluation_steps: int  # from one evaluation to the next
    optimizer: OptimizerConfig

    @property
    def epochs(self) -> float:
        return self.steps / self.steps_per_epoch

    def accumulation(self, workers: int) -> int:
        """Micro-batches of a step that each worker goes through."""
        return self.global_batch_size // self.micro_batch_size // workers

    def learning_rate_factor(self, step: int) -> float:
        return learning_rate_factor(
            step, warmup_steps=self.warmup_steps, total_steps=self.steps, min_lr_ratio=self.min_lr_ratio
        )

    def is_strong(self, step: int) -> bool:
        return self.stage_two_step is None or step < self.stage_two_step

    def evaluates_after(self, step: int) -> bool:
        """Whether there is an evaluation when `step` steps are done."""
        return step == self.steps or (step > 0 and step % self.evaluation_steps == 0)

    def lines(self) -> list[str]:
        """For a person, one fact each."""
        stage_two = (
            "none" if self.stage_two_step is None else f"from epoch {self.strong_epochs}, step {self.stage_two_step}"
        )
        rates = self.optimizer
        decay = "constant" if self.min_lr_ratio == 1 else f"a cosine to {self.min_lr_ratio:g} of it"
        return [
            f"{self.steps} steps of {self.global_batch_size} images, {self.steps_per_epoch} per epoch of {self.images} images:"
            f" {self.epochs:g} epochs",
            f"stage two (no strong augmentation): {stage_two}",
            f"learning rate {rates.lr:g}, backbone {rates.backbone_lr:g}, weight decay {rates.weight_decay:g};"
            f" warm-up over {self.warmup_steps} steps, then {decay}",
            f"averaged weights: decay {self.ema_decay:g}, warm-up constant {self.ema_warmup_steps} steps",
            f"evaluations: every {self.evaluation_steps} steps, {-(-self.steps // self.evaluation_steps)} in all",
        ]


def derive(experiment: Experiment, *, images: int, workers: int, micro_batch_size: int | None = None) -> Schedule:
    """
    Args:
        images: of the training set.
        micro_batch_size: of the run that is continued; the experiment's own comes first.

    Raises:
        ConfigError: for a batch that the data or the workers cannot make, with the nearest that they can.
    """
    given, variant = experiment.schedule, experiment.model.variant
    global_batch_size = given.global_batch_size or BASE_BATCH_SIZE[variant]
    micro_batch_size = divided(global_batch_size, given.micro_batch_size or micro_batch_size, workers)
    steps_per_epoch = images // global_batch_size
    if steps_per_epoch == 0:
        raise ConfigError(
            f"schedule.global_batch_size ({global_batch_size}) exceeds the {images} images of data.train: an epoch would"
            f" have no step; take {nearest_below(images, workers)} or fewer"
        )
    steps = given.steps or (given.epochs or 0) * steps_per_epoch
    epochs = -(-steps // steps_per_epoch)
    clean = given.no_aug_epochs if given.no_aug_epochs is not None else round(CLEAN_SHARE * epochs)
    strong_epochs = epochs - clean if clean else None

    scale = global_batch_size / (experiment.optimizer.base_batch_size or BASE_BATCH_SIZE[variant])
    warmup = given.warmup_steps
    decay, ema_warmup = experiment.ema.decay, experiment.ema.warmup_steps
    return Schedule(
        images=images,
        global_batch_size=global_batch_size,
        micro_batch_size=micro_batch_size,
        steps_per_epoch=steps_per_epoch,
        steps=steps,
        strong_epochs=strong_epochs,
        stage_two_step=None if strong_epochs is None else strong_epochs * steps_per_epoch,
        warmup_steps=min(round(500 / scale), steps // 10) if warmup is None else warmup,
        min_lr_ratio=given.min_lr_ratio,
        ema_decay=ema_horizon(scale, steps) if decay is None else decay,
        ema_warmup_steps=min(round(1000 / scale), steps // 20) if ema_warmup is None else ema_warmup,
        evaluation_steps=experiment.evaluation.every_steps or experiment.evaluation.every_epochs * steps_per_epoch,
        optimizer=experiment.optimizer.config(variant, scale),
    )


def ema_horizon(scale: float, steps: int) -> float:
    """The published decay of .9999 for `scale` times its batch, and less where a run is too short to follow it."""
    return max(0.0, 1 - max(1e-4 * scale, 1 / max(1.0, EMA_HORIZON_SHARE * steps)))


def divided(global_batch_size: int, micro_batch_size: int | None, workers: int) -> int:
    """The micro-batch with which `workers` share a global batch evenly.

    Raises:
        ConfigError: naming the nearest global batches, or the micro-batches that fit.
    """
    if global_batch_size % workers:
        below, above = nearest_below(global_batch_size, workers), -(-global_batch_size // workers) * workers
        near = above if below == 0 else f"{below} or {above}"
        raise ConfigError(
            f"schedule.global_batch_size ({global_batch_size}) cannot be shared evenly by {workers} workers: the nearest"
            f" that can is {near}"
        )
    share = global_batch_size // workers
    if micro_batch_size is None:
        return share
    if share % micro_batch_size:
        divisors = [size for size in range(1, share + 1) if share % size == 0]
        below = max(size for size in divisors if size < micro_batch_size)
        fitting = [below, *[size for size in divisors if size > micro_batch_size][:1]]
        raise ConfigError(
            f"schedule.micro_batch_size ({micro_batch_size}) does not divide the {share} images of each of {workers} workers"
            f" (global_batch_size {global_batch_size}): the nearest that do are {' and '.join(map(str, fitting))}"
        )
    return micro_batch_size


def nearest_below(batch: int, workers: int) -> int:
    return batch // workers * workers
