"""What differs between runs, in config, data, code, versions and results; and what of it chance alone could do."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import jinja2

from pipeline import storage
from pipeline.config import ConfigError
from pipeline.config_files import flatten
from pipeline.evaluation.coco_metrics import NUMBERS
from pipeline.tracking.client import RunFacts, Runs
from pipeline.tracking.settings import MAX_PARAM, RUN_KEY, mlflow_value
from pipeline.training import checkpoint
from pipeline.training.run_dir import NEUTRAL, RESULT, RUN_START
from pipeline.tuning.analysis.noise import Noise, pooled

Part = Literal["config", "data", "code", "versions"]
# Changes nothing of what is learnt. Data are compared by their digests, wherever they lie.
NOT_LEARNT = (*NEUTRAL, "name", "data.train", "data.val")
DERIVED = "derived."  # written to MLflow only
NOTHING = "-"
SHOWN, HASH_SHOWN = 60, 12  # characters of a value in the console, of a digest anywhere


@dataclass(frozen=True)
class Difference:
    part: Part
    key: str
    values: tuple[str, ...]  # one for each run
    neutral: bool = False  # it changes nothing of what is learnt

    @property
    def texts(self) -> tuple[str, ...]:
        """For people: of digests and commits the beginning."""
        if self.part not in ("data", "code"):
            return self.values
        pairs = [value.partition("+") for value in self.values]
        return tuple(f"{name[:HASH_SHOWN]}{sign}{changes}" for name, sign, changes in pairs)


@dataclass(frozen=True)
class Result:
    name: str
    values: tuple[float | None, ...]  # one for each run
    noise: Noise

    @property
    def changes(self) -> tuple[float | None, ...]:
        """Of all runs but the first, against it."""
        first, *others = self.values
        return tuple(None if first is None or value is None else value - first for value in others)

    def word(self, change: float | None) -> str:
        """What the noise says of a change between two single runs."""
        if change is None:
            return NOTHING
        if self.noise.df < 1:
            return "noise unknown"
        return "within noise" if abs(change) <= self.noise.band() else "beyond noise"


@dataclass(frozen=True)
class Comparison:
    runs: tuple[RunFacts, ...]
    differences: tuple[Difference, ...]
    results: tuple[Result, ...]
    noise_from: str  # where the noise is known from

    @property
    def learnt(self) -> tuple[Difference, ...]:
        return tuple(difference for difference in self.differences if not difference.neutral)


def read_folder(folder: str) -> RunFacts | None:
    """A run's own folder; None if it is not one.

    Raises:
        ConfigError: what it holds cannot be read.
    """
    if not storage.exists(storage.join(folder, RUN_START)):
        return None
    try:
        began = json.loads(storage.read_bytes(storage.join(folder, RUN_START)))
        params = {key: mlflow_value(value, MAX_PARAM) for key, value in flatten(began["experiment"]).items()}
        finished = storage.exists(storage.join(folder, RESULT))
        result = json.loads(storage.read_bytes(storage.join(folder, RESULT))) if finished else {}
        numbers = {name: float(value) for name, value in (result.get("numbers") or {}).items() if value is not None}
    except (ValueError, KeyError, AttributeError) as error:
        raise ConfigError(f"{folder}: its {RUN_START} or {RESULT} is damaged: {error!r}") from None
    metadata = _newest_metadata(folder)
    return RunFacts(
        title=folder.rstrip("/").rpartition("/")[2],
        params=params,
        data={use: digest for use, digest in began["data"].items() if digest},
        commit=metadata.commit if metadata else None,
        versions=metadata.versions if metadata else {},
        results=numbers,
        status="finished" if finished else "not finished",
        tags={RUN_KEY: began.get("tracking_key", "")},
    )


def _newest_metadata(folder: str) -> checkpoint.Metadata | None:
    checkpoints = storage.join(folder, "checkpoints")
    for step in reversed(checkpoint.steps_in(checkpoints)):
        try:
            return checkpoint.read_metadata(storage.join(checkpoints, checkpoint.folder_name(step)))
        except checkpoint.CheckpointError:
            continue
    return None


def compare(runs: Sequence[RunFacts], replicates: Sequence[RunFacts] = (), noise_from: str = "") -> Comparison:
    """
    Args:
        runs: the first is what the others are held against.
        replicates: runs of which some differ in nothing but their seed; the noise comes from these.

    Raises:
        ConfigError: fewer than two runs.
    """
    if len(runs) < 2:
        raise ConfigError("name two runs or more: folders, MLflow ids or names")
    groups: dict[str, list[RunFacts]] = {}
    for run in replicates:
        groups.setdefault(_learnt_from(run), []).append(run)
    differences = [*_config(runs), *_differing("data", [run.data for run in runs])]
    differences += _differing("code", [{"commit": run.commit or NOTHING} for run in runs])
    differences += _differing("versions", [run.versions for run in runs])
    names = [name for name in NUMBERS if any(_finite(run.results.get(name)) is not None for run in runs)]
    results = []
    for name in names:
        known = [[v for run in group if (v := _finite(run.results.get(name))) is not None] for group in groups.values()]
        results.append(Result(name, tuple(_finite(run.results.get(name)) for run in runs), pooled(known)))
    return Comparison(tuple(runs), tuple(differences), tuple(results), noise_from)


def _learnt_from(run: RunFacts) -> str:
    """Equal for runs that differ in their seed alone."""
    params = {
        key: value
        for key, value in run.params.items()
        if key != "seed" and not key.startswith((*NOT_LEARNT, DERIVED, "model.num_classes"))
    }
    return json.dumps([params, run.data], sort_keys=True)


def _config(runs: Sequence[RunFacts]) -> list[Difference]:
    all_derived = all(any(key.startswith(DERIVED) for key in run.params) for run in runs)
    from_mlflow = all(run.run_id for run in runs)
    kept = [
        {
            key: value
            for key, value in run.params.items()
            if (all_derived or not key.startswith(DERIVED)) and (from_mlflow or key != "model.num_classes")
        }
        for run in runs
    ]
    found = _differing("config", kept)
    marked = [Difference(d.part, d.key, d.values, d.key.startswith(NOT_LEARNT)) for d in found]
    return sorted(marked, key=lambda difference: (difference.neutral, difference.key))


def _differing(part: Part, contents: Sequence[Mapping[str, str]]) -> list[Difference]:
    keys = sorted({key for content in contents for key in content})
    rows = [(key, tuple(content.get(key, NOTHING) for content in contents)) for key in keys]
    return [Difference(part, key, values) for key, values in rows if len(set(values)) > 1]


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else value


# Which runs


def open_runs(
    named: Sequence[str], noise: Sequence[str], *, tracking: str | None, storage_uri: str
) -> tuple[list[RunFacts], list[RunFacts], str]:
    """Runs, those that the noise comes from, and a word on where that is.

    Args:
        named: folders, MLflow ids or names.
        noise: the same, of replicates; without any, those of the sweeps that the runs belong to.

    Raises:
        ConfigError, RunLookupError: one cannot be found.
    """
    runs = [find_run(name, tracking, storage_uri) for name in named]
    if noise:
        replicates = [find_run(name, tracking, storage_uri) for name in noise]
        return runs, replicates, f"{len(replicates)} runs given as replicates"
    parents = {run.parent_id for run in runs if run.parent_id}
    if not parents:
        return runs, [], "no sweep and no --noise runs"
    known = Runs(tracking, storage_uri)
    children = [child for parent in sorted(parents) for child in known.children(parent)]
    return runs, [child for child in children if child.status == "finished"], "the runs of their sweep"


def find_run(named: str, tracking: str | None, storage_uri: str) -> RunFacts:
    return read_folder(named) or Runs(tracking, storage_uri).find(named)


# For people


def as_text(comparison: Comparison) -> str:
    lines = [
        f"{letter}  {run.title}, {run.status}"
        for letter, run in zip(_letters(comparison), comparison.runs, strict=True)
    ]
    lines += _noise_lines(comparison)
    for part in ("config", "data", "code", "versions"):
        found = [difference for difference in comparison.learnt if difference.part == part]
        lines += ["", f"{part}: no difference" if not found else f"{part}:"]
        lines += [f"  {d.key}: " + "  |  ".join(map(_short, d.texts)) for d in found]
    neutral = [difference.key for difference in comparison.differences if difference.neutral]
    if neutral:
        lines.append(f"\nalso different, without effect on what is learnt: {', '.join(neutral)}")
    lines += ["", "results:" if comparison.results else "results: none of these runs has any"]
    for result in comparison.results:
        lines.append("  " + "  |  ".join([f"{result.name:9} {_number(result.values[0])}", *_changes(result)]))
    return "\n".join(lines)


def _changes(result: Result) -> list[str]:
    band = f" ±{result.noise.band():.4f}" if result.noise.df else ""
    pairs = zip(result.values[1:], result.changes, strict=True)
    return [
        f"{_number(value)} ({change:+.4f}{band}, {result.word(change)})" if change is not None else _number(value)
        for value, change in pairs
    ]


def _noise_lines(comparison: Comparison) -> list[str]:
    main = next((result for result in comparison.results if result.name == "AP"), None)
    if main is None:
        return []
    return [
        f"noise of AP, from {comparison.noise_from}: {main.noise.text()}",
        "each band is that of one number between two single runs (95 %): of twelve, one may well lie outside by chance",
    ]


def as_html(comparison: Comparison) -> str:
    """One self-contained page."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("pipeline.tuning.analysis"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("compare.html.j2").render(
        comparison=comparison,
        letters=_letters(comparison),
        parts=[
            (part, [difference for difference in comparison.differences if difference.part == part])
            for part in ("config", "data", "code", "versions")
        ],
        noise_lines=_noise_lines(comparison),
        number=_number,
    )


def _letters(comparison: Comparison) -> list[str]:
    return [chr(ord("A") + place) if place < 26 else str(place + 1) for place in range(len(comparison.runs))]


def _number(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.4f}"


def _short(text: str) -> str:
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 1]}…"
