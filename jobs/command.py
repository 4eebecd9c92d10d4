"""Parts that all commands share: the parser, argument types, the first line, and how a mistake ends a command.

A command's module imports this file and the standard library alone. PyTorch, Ray and MLflow are imported inside `main`, after
the arguments and the user's files have been checked: `--help` and a mistyped key take a fraction of a second.
"""

import argparse
import logging
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, get_args

from dfine_core.config import PrecisionName
from dfine_core.thresholds import Threshold, wanted_precision
from dfine_core.tiles import DEFAULT_OVERLAP, LARGEST_OVERLAP, SMALLEST_TILE, Tiling
from jobs import recipes
from pipeline.errors import DISK_FAULTS, UserError, in_one_line, os_error_text
from pipeline.mlflow_access import is_mlflow_uri
from pipeline.pretrained import is_published, weights_location
from pipeline.ray_job import absolute_location

INTERRUPTED = 130  # exit code after Ctrl-C, as shells have it
PACKAGES = ("dfine_core", "pipeline", "jobs")
LOG_LEVELS = ("debug", "info", "warning")

# Flags that had another name before the first release, by command.
OLD_FLAGS = {
    "benchmark": {"--batch": "--batch-sizes", "--batches": "--batch-sizes"},
    "evaluate": {"--micro-batch": "--batch-size", "--pictures": "--num-images"},
    "export": {"--images": "--num-images"},
    "predict": {
        "--every": "--frame-stride",
        "--part": "--part-size",
        "--batch": "--batch-size",
        "--pictures": "--num-images",
        "--explain": "--num-explanations",
    },
    "serve": {"--batch": "--batch-size"},
    "tune": {"--check": "--dry-run", "--register-as": "--registered-model-name"},
}

# Packages that the core does not need, by the extra that brings them; a command's own extra comes first.
EXTRAS = {
    "serve": ("fastapi", "starlette", "python_multipart", "multipart", "uvicorn"),
    "export": ("onnx", "onnxscript", "onnxruntime", "openvino", "nncf", "transformers"),
    "train": (
        *("ray", "mlflow", "pyarrow", "pydantic", "yaml", "pycocotools", "ijson", "simplejpeg", "cv2", "matplotlib"),
        *("jinja2", "tqdm", "hotcoco", "psutil", "pynvml", "optuna", "huggingface_hub"),
    ),
}


class CommandParser(argparse.ArgumentParser):
    """Parser of one command: no abbreviated flags, and an error that names the new flag for an old one."""

    def __init__(self, *args: Any, old_flags: dict[str, str] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False} | kwargs)
        self.old_flags = old_flags or {}

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse what is known; an old flag is an error."""
        for word in sys.argv[1:] if args is None else args:
            if (flag := word.partition("=")[0]) in self.old_flags:
                self.error(f"{flag} is called {self.old_flags[flag]}")
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """End with one line about the mistake, without the whole usage."""
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def command_parser(command: str, description: str | None) -> CommandParser:
    """Make the parser of `dfine <command>`, with the flags of every command.

    Args:
        description: docstring of the command's module, which is its help.
    """
    parser = CommandParser(
        prog=program(command),
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        old_flags=OLD_FLAGS.get(command),
    )
    add_log_level(parser)
    return parser


def program(command: str) -> str:
    """Name under which the command runs: `dfine train`, or `python -m jobs.train` if it was started so."""
    module = f"jobs.{command.replace('-', '_')}"
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return f"python -m {module}" if spec is not None and spec.name == module else f"dfine {command}"


def parsed(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the arguments, and set the log level that they name."""
    args = parser.parse_args(argv)
    if level := getattr(args, "log_level", None):
        logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
        for package in PACKAGES:
            logging.getLogger(package).setLevel(level.upper())
    return args


