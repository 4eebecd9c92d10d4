"""Which parts of the detector are frozen, as a function of the step alone: a run that resumes freezes as the undisturbed one."""

from collections.abc import Iterator
from dataclasses import dataclass

from dfine_core.parts import parts_named
from pipeline.config import ConfigError, Experiment, Optimizer


@dataclass(frozen=True)
class Freezing:
    """Parts that do not change, and the step that they first take part in."""

    parts: tuple[str, ...] = ()
    thaw_step: int | None = None  # None: frozen to the end

    def at(self, step: int) -> tuple[str, ...]:
        """Frozen parts in the step after `step` steps."""
        return self.parts if self.thaw_step is None or step < self.thaw_step else ()

    def until(self, part: str) -> str:
        """Say how long a part is frozen; empty if it never is."""
        if part not in self.parts:
            return ""
        return "to the end" if self.thaw_step is None else f"until step {self.thaw_step}"


NOTHING_FROZEN = Freezing()


def resolve_freezing(optimizer: Optimizer, *, steps_per_epoch: int, steps: int) -> Freezing:
    """Freezing in steps.

    Raises:
        ConfigError: the parts would thaw after the end of the run.
    """
    thaw_step = optimizer.thaw_steps
    if optimizer.thaw_epochs is not None:
        thaw_step = optimizer.thaw_epochs * steps_per_epoch
    if thaw_step is not None and thaw_step >= steps:
        key, value = ("steps", thaw_step) if optimizer.thaw_epochs is None else ("epochs", optimizer.thaw_epochs)
        raise ConfigError(
            f"optimizer.thaw_{key} ({value}) is step {thaw_step}, and the run ends with step {steps}: give a lower number, or"
            " leave it out to freeze to the end"
        )
    return Freezing(parts_named(optimizer.freeze), thaw_step)


def freezing_lines(freezing: Freezing, experiment: Experiment) -> Iterator[str]:
    """Describe what is frozen, and warn where nothing trained would be."""
    if not freezing.parts:
        return
    yield f"frozen {freezing.until(freezing.parts[0])}: {', '.join(freezing.parts)}"
    if not experiment.init:
        yield (
            "WARNING: no initial weights are given (init), so the frozen parts stay random: give init, or leave optimizer.freeze"
            " out; weights of --resume count as well"
        )
