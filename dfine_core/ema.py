"""Exponential moving average of the weights: the model that is evaluated and shipped."""

import copy
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn


def ema_decay(update: Tensor, decay: float, warmup_steps: float) -> Tensor:
    """Decay of the `update`-th update (from 1): rises from 0 to `decay` with time constant `warmup_steps`, so that an average
    that started from random weights forgets them early."""
    return decay * (1 - torch.exp(-update / warmup_steps)) if warmup_steps > 0 else torch.full_like(update, decay)


class ExponentialMovingAverage:
    """Moving average of a model: average = d * average + (1 - d) * current.

    It covers parameters and floating buffers, batch statistics included.
    """

    def __init__(self, model: nn.Module, decay: float = 0.9999, warmup_steps: float = 1000):
        self.module = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay
        self.warmup_steps = warmup_steps
        # On the model's device, so that a step which turns out not to count need not be known on the host.
        self.updates = torch.zeros((), dtype=torch.float64, device=next(model.parameters()).device)
        self._held: frozenset[str] = frozenset()
        self._averages = _averaged(self.module)  # kept, as is the list of the model: making them takes milliseconds
        self._model: nn.Module | None = None
        self._current: list[Tensor] = []

    def hold(self, names: Collection[str]) -> None:
        """Leave the tensors of these names in the state as they are, and average all others."""
        self._held = frozenset(names)
        self._averages, self._model = _averaged(self.module, self._held), None

    @torch.no_grad()
    def update(self, model: nn.Module, made: Tensor | None = None) -> None:
        """Move the average towards the current weights.

        Args:
            model: always the same one; its tensors may change in place alone.
            made: [] bool, whether the optimiser step was really made; if not, nothing changes.
        """
        counted = torch.ones_like(self.updates) if made is None else made.to(self.updates)
        self.updates += counted
        weight = (counted * (1 - ema_decay(self.updates, self.decay, self.warmup_steps))).float()
        if model is not self._model:
            self._model, self._current = model, _averaged(model, self._held)
        difference = torch._foreach_sub(self._current, self._averages)
        torch._foreach_mul_(difference, weight)
        torch._foreach_add_(self._averages, difference)

    def state_dict(self) -> dict[str, Any]:
        """Return the averaged weights and the number of updates."""
        return {"module": self.module.state_dict(), "updates": int(self.updates)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what `state_dict` returned."""
        self.module.load_state_dict(state["module"])
        self.updates.fill_(int(state["updates"]))


def _averaged(model: nn.Module, held: Collection[str] = ()) -> list[Tensor]:
    """All distinct floating tensors of the state but the held ones, trained or counted; constants average to themselves."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return [t.detach() for name, t in tensors if t.dtype.is_floating_point and name not in held]
