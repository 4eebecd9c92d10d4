"""The fused photometric distortion, run by Triton's interpreter."""

import pytest

from tests.support.interpreted import run_interpreted

pytest.importorskip("triton")


def test_one_pass_distorts_as_thirty_do() -> None:
    run_interpreted("data/photometric_interpreted.py")
