"""Experiment and cluster files: YAML and overrides in, typed values out, every problem in one error."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from pipeline.config import Cluster, ConfigError, Experiment
from pipeline.config_keys import Config, key_prefix, plain_message, unknown_key
from pipeline.redaction import redact_values
from pipeline.text_files import load_yaml, text_of
from pipeline.wording import plural

C = TypeVar("C", bound=Config)


def load_experiment(path: str | Path, overrides: Mapping[str, Any] | None = None) -> Experiment:
    """
    Args:
        overrides: values by dotted key, `{"schedule.epochs": 12}`.

    Raises:
        ConfigError: with every problem of the file and the overrides.
    """
    content = read_yaml(path)
    content.setdefault("name", Path(path).stem)
    return check(Experiment, with_values(content, overrides or {}), source=str(path))


def load_cluster(path: str | Path | None) -> Cluster:
    """Load a cluster file; without a path, the defaults."""
    return Cluster() if path is None else check(Cluster, read_yaml(path), source=str(path))


def check(kind: type[C], content: Mapping[str, Any], *, source: str) -> C:
    """Validate plain values against a config model.

    Args:
        source: file or command that the values come from, for the message.

    Raises:
        ConfigError: with every problem.
    """
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        problems = [_problem(kind, e) for e in error.errors()]
        raise ConfigError("\n  ".join([f"{source}: {plural(len(problems), 'problem')}", *problems])) from None


def dump(config: Config) -> dict[str, Any]:
    """Every value as plain data, defaults included; the inverse of `check`."""
    return config.model_dump(mode="json")


def dump_shareable(config: Config) -> dict[str, Any]:
    """Every value as plain data, secrets hidden: for files that others may read."""
    values: dict[str, Any] = redact_values(dump(config))
    return values


def flatten(settings: Mapping[str, object], prefix: str = "") -> dict[str, str | int | float | bool | None]:
    """Flatten nested settings to dotted keys, by which they can be compared: `{"model.reg_max": 32}`.

    A list becomes one value, its text.
    """
    flat: dict[str, str | int | float | bool | None] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value if isinstance(value, str | int | float | bool | None) else str(value)
    return flat


def as_yaml(content: Mapping[str, Any]) -> str:
    """Format as YAML in the order of the keys."""
    return yaml.safe_dump(dict(content), sort_keys=False, default_flow_style=None, width=120)


def parse_override(text: str) -> tuple[str, Any]:
    """`optimizer.lr=1e-4` as key and value, the value read as YAML."""
    key, sign, value = text.partition("=")
    if not sign or not all(key.split(".")):
        raise ConfigError(f"--set {text}: write KEY=VALUE, as in schedule.epochs=12")
    try:
        return key, load_yaml(value, unique_keys=True)
    except ValueError as error:
        raise ConfigError(f"--set {text}: the value is not readable as YAML: {error}") from None


def parse_overrides(texts: Sequence[str]) -> dict[str, Any]:
    """All `KEY=VALUE` of a command line, in their order.

    Raises:
        ConfigError: a key is given twice, or a text is not KEY=VALUE.
    """
    pairs = [parse_override(text) for text in texts]
    keys = [key for key, _ in pairs]
    if twice := sorted({key for key in keys if keys.count(key) > 1}):
        raise ConfigError(f"--set {', '.join(twice)}: given twice; give each key once")
    return dict(pairs)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML file of keys with values; a key given twice is an error.

    Raises:
        ConfigError: the file is missing or not such a file.
    """
    try:
        content = load_yaml(text_of(Path(path).read_bytes()), unique_keys=True)
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such file") from None
    except ValueError as error:
        raise ConfigError(f"{path}: not readable as YAML: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected keys with values, found {type(content).__name__}")
    return content


def with_values(content: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Copy with values set by dotted key."""
    changed = copy.deepcopy(dict(content))
    for dotted, value in values.items():
        *parents, leaf = dotted.split(".")
        place: Any = changed
        for parent in parents:
            if place.get(parent) is None:
                place[parent] = {}
            place = place[parent]
            if not isinstance(place, dict):
                raise ConfigError(f"{dotted}: {parent} is a value, not a section")
        place[leaf] = _plain(value)
    return changed


def _plain(value: Any) -> Any:
    return [_plain(part) for part in value] if isinstance(value, list | tuple) else value


def _problem(kind: type[Config], error: Any) -> str:
    """Format one problem: key, message, and for an unknown key the nearest known ones."""
    location = error["loc"]
    if error["type"] in ("extra_forbidden", "unexpected_keyword_argument"):  # from a model, from a dataclass
        return key_prefix(location[:-1]) + unknown_key(location[-1], _keys_at(kind, location[:-1]))
    given = error["input"]
    plain = isinstance(given, str | int | float | bool | list | tuple | None)
    shown = f" (it is {given!r})" if plain and repr(given) not in error["msg"] else ""
    return f"{key_prefix(location)}{plain_message(error['msg'])}{shown if error['type'] != 'missing' else ''}"


def _keys_at(kind: Any, location: Sequence[Any]) -> list[str]:
    """Known keys of the section at `location`."""
    for step in location:
        field = kind.model_fields.get(step) if isinstance(kind, type) and issubclass(kind, BaseModel) else None
        if field is None:
            return []
        kind = next((t for t in (*get_args(field.annotation), field.annotation) if isinstance(t, type)), None)
    if is_dataclass(kind):
        return [f.name for f in fields(kind)]
    return list(kind.model_fields) if isinstance(kind, type) and issubclass(kind, BaseModel) else []
