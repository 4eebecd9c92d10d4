"""Parts that all commands share: how a mistake ends them, `--set`, and arguments that are paths."""

import argparse
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import ValidationError

from pipeline.errors import UserError, in_one_line
from pipeline.ray_job import absolute_location

INTERRUPTED = 130  # exit code after Ctrl-C, as shells have it


@contextmanager
def user_errors(exit_code: int | None = None) -> Iterator[None]:
    """End the command with a message instead of a traceback for whatever a user can cause; also a decorator.

    Args:
        exit_code: of the command; the error's own if left out.

    Raises:
        SystemExit: after a `UserError`, a failing file or network operation, or Ctrl-C. Any other error passes through.
    """
    try:
        yield
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except Exception as raised:
        error = _cause(raised)
        if not isinstance(error, UserError | OSError | ValidationError):
            raise
        code = exit_code or getattr(error, "exit_code", 1)
        if code == 1:
            sys.exit(_message(error))
        print(_message(error), file=sys.stderr)
        sys.exit(code)


def add_set(parser: argparse.ArgumentParser, help: str) -> None:
    """Add `--set KEY=VALUE ...`; given several times, all of them count. `pipeline.config_files.parse_overrides` reads them."""
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help=help)


def location(text: str) -> str:
    """Argument type: path or URI of data, weights or results; paths become absolute."""
    try:
        return absolute_location(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def local_path(text: str) -> Path:
    """Argument type: path on this machine's disk."""
    return Path(location(text))


def at_least(least: int) -> Callable[[str], int]:
    """Argument type: whole number, `least` or more."""

    def integer(text: str) -> int:
        if (value := int(text)) < least:
            raise argparse.ArgumentTypeError(f"{value} is less than {least}")
        return value

    return integer


def positive(text: str) -> float:
    """Argument type: number above 0."""
    if not 0 < (value := float(text)) < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def share(text: str) -> float:
    """Argument type: number in 0..1."""
    if not 0 <= (value := float(text)) <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not in 0..1")
    return value


def _cause(error: BaseException) -> BaseException:
    """The error behind those that Ray wraps around what its tasks and actors raise."""
    while type(error).__module__.startswith("ray.") or hasattr(error, "cause"):
        inner = getattr(error, "cause", None) or error.__cause__
        if not isinstance(inner, BaseException):
            break
        error = inner
    return error


def _message(error: UserError | OSError | ValidationError) -> str:
    if isinstance(error, ValidationError):
        return in_one_line(error)
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {(error.strerror or type(error).__name__).lower()}"
    return str(error) or type(error).__name__
