"""The fused sampling operator: its values by Triton's interpreter, and its machine code by Triton's compiler."""

import subprocess
import sys

import pytest
import torch

from dfine_core import fused_kernels
from tests.support.interpreted import ROOT, run_interpreted

pytest.importorskip("triton")

COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from dfine_core.model import sampling_triton as kernels

constants = dict(HEADS=8, WIDTH=32, CHANNELS=32, P0=3, P1=6, P2=3, P3=0, ROWS=32)
pointers = dict(tokens="*bf16", locations="*fp32", weights="*fp32", out="*fp32", gradients="*fp32", units="*fp32")
pointers |= dict(to_tokens="*fp32", to_locations="*fp32", to_weights="*fp32")
for kernel, more, adds in ((kernels._forward_kernel, {}, False), (kernels._backward_kernel, {"WHOLE": False}, True)):
    given = {**constants, **more}
    types = {n: "constexpr" if n in given else pointers.get(n, "i32") for n in kernel.arg_names}
    made = triton.compile(ASTSource(kernel, types, constexprs=given), target=GPUTarget("cuda", 90, 32))
    code = made.asm["ptx"]
    assert made.asm["cubin"]
    assert "ld.global" in code
    assert ("red." in code or "atom." in code) == adds
print("compiled")
"""


def test_fused_sampling_equals_the_plain_path() -> None:
    run_interpreted("core/sampling_interpreted.py")


@pytest.mark.slow
def test_the_kernels_compile_for_a_gpu() -> None:
    done = subprocess.run([sys.executable, "-c", COMPILE], cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.stdout == "compiled\n", done.stderr[-4000:]


def test_tensors_on_the_cpu_take_the_plain_path() -> None:
    assert fused_kernels.ENABLED
    assert not fused_kernels.usable(torch.zeros(1))


def test_the_environment_switches_fused_kernels_off() -> None:
    code = "from dfine_core import fused_kernels; print(fused_kernels.ENABLED)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env={"DFINE_TRITON": "0"}, capture_output=True, text=True, check=True
    )
    assert done.stdout == "False\n"
