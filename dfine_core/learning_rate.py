"""The learning rate as a function of the step."""

import math


def learning_rate_factor(
    step: int, *, warmup_steps: int = 500, total_steps: int | None = None, min_lr_ratio: float = 1.0
) -> float:
    """What every group's learning rate is multiplied by at `step` (from 0).

    Linear warm-up to 1 at step `warmup_steps` - 1, then constant as released; with `total_steps` and a `min_lr_ratio` below 1
    a cosine from 1 to it.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if total_steps is None or min_lr_ratio == 1.0:
        return 1.0
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return min_lr_ratio + (1 - min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress))
