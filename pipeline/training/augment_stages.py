"""Stages of the augmentation, derived from the length of a run, and what a short run or a small set leaves out."""

from collections.abc import Iterator, Sequence
from typing import Literal

from pipeline.config import ConfigError
from pipeline.data.augment.settings import TILES, AugmentSettings
from pipeline.data.augment.stages import Stages
from pipeline.wording import plural


def resolve_stages(
    given: Literal["deim"] | Sequence[int] | Sequence[float] | None,
    epochs: int,
    no_aug_epochs: int,
    recipe: tuple[int, int, int],
) -> Stages:
    """Stages in epochs.

    Args:
        given: `schedule.stages`: whole numbers are epochs, fractions shares of all epochs. None: neither a warm-up nor an
            ordinary stage, so that what `augment` asks for happens in all epochs but the clean ones.
        no_aug_epochs: clean epochs at the end, unless stages are given.
        recipe: stages of the DEIM recipe for this length.

    Raises:
        ConfigError: the stages do not lie within the run.
    """
    if given is None:
        dense, ordinary, clean = 0, epochs - no_aug_epochs, epochs - no_aug_epochs
    elif given == "deim":
        dense, ordinary, clean = recipe
    elif all(isinstance(bound, int) for bound in given):
        dense, ordinary, clean = (int(bound) for bound in given)
    else:
        dense, ordinary, clean = (round(float(bound) * epochs) for bound in given)
    if clean > epochs:
        raise ConfigError(
            f"schedule.stages ({dense}, {ordinary}, {clean}) must lie in the {plural(epochs, 'epoch')} of the run; shares such"
            " as [0.07, 0.5, 0.86] fit every length"
        )
    return Stages(dense, ordinary, clean if clean < epochs else None)


def stage_lines(stages: Stages, epochs: int) -> Iterator[str]:
    """Describe the stages where a run has more than strong and clean epochs."""
    if stages.dense == 0 and stages.ordinary == (epochs if stages.clean is None else stages.clean):
        return
    end = "the end" if stages.clean is None else f"epoch {stages.clean}"
    yield (
        f"augmentation: none before epoch {stages.dense}, dense before epoch {stages.ordinary}, ordinary before {end}"
    )


def augmentation_left_out(
    augment: AugmentSettings, stages: Stages, *, epochs: int, images: int, micro_batch_size: int
) -> Iterator[str]:
    """Name parts of the augmentation that never happen, or lose their sense, in this run."""
    wanted = [
        name
        for name, probability in (("mosaic", augment.mosaic_probability), ("mixup", augment.mixup_probability))
        if probability
    ]
    if wanted and stages.ordinary <= stages.dense:
        yield f"left out: {' and '.join(wanted)}, as {plural(epochs, 'epoch')} leave none for the dense stage"
        return
    if augment.mosaic_probability and images < TILES:
        yield f"left out: mosaics of four images, as there are only {images}; they repeat some"
    blends = [
        name
        for name, probability in (("mixup", augment.mixup_probability), ("copy-paste", augment.copy_paste_probability))
        if probability
    ]
    if blends and micro_batch_size < 2:
        yield (
            f"left out: {' and '.join(blends)}, as a micro-batch has one image; a schedule.micro_batch_size of 2 or more"
            " brings them back"
        )
