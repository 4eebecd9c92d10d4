"""Precisions of inference: number format and memory layout, by names that repeat a result."""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

AUTO = "auto"  # see `choose_precision`


@dataclass(frozen=True)
class Arithmetic:
    """Number format under autocast, and the layout of maps and kernels."""

    dtype: torch.dtype | None = None  # None: float32 without autocast
    layout: torch.memory_format = torch.contiguous_format

    def autocast(self, device: torch.device) -> AbstractContextManager[None]:
        """Autocast region of this number format; without one, a region that ends any other."""
        region = torch.autocast(device.type, self.dtype, enabled=self.dtype is not None)
        return cast(AbstractContextManager[None], region)

    def arrange(self, images: Tensor) -> Tensor:
        """Lay out images [B, 3, H, W]."""
        return images.contiguous(memory_format=self.layout)


PRECISIONS = {
    "fp32": Arithmetic(),
    "fp32-channels-last": Arithmetic(layout=torch.channels_last),
    "bf16": Arithmetic(torch.bfloat16),
    "bf16-channels-last": Arithmetic(torch.bfloat16, torch.channels_last),
    "fp16": Arithmetic(torch.float16),
}
