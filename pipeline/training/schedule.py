"""Steps, stages, warm-ups, rates and evaluations of a run, derived by plain arithmetic from its length and batch.

A user chooses `schedule.epochs` and the batch; everything else scales with these unless it is given.
"""

import math
from dataclasses import dataclass

from dfine_core.config import OptimizerConfig
from pipeline.config import ConfigError, Experiment
from pipeline.data.augment.stages import Stages
from pipeline.recipes import WARMUP_STEPS
from pipeline.training.augment_stages import augmentation_left_out, resolve_stages, stage_lines
from pipeline.training.freezing import NOTHING_FROZEN, Freezing, freezing_lines, resolve_freezing
from pipeline.wording import plural

BASE_BATCH_SIZE = {"n": 128, "s": 32, "m": 32, "l": 32, "x": 32}  # published recipes
FIRST_EPOCHS = 4  # of DEIM, without strong augmentation; at most a tenth of stage one
NO_AUG_SHARE = 0.09  # last share of the epochs; 0.075 to 0.17 in the published recipes
EMA_HORIZON_SHARE = 0.2  # EMA horizon is at most this share of the run, so that short runs forget the initial weights


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Derived schedule of a run; the same for any number of workers."""

    images: int  # images of an epoch
    global_batch_size: int
    micro_batch_size: int  # images per forward pass of a worker
    steps_per_epoch: int
    steps: int
    strong_epochs: int | None  # strong augmentation and multi-scale end before this epoch; None: never
    stages: Stages  # of the augmentation
    stage_two_step: int | None  # first step without strong augmentation
    warmup_steps: int
    warmup_power: float
    min_lr_ratio: float  # final / initial learning rate; 1: constant
    flat_steps: int  # the cosine begins after so many steps, and not before the end of the warm-up
    clean_steps: int  # last steps, at the final learning rate
    ema_decay: float
    ema_warmup_steps: int
    evaluation_steps: int  # steps between two evaluations
    optimizer: OptimizerConfig
    freezing: Freezing = NOTHING_FROZEN
    # Lines about what is frozen, and about parts of the recipe that the run or the batch is too small for.
    notes: tuple[str, ...] = ()

    @property
    def epochs(self) -> float:
        """Length of the run in epochs."""
        return self.steps / self.steps_per_epoch

    @property
    def micro_batches(self) -> int:
        """Micro-batches of a step, over all workers."""
        return self.global_batch_size // self.micro_batch_size

    def micro_batches_of(self, rank: int, workers: int) -> int:
        """Micro-batches per step of one worker; the first workers have one more where they cannot be shared evenly."""
        return len(range(rank, self.micro_batches, workers))

    def learning_rate_factor(self, step: int) -> float:
        """Factor on the initial learning rates in the step after `step` steps."""
        from dfine_core.optim import learning_rate_factor  # here: commands derive a schedule without loading torch

        return learning_rate_factor(
            step,
            warmup_steps=self.warmup_steps,
            warmup_power=self.warmup_power,
            total_steps=self.steps,
            min_lr_ratio=self.min_lr_ratio,
            flat_steps=self.flat_steps,
            clean_steps=self.clean_steps,
        )

    def is_strong(self, step: int) -> bool:
        """Whether the step after `step` steps belongs to stage one, with strong augmentation."""
        return self.stage_two_step is None or step < self.stage_two_step

    def evaluates_after(self, step: int) -> bool:
        """Whether the weights are evaluated after `step` steps."""
        return step == self.steps or (step > 0 and step % self.evaluation_steps == 0)

    @property
    def evaluations(self) -> int:
        """Number of evaluations of the whole run."""
        return _evaluations(self.steps, self.evaluation_steps)

    def lines(self, *, evaluates: bool) -> list[str]:
        """Describe the schedule, one fact per line.

        Args:
            evaluates: there is a data.val.
        """
        evaluations = f"every {self.evaluation_steps} steps, {self.evaluations} in all"
        stage_two = (
            "none" if self.stage_two_step is None else f"from epoch {self.strong_epochs}, step {self.stage_two_step}"
        )
        rates = self.optimizer
        by_depth = (
            f", times {rates.layer_decay:g} for each part further from the head" if rates.layer_decay != 1 else ""
        )
        return [
            f"{self.steps} steps of {self.global_batch_size} images, {self.steps_per_epoch} per epoch of {self.images} images:"
            f" {self.epochs:g} epoch{'' if self.epochs == 1 else 's'}",
            f"stage two (no strong augmentation): {stage_two}",
            *stage_lines(self.stages, math.ceil(self.epochs)),
            f"learning rate {rates.lr:g}, backbone {rates.backbone_lr:g}, weight decay {rates.weight_decay:g}{by_depth};"
            f" {self._rate_over_time()}",
            f"averaged weights: decay {self.ema_decay:g}, warm-up constant {self.ema_warmup_steps} steps",
            f"evaluations: {evaluations if evaluates else 'none, as there is no data.val'}",
            *self.notes,
        ]

    def _rate_over_time(self) -> str:
        power = f" (power {self.warmup_power:g})" if self.warmup_power != 1 else ""
        warmup = f"warm-up over {self.warmup_steps} steps{power}" if self.warmup_steps else "no warm-up"
        if self.min_lr_ratio == 1:
            return f"{warmup}, then constant"
        flat = f"constant until step {self.flat_steps}, then " if self.flat_steps > self.warmup_steps else ""
        end = f" at step {self.steps - self.clean_steps}" if self.clean_steps else ""
        return f"{warmup}, then {flat}a cosine to {self.min_lr_ratio:g} of it{end}"


def derive(experiment: Experiment, *, images: int, workers: int, micro_batch_size: int | None = None) -> Schedule:
    """Derive the schedule of an experiment.

    Args:
        images: number of images of an epoch.
        micro_batch_size: size in the run that is continued; the experiment's own takes precedence.

    Raises:
        ConfigError: the data or the workers cannot form the batch; names the nearest that they can.
    """
    # 1. The batch, and the number of steps in an epoch.
    given, variant = experiment.schedule, experiment.model.variant
    global_batch_size = given.global_batch_size or BASE_BATCH_SIZE[variant]
    micro_batch_size = shared_micro_batch(global_batch_size, given.micro_batch_size or micro_batch_size, workers)
    steps_per_epoch = images // global_batch_size
    if steps_per_epoch == 0:
        raise ConfigError(
            f"schedule.global_batch_size ({global_batch_size}) exceeds the {images} images of data.train: an epoch would"
            f" have no step; take {images} or fewer"
        )
    # 2. Its length, and stage two at the end.
    steps = given.steps or (given.epochs or 0) * steps_per_epoch
    epochs = -(-steps // steps_per_epoch)
    no_aug = _clean_epochs(epochs, given.no_aug_epochs)
    stages = resolve_stages(given.stages, epochs, no_aug, recipe_stages(epochs, no_aug))
    strong_epochs = stages.clean

    # 3. Rates, warm-ups and the EMA scale with the batch; short runs shorten the warm-ups.
    scale = global_batch_size / (experiment.optimizer.base_batch_size or BASE_BATCH_SIZE[variant])
    lr_factor = {"linear": scale, "sqrt": math.sqrt(scale), "none": 1.0}[experiment.optimizer.scale_lr]
    stage_two_step = None if strong_epochs is None else strong_epochs * steps_per_epoch
    published_warmup = round(WARMUP_STEPS[experiment.recipe] / scale)
    warmup = min(published_warmup, steps // 10) if given.warmup_steps is None else given.warmup_steps
    freezing = resolve_freezing(experiment.optimizer, steps_per_epoch=steps_per_epoch, steps=steps)
    shape = given.shape or ("cosine" if given.min_lr_ratio < 1 else "constant")
    decay, ema_warmup = experiment.ema.decay, experiment.ema.warmup_steps
    return Schedule(
        images=images,
        global_batch_size=global_batch_size,
        micro_batch_size=micro_batch_size,
        steps_per_epoch=steps_per_epoch,
        steps=steps,
        strong_epochs=strong_epochs,
        stages=stages,
        stage_two_step=stage_two_step,
        warmup_steps=warmup,
        warmup_power=given.warmup_power,
        min_lr_ratio=1.0 if shape == "constant" else given.min_lr_ratio,
        flat_steps=_flat_steps(given.flat_epochs, epochs, stages.ordinary, steps_per_epoch)
        if shape == "flat_cosine"
        else 0,
        clean_steps=max(0, steps - (stage_two_step or steps)) if shape == "flat_cosine" else 0,
        ema_decay=ema_horizon(scale, steps) if decay is None else decay,
        ema_warmup_steps=min(round(1000 / scale), steps // 20) if ema_warmup is None else ema_warmup,
        evaluation_steps=experiment.evaluation.every_steps or experiment.evaluation.every_epochs * steps_per_epoch,
        optimizer=experiment.optimizer.config(variant, lr_factor),
        freezing=freezing,
        notes=(
            *([f"augmentation: preset {experiment.augment.preset}"] if experiment.augment.preset else ()),
            *freezing_lines(freezing, experiment),
            *(left_out(epochs, given.no_aug_epochs) if given.stages == "deim" else ()),
            *augmentation_left_out(
                experiment.augment, stages, epochs=epochs, images=images, micro_batch_size=micro_batch_size
            ),
        ),
    )


def recipe_stages(epochs: int, clean_epochs: int) -> tuple[int, int, int]:
    """First epochs of DEIM's three later stages: dense one-to-one, ordinary, clean; the first one has no strong augmentation.

    The published boundaries of all sizes follow this rule: 4 epochs, then half of the epochs before the clean ones. In short runs
    the first stage is a tenth of those.

    Source: DEIM, arXiv:2412.04234, and its released configurations.
    """
    clean = epochs - clean_epochs
    dense = min(FIRST_EPOCHS, clean // 10)
    return dense, min(clean, dense + -(-clean // 2)), clean


def left_out(epochs: int, clean_epochs: int | None) -> list[str]:
    """Lines about the stages of DEIM that a run of so few epochs does not have.

    Args:
        clean_epochs: as given by the user, who may want none; None: a share of the run.
    """
    dense, ordinary, clean = recipe_stages(epochs, _clean_epochs(epochs, clean_epochs))
    lengths = {
        "first epochs without strong augmentation": dense,
        "epochs with mosaic and mixup": ordinary - dense,
        "ordinary epochs after these": clean - ordinary,
        "last epochs without strong augmentation": epochs - clean if clean_epochs is None else 1,
    }
    missing = [stage for stage, length in lengths.items() if length == 0]
    return (
        [f"recipe deim: a run of {plural(epochs, 'epoch')} is too short for: {'; '.join(missing)}"] if missing else []
    )


def _clean_epochs(epochs: int, given: int | None) -> int:
    return round(NO_AUG_SHARE * epochs) if given is None else given


def _flat_steps(flat_epochs: float | None, epochs: int, ordinary: int, steps_per_epoch: int) -> int:
    """Steps at the full rate; by default DEIM's, which end with its dense stage."""
    flat = float(ordinary) if flat_epochs is None else flat_epochs * epochs if flat_epochs < 1 else flat_epochs
    return round(flat * steps_per_epoch)


