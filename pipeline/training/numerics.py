"""Device-side bookkeeping of a step: running statistics, loss scale, and scalars that reach the host without a stall."""

from collections.abc import Collection
from typing import cast

import torch
from torch import Tensor, nn


class HostScalar:
    """A device scalar copied to the host asynchronously: reading it waits for the step that set it, not for later work."""

    def __init__(self, scalar: Tensor) -> None:
        self._value, self._arrived = scalar, None
        if scalar.is_cuda:
            self._value = torch.empty_like(scalar, device="cpu", pin_memory=True)
            self._value.copy_(scalar, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def __bool__(self) -> bool:
        return bool(self._read())

    def __int__(self) -> int:
        return int(self._read())

    def _read(self) -> Tensor:
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._value


class RunningStatistics:
    """The running means and variances of all batch norms, combined over the micro-batches of a step.

    Every micro-batch starts from the statistics before the step; a step keeps the mean of the results. All statistics become
    views of one tensor, and all counters of another, so that each of these operations is a single one on the device.
    """

    def __init__(self, detector: nn.Module) -> None:
        found = {
            name: m
            for name, m in detector.named_modules()
            if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is not None
        }
        norms = list(found.values())
        self._lengths = {name: m.num_features for name, m in found.items()}
        # Means and variances are averaged; the counters only count steps.
        self._values = _merge([cast(Tensor, b) for m in norms for b in (m.running_mean, m.running_var)])
        self._counters = _merge([cast(Tensor, m.num_batches_tracked) for m in norms])
        self._held, self._held_counters = self._values, self._counters
        self._sums = self._values
        # Masks of the values and counters that a step may change; None: all of them.
        self._moving: tuple[Tensor, Tensor] | None = None

    def hold(self, names: Collection[str]) -> None:
        """Leave the statistics of the norms of these names as they are, and move all others."""
        if not any(name in names for name in self._lengths):
            self._moving = None
            return
        moving = torch.tensor([name not in names for name in self._lengths], device=self._values.device)
        lengths = torch.tensor([2 * length for length in self._lengths.values()], device=self._values.device)
        self._moving = moving.repeat_interleave(lengths), moving

    def begin_step(self) -> None:
        """Copy the state before a step."""
        self._held, self._held_counters = self._values.clone(), self._counters.clone()
        self._sums = torch.zeros_like(self._values)

    def accumulate(self) -> None:
        """Add the result of a micro-batch, and return to the state before the step."""
        self._sums += self._values
        self.reset()

    def reset(self) -> None:
        """Return to the state before the step."""
        self._values.copy_(self._held)

    def mean(self, share: float) -> Tensor:
        """Sum over the accumulated micro-batches, divided by `share`: [V] the values of all norms, end to end.

        Args:
            share: micro-batches per worker; the mean over workers is then the mean over all micro-batches.
        """
        return self._sums / share

    def commit(self, mean: Tensor, finite: Tensor) -> None:
        """Write the statistics of a step, or those from before it where `finite` is false."""
        moves, counts = (finite, finite) if self._moving is None else (finite & mask for mask in self._moving)
        torch.where(moves, mean, self._held, out=self._values)
        torch.add(self._held_counters, counts, out=self._counters)


def _merge(buffers: list[Tensor]) -> Tensor:
    """Lay buffers end to end in one tensor, [V], and make each of them a view of it."""
    if not buffers:
        return torch.zeros(0)
    merged = torch.cat([b.flatten() for b in buffers])
    for buffer, part in zip(buffers, merged.split([b.numel() for b in buffers]), strict=True):
        buffer.data = part.view_as(buffer)
    return merged


class LossScale:
    """Factor on the loss that keeps small fp16 gradients from underflowing; a tensor on the device.

    Doubles after `growth_interval` finite steps in a row, halves after a non-finite step. 1 for fp32 and bf16.
    """

    def __init__(self, device: torch.device, *, enabled: bool, growth_interval: int = 2000) -> None:
        self.enabled = enabled
        self.growth_interval = growth_interval
        self.scale = torch.full((), 2.0**16 if enabled else 1.0, device=device)
        self.finite_steps = torch.zeros((), device=device)

    def update(self, finite: Tensor) -> None:
        """Adapt the scale to the outcome of a step."""
        if not self.enabled:
            return
        self.finite_steps.add_(1).mul_(finite)
        grown = self.finite_steps >= self.growth_interval
        self.scale.copy_(torch.where(finite, torch.where(grown, self.scale * 2, self.scale), self.scale / 2))
        self.finite_steps.mul_(~grown)
