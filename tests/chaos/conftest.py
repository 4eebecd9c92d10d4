"""Sum of all blows of a session, which must be 40 if all of `tests/chaos` was run."""

import pytest

from tests.support.chaos import BLOWS_LANDED

LEAST_BLOWS = 40
TESTS = 9  # of `tests/chaos`


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the sum."""
    if landed := _landed(terminalreporter):
        terminalreporter.write_line(f"chaos: {sum(landed)} blows landed on living processes, in {len(landed)} tests")


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail a session of too few blows."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    landed = _landed(reporter) if reporter else []
    if len(landed) >= TESTS and sum(landed) < LEAST_BLOWS:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def _landed(reporter: pytest.TerminalReporter) -> list[int]:
    reports = [report for group in ("passed", "failed") for report in reporter.stats.get(group, [])]
    return [value for report in reports for name, value in report.user_properties if name == BLOWS_LANDED]
