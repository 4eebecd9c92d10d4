"""Averaged weights: the model that is evaluated and shipped."""

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn


def ema_decay(update: int, decay: float, warmup_steps: float) -> float:
    """Decay of the `update`-th update (from 1): rises from 0 to `decay` with time constant `warmup_steps`, so that an average
    that started from random weights forgets them early."""
    return decay if warmup_steps <= 0 else decay * (1 - math.exp(-update / warmup_steps))


class ExponentialMovingAverage:
    """Keeps average = d * average + (1 - d) * current over parameters and floating buffers, batch statistics included."""

    def __init__(self, model: nn.Module, decay: float = 0.9999, warmup_steps: float = 1000):
        self.module = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay
        self.warmup_steps = warmup_steps
        self.updates = 0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """After an optimiser step that was really made; a skipped one must not be averaged in."""
        self.updates += 1
        weight = 1 - ema_decay(self.updates, self.decay, self.warmup_steps)
        average, current = _averaged(self.module), _averaged(model)
        torch._foreach_lerp_(average, current, weight)

    def state_dict(self) -> dict[str, Any]:
        return {"module": self.module.state_dict(), "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.module.load_state_dict(state["module"])
        self.updates = int(state["updates"])


def _averaged(model: nn.Module) -> list[Tensor]:
    """Every distinct floating tensor of the state, trained or counted; constants average to themselves."""
    tensors = [*model.parameters(), *model.buffers()]
    return [t.detach() for t in tensors if t.dtype.is_floating_point]
