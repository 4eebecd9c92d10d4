"""Exported files in processes of their own: what a runtime does to its process is a finding, and nothing is left behind."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
import pytest

from dfine_core.agreement import FULL
from dfine_core.runtimes.program import OpenOptions, Program
from pipeline.export.check_images import from_synthetic_images
from pipeline.export.formats import Opening
from pipeline.export.gate import GateSubject, check_subjects
from pipeline.export.isolated import IsolatedProgram, Limits, ProgramError
from tests.support import faulty_runtimes
from tests.support.varied_detectors import loaded, small

IMAGES = np.linspace(0, 1, 3 * 3 * 64, dtype=np.float32).reshape(3, 3, 8, 8)
SIZES = np.array([[100, 50], [30, 40], [7, 9]])
NOWHERE = Path("none")


def opener(function: Callable[..., Program]) -> str:
    return f"{faulty_runtimes.__name__}:{function.__name__}"


def test_arrays_and_facts_come_back_from_the_process_and_a_last_batch_is_padded() -> None:
    options = OpenOptions(precision="default", threads=2)
    with IsolatedProgram(opener(faulty_runtimes.works), NOWHERE, options) as program:
        assert program.runtime == "sums with 2 threads in default"
        assert (program.input_size, program.batch_size, program.description) == ((8, 8), 2, {"names": ["cat"]})
        labels, boxes, scores = program(IMAGES, SIZES)  # three images in batches of two
        assert labels.tolist() == [[1]] * 3
        assert boxes.tolist() == [[[100, 50, 100, 50]], [[30, 40, 30, 40]], [[7, 9, 7, 9]]]
        np.testing.assert_allclose(scores[:, 0], IMAGES.mean((1, 2, 3)), rtol=1e-6)
        seconds = program.seconds(IMAGES[:2], SIZES[:2], calls=4)
        assert seconds.shape == (4,)
        assert (seconds > 0).all()
        process = psutil.Process(program._process.pid)
    assert not process.is_running()


@pytest.mark.parametrize(
    ("function", "limits", "message"),
    [
        (faulty_runtimes.crashes, Limits(), "its process ended by SIGSEGV"),
        (faulty_runtimes.ends, Limits(), "its process ended with exit code 7: out of handles"),
        (faulty_runtimes.hangs, Limits(call_s=0.3), "no result within 0.3 s"),
        (faulty_runtimes.grows, Limits(memory_bytes=2**28), r"stopped at 0\.\d GiB of memory \(limit 0\.2 GiB\)"),
        (faulty_runtimes.returns_too_few, Limits(), "1 outputs instead of labels, boxes and scores"),
    ],
)
def test_a_runtime_that_fails_is_a_finding(function: Callable[..., Program], limits: Limits, message: str) -> None:
    with (
        IsolatedProgram(opener(function), NOWHERE, limits=limits) as program,
        pytest.raises(ProgramError, match=message),
    ):
        program(IMAGES, SIZES)


def test_a_file_that_cannot_be_opened_is_a_finding() -> None:
    with pytest.raises(ProgramError, match=r"^RuntimeError: no kernel for this$"):
        IsolatedProgram(opener(faulty_runtimes.fails_to_open), NOWHERE)
    with pytest.raises(ProgramError, match="no result within 0 s"):
        IsolatedProgram(opener(faulty_runtimes.works), NOWHERE, limits=Limits(open_s=0))


def test_the_gate_refuses_a_file_whose_runtime_crashes_and_goes_on_with_the_others() -> None:
    subjects = {
        function.__name__: GateSubject(NOWHERE, (Opening("faulty", opener(function)),), FULL)
        for function in (faulty_runtimes.crashes, faulty_runtimes.fails_to_open)
    }
    model = loaded(small(num_layers=1))
    subjects["right"] = GateSubject(NOWHERE, (Opening("PyTorch", lambda *_: model.detect),), FULL)
    verdicts = check_subjects(model, subjects, from_synthetic_images(2, longest_side=64))
    assert {name: verdict.reason for name, verdict in verdicts.items()} == {
        "crashes": "fails on a batch of 1: its process ended by SIGSEGV",
        "fails_to_open": "cannot be opened: RuntimeError: no kernel for this",
        "right": None,
    }


def test_the_process_ends_with_its_parent_even_in_a_call_that_never_returns() -> None:
    """The parent is killed while the runtime hangs."""
    code = (
        "import numpy as np; from pathlib import Path; from pipeline.export.isolated import IsolatedProgram\n"
        f"program = IsolatedProgram({opener(faulty_runtimes.hangs)!r}, Path('none'))\n"
        "print(program._process.pid, flush=True); program(np.zeros((1, 3, 8, 8), np.float32), np.ones((1, 2), np.int64))"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        os.kill(parent.pid, signal.SIGKILL)
    with suppress(psutil.NoSuchProcess):
        child.wait(timeout=60)
    assert not child.is_running()
