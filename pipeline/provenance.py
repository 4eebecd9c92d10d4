"""Provenance of a result: versions of its packages and commit of its code."""

import platform
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from dfine_core import DISTRIBUTION, __version__

PACKAGES = ("torch", "torchvision", "ray", "mlflow", "numpy", "pyarrow")  # a training depends on these


@cache
def versions(packages: tuple[str, ...] = PACKAGES) -> dict[str, str]:
    """Versions of Python, of this project and of the installed ones among `packages`."""
    installed = {"python": platform.python_version(), DISTRIBUTION: __version__}
    for name in packages:
        try:
            installed[name] = version(name)
        except PackageNotFoundError:
            continue
    return installed


@cache
def code_commit() -> str | None:
    """Commit of the working tree, with `+changes` if there are any; None outside a git repository."""
    folder = Path(__file__).parent

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=10, check=True)
        return done.stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.SubprocessError):
        return None