def evaluations_without_data(experiment: Experiment) -> int | None:
    """Number of evaluations of the whole run; None if it depends on the number of images."""
    length, evaluation = experiment.schedule, experiment.evaluation
    if length.epochs and not evaluation.every_steps:
        return _evaluations(length.epochs, evaluation.every_epochs)
    if length.steps and evaluation.every_steps:
        return _evaluations(length.steps, evaluation.every_steps)
    return None


def _evaluations(length: int, interval: int) -> int:
    """One at the end of each interval, and one at the end of the run."""
    return -(-length // interval)


def ema_horizon(scale: float, steps: int) -> float:
    """EMA decay: the published .9999, adapted to `scale` times its batch, and less for runs too short for it."""
    return max(0.0, 1 - max(1e-4 * scale, 1 / max(1.0, EMA_HORIZON_SHARE * steps)))


def shared_micro_batch(global_batch_size: int, micro_batch_size: int | None, workers: int) -> int:
    """Micro-batch size that gives every one of `workers` a micro-batch in each step.

    Without a given size it is an equal share, or the largest divisor of the global batch that leaves nobody without work.

    Raises:
        ConfigError: there is none; names the sizes or numbers that fit.
    """
    if workers > global_batch_size:
        raise ConfigError(
            f"schedule.global_batch_size ({global_batch_size}) is too small for {workers} workers: each needs an image in every"
            f" step; take {workers} or more, or at most {global_batch_size} workers"
        )
    divisors = [size for size in range(1, global_batch_size + 1) if global_batch_size % size == 0]
    fitting = [size for size in divisors if global_batch_size // size >= workers]
    if micro_batch_size is None:
        return fitting[-1]
    if micro_batch_size not in divisors:
        near = [max(size for size in divisors if size < micro_batch_size)]
        near += [size for size in divisors if size > micro_batch_size][:1]
        raise ConfigError(
            f"schedule.micro_batch_size ({micro_batch_size}) does not divide the global batch of {global_batch_size} images: the"
            f" nearest that do are {' and '.join(map(str, near))}"
        )
    if micro_batch_size not in fitting:
        raise ConfigError(
            f"schedule.micro_batch_size ({micro_batch_size}) makes"
            f" {plural(global_batch_size // micro_batch_size, 'micro-batch')} of a step,"
            f" fewer than the {workers} workers: take {fitting[-1]} or less"
        )
    return micro_batch_size
