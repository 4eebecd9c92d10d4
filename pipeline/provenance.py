"""Where a result comes from: the versions of its packages and the commit of its code."""

import platform
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from dfine_core import DISTRIBUTION, __version__

PACKAGES = ("torch", "torchvision", "ray", "mlflow", "numpy", "pyarrow")  # that a training rests on


@cache
def versions(packages: tuple[str, ...] = PACKAGES) -> dict[str, str]:
    """Versions of Python, of this project and of those packages that are installed."""
    found = {"python": platform.python_version(), DISTRIBUTION: __version__}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


@cache
def code_commit() -> str | None:
    """Commit of the working tree, with `+changes` if it has any; None outside of one."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, timeout=10, check=True)
        return done.stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.SubprocessError):
        return None