def announce(command: str, text: str) -> None:
    """Print the first line of a command that takes a while, before anything slow is imported.

    It goes to stderr, so that stdout has the result alone.
    """
    print(f"{program(command)} {text}", file=sys.stderr, flush=True)


def refuse_missing(location: str, kind: str) -> None:
    """Check that a path exists, before anything slow is imported to open it; URIs and names are left to what opens them.

    Raises:
        UserError: there is no such path.
    """
    if "://" in location or is_mlflow_uri(location) or is_published(location):
        return
    if not os.path.exists(location):
        raise UserError(f"{location} does not exist: no {kind}")


# Mistakes


@contextmanager
def user_errors(exit_code: int | None = None, *, extra: str = "train") -> Iterator[None]:
    """End the command with a message instead of a traceback for whatever a user can cause; also a decorator.

    Args:
        exit_code: of the command; the error's own if left out.
        extra: of the distribution, which the command needs.

    Raises:
        SystemExit: after a `UserError`, a missing extra, a failing file or network operation, or Ctrl-C. Any other error
            passes through.
    """
    try:
        yield
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except ModuleNotFoundError as missing:
        if (needed := _extra_of(missing.name, extra)) is None:
            raise
        sys.exit(f'this command needs {missing.name}, which is not installed: pip install "ray-dfine[{needed}]"')
    except Exception as raised:
        error = _cause(raised)
        if not isinstance(error, UserError | OSError) and not _is_validation_error(error):
            raise
        logging.getLogger(__name__).debug("the error in full", exc_info=raised)
        own_code = error.exit_code if isinstance(error, UserError) else 1
        _exit(error, exit_code or own_code)


def _exit(error: BaseException, code: int) -> NoReturn:
    if code == 1:
        sys.exit(_message(error))
    print(_message(error), file=sys.stderr)
    sys.exit(code)


def _extra_of(package: str | None, own: str) -> str | None:
    """Extra that brings a missing package; None for a package that is no dependency, or is there in part."""
    names = [extra for extra, packages in EXTRAS.items() if package in packages]
    return own if names == ["train"] else names[0] if names else None


def _is_validation_error(error: BaseException) -> bool:
    pydantic = sys.modules.get("pydantic")  # not imported: nothing can have raised its error
    return pydantic is not None and isinstance(error, pydantic.ValidationError)


def _cause(error: BaseException) -> BaseException:
    """Find the error behind those that Ray wraps around what its tasks and actors raise."""
    while type(error).__module__.startswith("ray.") or hasattr(error, "cause"):
        inner = getattr(error, "cause", None) or error.__cause__
        if not isinstance(inner, BaseException):
            break
        error = inner
    return error


def _message(error: BaseException) -> str:
    if _is_validation_error(error):
        return in_one_line(error)  # type: ignore[arg-type]  # a ValidationError, as just checked
    if isinstance(error, OSError) and (error.filename is not None or error.errno in DISK_FAULTS):
        return os_error_text(error)
    return str(error) or type(error).__name__


# Arguments


def add_log_level(parser: argparse.ArgumentParser) -> None:
    """Add `--log-level`; a parser of a subcommand has it too, and leaves alone what the parser above was given."""
    parser.add_argument(
        "--log-level",
        choices=LOG_LEVELS,
        default=argparse.SUPPRESS,
        help="verbosity of the project's loggers on this machine; debug also prints the traceback of an error",
    )


def add_set(parser: argparse.ArgumentParser, help: str) -> None:
    """Add `--set KEY=VALUE ...`; given several times, all of them count. `pipeline.config_files.parse_overrides` reads them."""
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help=help)


def add_cluster(parser: argparse.ArgumentParser, help: str = "YAML file, see configs/clusters/") -> None:
    """Add `--cluster FILE`."""
    parser.add_argument("--cluster", type=recipe, metavar="FILE", help=help)


