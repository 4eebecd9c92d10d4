"""YAML files under `configs/`: experiments, clusters, chains and sweeps, found beside the code or inside the installed wheel."""

import difflib
from pathlib import Path

INSTALLED = Path(__file__).parent / "configs"  # where the wheel puts them, see setup.py
SOURCE_TREE = Path(__file__).parent.parent / "configs"


def folder() -> Path:
    """Folder of the shipped files."""
    return INSTALLED if INSTALLED.is_dir() else SOURCE_TREE


def names() -> list[str]:
    """Shipped files, relative to their folder: `coco/dfine_s.yaml`."""
    return sorted(path.relative_to(folder()).as_posix() for path in folder().rglob("*.yaml"))


def find(name: str) -> Path:
    """Find a YAML file: the path itself, or otherwise the shipped file of that name, with or without `configs/` before it.

    Raises:
        FileNotFoundError: there is neither; the message has the names that resemble it.
    """
    path = Path(name)
    if path.exists():
        return path
    shipped = name.removeprefix("configs/")
    if shipped in names():
        return folder() / shipped
    close = difflib.get_close_matches(shipped, [*names(), *_neighbours(path)], n=3)
    hint = (
        f"did you mean {' or '.join(close)}?"
        if close
        else "shipped are, for example, coco/dfine_s.yaml and small_data.yaml"
    )
    raise FileNotFoundError(f"{name}: there is no such file, here or among the shipped ones; {hint}")


def _neighbours(path: Path) -> list[str]:
    """YAML files in the folder in which a file was expected."""
    return [str(other) for other in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
