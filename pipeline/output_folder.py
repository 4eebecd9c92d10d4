"""Protection of a user's files: a command writes into a new or empty folder, or into one of its own."""

from collections.abc import Iterable

from pipeline import storage
from pipeline.errors import ConfigError

SHOWN = 3
HTML = b"<!doctype html"  # begins every page that a command writes


def refuse_foreign_folder(out: str, marker: str, holds: str) -> None:
    """Check that a folder is new, empty, or was written by the same command.

    Args:
        marker: file that the command writes into every folder of its own.
        holds: what such a folder holds, for the message: "prediction", "export".

    Raises:
        ConfigError: it holds other files.
    """
    if storage.exists(storage.join(out, marker)):
        return
    if others := sorted(name for name in storage.names(out) if not name.startswith(".")):
        raise ConfigError(
            f"{out} holds other files ({shown(others)}) and no {holds}, so nothing is written there:"
            " choose a new or an empty folder for --out"
        )


def refuse_foreign_file(uri: str | None, flag: str, begins: bytes) -> None:
    """Check that a file that a flag names is new, or of the kind that the command writes.

    Args:
        uri: None: the flag was not given.
        begins: first characters of such a file, in lower case.

    Raises:
        ConfigError: it is another file, or a folder.
    """
    if uri is None or not storage.exists(uri):
        return
    try:
        with storage.open_random(uri) as file:
            start = bytes(file.read(256)).lstrip().lower()
    except OSError:
        raise ConfigError(f"{flag} {uri}: it is no file; name a file") from None
    if not start.startswith(begins):
        raise ConfigError(f"{flag} {uri} is a file of another kind, and would be replaced: name a new file")


def shown(names: Iterable[str]) -> str:
    """The first few names, and whether there are more."""
    known = list(names)
    return ", ".join(known[:SHOWN]) + (", …" if len(known) > SHOWN else "")
