"""The progress of a training in a log."""

import pytest

from pipeline import progress
from pipeline.progress import StepProgress


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        """Time of this clock."""
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def test_the_first_step_is_a_line_and_then_each_half_minute(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with StepProgress("mine", total=100) as shown:
        shown.show(1, "loss 30.00")
        (first,) = capsys.readouterr().err.splitlines()
        assert first.startswith("mine: 1/100, 1%")
        assert first.endswith("loss 30.00")
        lines = []
        for step in range(2, 62):  # two seconds each
            clock.now += 2
            shown.show(step, f"loss {step}.00")
            lines += capsys.readouterr().err.splitlines()
        assert [line.split(",")[0] for line in lines] == [f"mine: {step}/100" for step in (16, 31, 46, 61)]
        assert lines[0].endswith("loss 16.00")


def test_a_rewind_is_a_line_of_its_own(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with StepProgress("mine", total=100) as shown:
        shown.show(50, "loss 3.00")
        clock.now += 1
        shown.show(40, "loss 4.00")
        assert [line.split(",")[0] for line in capsys.readouterr().err.splitlines()] == ["mine: 50/100", "mine: 40/100"]
