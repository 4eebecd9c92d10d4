"""Device-side bookkeeping of a step: running statistics, loss scale, and scalars that reach the host without a stall."""

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

    Every micro-batch starts from the statistics before the step; a step keeps the mean of the results.
    """

    def __init__(self, detector: nn.Module) -> None:
        norms = [
            m
            for m in detector.modules()
            if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is not None
        ]
        # Means and variances are averaged; the counters only count steps.
        self._buffers = [cast(Tensor, b) for m in norms for b in (m.running_mean, m.running_var)]
        self._counters = [cast(Tensor, m.num_batches_tracked) for m in norms]
        self._sizes = [b.numel() for b in self._buffers]
        self._held: list[Tensor] = []
        self._held_counters: list[Tensor] = []
        self._sums: list[Tensor] = []

    def begin_step(self) -> None:
        """Copy the state before a step."""
        self._held = [b.clone() for b in self._buffers]
        self._held_counters = [c.clone() for c in self._counters]
        self._sums = [torch.zeros_like(b) for b in self._buffers]

    def accumulate(self) -> None:
        """Add the result of a micro-batch, and return to the state before the step."""
        if self._buffers:
            torch._foreach_add_(self._sums, self._buffers)
        self.reset()

    def reset(self) -> None:
        """Return to the state before the step."""
        if self._buffers:
            torch._foreach_copy_(self._buffers, self._held)

    def mean(self, share: float) -> Tensor:
        """Sum over the accumulated micro-batches, divided by `share`: [V] the values of all norms, end to end.

        Args:
            share: micro-batches per worker; the mean over workers is then the mean over all micro-batches.
        """
        if not self._sums:
            return torch.zeros(0)
        return torch.cat([s.flatten() for s in self._sums]) / share

    def commit(self, mean: Tensor, finite: Tensor) -> None:
        """Write the statistics of a step, or those from before it where `finite` is false."""
        if not self._buffers:
            return
        parts = [p.view_as(b) for p, b in zip(mean.split(self._sizes), self._buffers, strict=True)]
        chosen = [torch.where(finite, part, held) for part, held in zip(parts, self._held, strict=True)]
        torch._foreach_copy_(self._buffers, chosen)
        counted = finite.to(self._counters[0].dtype)
        torch._foreach_copy_(self._counters, [held + counted for held in self._held_counters])


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
