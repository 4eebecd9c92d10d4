"""Whether operators written in Triton replace chains of plain ones: on a GPU, where Triton is installed.

They equal the plain operators up to rounding. DFINE_TRITON=0 in the environment switches them off, to compare.
"""

import importlib.util
import os

import torch
from torch import Tensor

# Read once: a compiled graph must not look at the environment.
ENABLED = importlib.util.find_spec("triton") is not None and os.environ.get("DFINE_TRITON", "1") != "0"


def usable(tensor: Tensor) -> bool:
    """Whether a fused operator takes this tensor. A graph for export has plain operators alone."""
    return ENABLED and tensor.is_cuda and not torch.compiler.is_exporting()
