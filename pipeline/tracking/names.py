"""What MLflow takes as a name and as a value."""

import posixpath
import re
from collections.abc import Mapping
from functools import lru_cache

RUN_KEY = "dfine.run_key"  # tag: finds the run again after a crash between its creation and noting its id
Scalar = str | int | float | bool | None

# Limits of MLflow, in characters; longer values end in an ellipsis.
MAX_KEY = 250
MAX_PARAM = 6000
MAX_TAG = 8000

_ILLEGAL = re.compile(r"[^/\w.\- :]")


@lru_cache(maxsize=65536)
def mlflow_key(name: str) -> str:
    """The nearest name that MLflow takes: letters, digits and `_-. :/`, as a path that leads to itself."""
    legal = posixpath.normpath(_ILLEGAL.sub("_", name).lstrip("/"))
    if legal.startswith("."):  # alone, or leading upwards
        legal = "_" + legal.lstrip(".")
    return legal[:MAX_KEY].rstrip("/")


def mlflow_value(value: Scalar, limit: int) -> str:
    """A value as text of at most `limit` characters."""
    text = str(value)
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def flatten(settings: Mapping[str, object], prefix: str = "") -> dict[str, Scalar]:
    """Nested settings as dotted keys, so that the UI can filter and compare by each: `{"model.reg_max": 32}`.

    A list is one value: MLflow compares its text.
    """
    flat: dict[str, Scalar] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value if isinstance(value, Scalar) else str(value)
    return flat