def add_verify_data(parser: argparse.ArgumentParser) -> None:
    """Add `--verify-data`."""
    parser.add_argument(
        "--verify-data",
        action="store_true",
        help="before the start, read all shards and compare their SHA-256 with the manifest; sizes are always compared",
    )


def recipe(text: str) -> Path:
    """Argument type: YAML file of the user, or one that is shipped with the project."""
    try:
        return recipes.find(text)
    except FileNotFoundError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def location(text: str) -> str:
    """Argument type: path or URI of data, weights or results; paths become absolute."""
    try:
        return absolute_location(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def detector(text: str) -> str:
    """Argument type: trained detector, by path, URI or published name; paths become absolute."""
    try:
        return weights_location(text)
    except (ValueError, UserError) as error:
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


def not_negative(text: str) -> float:
    """Argument type: number, 0 or more."""
    if not 0 <= (value := float(text)) < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is less than 0")
    return value


def share(text: str) -> float:
    """Argument type: number in 0..1."""
    if not 0 <= (value := float(text)) <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not in 0..1")
    return value


def threshold(text: str) -> Threshold:
    """Argument type: score in 0..1, or `precision=SHARE`."""
    value: Threshold = text if "=" in text else share(text)
    try:
        wanted_precision(value)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{error}") from None
    return value


def coverage(text: str) -> float:
    """Argument type: share of true edges inside an interval, above 0 and below 1."""
    if not 0 < (value := float(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} must lie between 0 and 1: it is the share of true edges inside")
    return value


def add_coverage(arguments: argparse.ArgumentParser) -> None:
    """Add `--coverage` and `--joint`."""
    arguments.add_argument(
        "--coverage",
        type=coverage,
        metavar="SHARE",
        help="add intervals that hold this share of true edges, such as 0.9: by the calibration if it has it, else by the"
        " distributions alone",
    )
    arguments.add_argument(
        "--joint",
        action="store_true",
        help="with --coverage: that share of boxes with all four edges inside, which takes a calibration",
    )


def add_tiles(arguments: argparse.ArgumentParser, use: str) -> None:
    """Add `--tile` and `--overlap`, see `Tiling`.

    Args:
        use: what is done with the tiles, in words.
    """
    arguments.add_argument(
        "--tile",
        type=at_least(SMALLEST_TILE),
        metavar="PX",
        help=f"cut larger images into square tiles of this side; {use}",
    )
    arguments.add_argument(
        "--overlap",
        type=share_of_tile,
        metavar="SHARE",
        help=f"of neighbouring tiles, as a share of the side (with --tile; {DEFAULT_OVERLAP:g})",
    )


def tiling(args: argparse.Namespace) -> Tiling | None:
    """Tiles of `add_tiles`.

    Raises:
        UserError: --overlap without --tile.
    """
    if args.tile is None and args.overlap is not None:
        raise UserError(f"--overlap {args.overlap:g}: there are no tiles without --tile, such as --tile 640")
    return Tiling.given(args.tile, args.overlap)


def share_of_tile(text: str) -> float:
    """Argument type: an overlap of tiles."""
    value = not_negative(text)
    if value > LARGEST_OVERLAP:
        raise argparse.ArgumentTypeError(f"{text} exceeds {LARGEST_OVERLAP:g}: tiles would overlap almost wholly")
    return value


def profile(text: str) -> int:
    """Argument type: `steps=N`, the number of steps to profile."""
    name, _, count = text.partition("=")
    if name != "steps":
        raise argparse.ArgumentTypeError(f"{text!r}: write steps=N")
    return at_least(1)(count)


def add_precision(arguments: argparse.ArgumentParser, default: str = "auto") -> None:
    """Add `--precision`: a name of `dfine_core.precision`, or auto."""
    names = get_args(PrecisionName)
    arguments.add_argument(
        "--precision",
        choices=names,
        default=default,
        metavar="NAME",
        help=f"{', '.join(names)}; auto: the fastest on this CPU that agrees with fp32, measured ({default})",
    )
