"""Train, evaluate, export and serve D-FINE detectors.

dfine prepare yolo /data/mine/data.yaml --split train --out shards/mine/train
dfine train small_data.yaml
dfine evaluate runs/small_data shards/mine/val
"""

import argparse
import difflib
import sys
from importlib import import_module

from jobs.command import CommandParser, user_errors

# In the order of a project: data, training, results.
COMMANDS = (
    *("fit", "select", "prepare", "doctor"),
    *("train", "pretrain-finetune", "tune"),
    *("evaluate", "calibrate", "predict", "export", "check-engine", "serve", "benchmark"),
    *("report", "ui", "compare", "lineage", "record", "replay"),
    "weights",
)


@user_errors()
def main(argv: list[str] | None = None) -> int | None:
    """Run `dfine <command> ...`; the command's exit code."""
    words = sys.argv[1:] if argv is None else argv
    if not words:
        first_word_parser().print_help(sys.stderr)
        return 2
    command: str = first_word_parser().parse_args(words[:1]).command
    code: int | None = import_module(module_of(command)).main(words[1:])
    return code


def first_word_parser() -> argparse.ArgumentParser:
    """Parser of the first word; the rest belongs to the command."""
    lines = [f"  {command:18} {summary(command)}" for command in COMMANDS]
    arguments = CommandParser(
        prog="dfine",
        usage="dfine COMMAND ... | --help | --version",
        description=__doc__,
        epilog="\n".join(["commands:", *lines, "", "dfine COMMAND --help shows the arguments of a command."]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    arguments.add_argument("command", type=known, metavar="COMMAND", help=argparse.SUPPRESS)
    arguments.add_argument("--version", action="version", version=version())
    return arguments


def module_of(command: str) -> str:
    """Module of a command: jobs.pretrain_finetune for pretrain-finetune."""
    return f"jobs.{command.replace('-', '_')}"


def summary(command: str) -> str:
    """First sentence of a command's help."""
    text = import_module(module_of(command)).__doc__ or ""
    return " ".join(text.split("\n\n")[0].split())


def known(text: str) -> str:
    """Argument type: name of a command."""
    if text not in COMMANDS:
        close = difflib.get_close_matches(text.replace("_", "-"), COMMANDS, n=2)
        hint = f"did you mean {' or '.join(close)}?" if close else f"there are {', '.join(COMMANDS)}"
        raise argparse.ArgumentTypeError(f"unknown command {text!r}; {hint}")
    return text


def version() -> str:
    """Version of the installed distribution."""
    import dfine_core

    return f"ray-dfine {dfine_core.__version__}"


if __name__ == "__main__":
    sys.exit(main())
