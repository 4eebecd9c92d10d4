"""Comparison of runs: differences in config, data, code, versions and results, with the noise of each result."""

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from pipeline import html_pages, storage
from pipeline.config import ConfigError
from pipeline.config_files import flatten, read_yaml
from pipeline.evaluation.coco_metrics import NUMBERS
from pipeline.evaluation.report import REPORT
from pipeline.tracking.run_facts import RunFacts, Runs
from pipeline.tracking.settings import EXPERIMENT_FILE, MAX_PARAM, RUN_KEY, mlflow_value
from pipeline.training import checkpoint
from pipeline.training.run_dir import NEUTRAL, RESULT, RUN_START
from pipeline.tuning.analysis.noise import Noise, pooled_noise
from pipeline.tuning.analysis.paired_images import paired_images
from pipeline.tuning.trial_records import finite_or_none

Part = Literal["config", "data", "code", "versions"]
# Keys without effect on the result. Data are compared by their digests, not by their paths.
NO_EFFECT = (*NEUTRAL, "name", "data.train", "data.val")
MISSING = "-"
STEP_FOLDER = "step-"  # first characters of the folder of an evaluation
MAX_VALUE_LENGTH = 60  # characters, in the console
HASH_LENGTH = 12  # characters of a digest or commit


@dataclass(frozen=True)
class Difference:
    """A key whose value is not the same in all runs."""

    part: Part
    key: str
    values: tuple[str, ...]  # one for each run
    neutral: bool = False  # without effect on the result

    @property
    def texts(self) -> tuple[str, ...]:
        """Values as shown: digests and commits are shortened."""
        if self.part not in ("data", "code"):
            return self.values
        pairs = [value.partition("+") for value in self.values]
        return tuple(f"{name[:HASH_LENGTH]}{sign}{changes}" for name, sign, changes in pairs)


@dataclass(frozen=True)
class MetricComparison:
    """One metric of all runs."""

    name: str
    values: tuple[float | None, ...]  # one for each run
    noise: Noise

    @property
    def changes(self) -> tuple[float | None, ...]:
        """Differences of the other runs from the first."""
        first, *others = self.values
        return tuple(None if first is None or value is None else value - first for value in others)

    def word(self, change: float | None) -> str:
        """Judge the change between two single runs by the noise."""
        if change is None:
            return MISSING
        if self.noise.df < 1:
            return "noise unknown"
        return "within noise" if abs(change) <= self.noise.band() else "beyond noise"


@dataclass(frozen=True)
class Comparison:
    """Two or more runs, compared with the first."""

    runs: tuple[RunFacts, ...]
    differences: tuple[Difference, ...]
    results: tuple[MetricComparison, ...]
    noise_from: str  # source of the noise, as text

    @property
    def effective(self) -> tuple[Difference, ...]:
        """Differences that may change the result."""
        return tuple(difference for difference in self.differences if not difference.neutral)


def read_folder(folder: str) -> RunFacts | None:
    """Read a run from its folder; None if it is no run's folder.

    Raises:
        ConfigError: its files are damaged.
    """
    if not storage.exists(storage.join(folder, RUN_START)):
        return None
    try:
        start = json.loads(storage.read_bytes(storage.join(folder, RUN_START)))
        params = _params(start["experiment"])
        finished = storage.exists(storage.join(folder, RESULT))
        step, report = (None, storage.join(folder, RESULT)) if finished else _newest_report(folder)
        result = json.loads(storage.read_bytes(report)) if report else {}
        numbers = {name: float(value) for name, value in (result.get("numbers") or {}).items() if value is not None}
    except (ValueError, KeyError, AttributeError) as error:
        raise ConfigError(f"{folder}: {RUN_START} or {RESULT} is damaged: {error!r}") from None
    metadata = _newest_metadata(folder)
    return RunFacts(
        title=folder.rstrip("/").rpartition("/")[2],
        params=params,
        data={use: digest for use, digest in start["data"].items() if digest},
        commit=metadata.commit if metadata else None,
        versions=metadata.versions if metadata else {},
        results=numbers,
        status="finished" if finished else "not finished" + (f", evaluated at step {step:,}" if step else ""),
        folder=folder,
        tags={RUN_KEY: start.get("tracking_key", "")},
    )


def _params(experiment: Mapping[str, object]) -> dict[str, str]:
    return {key: mlflow_value(value, MAX_PARAM) for key, value in flatten(experiment).items()}


def _newest_report(folder: str) -> tuple[int | None, str | None]:
    """Step and report of the newest evaluation of an unfinished run."""
    evaluations = storage.join(folder, "evaluation")
    for name in sorted(storage.names(evaluations), reverse=True):
        report = storage.join(evaluations, name, REPORT)
        if name.startswith(STEP_FOLDER) and storage.exists(report):
            return int(name.removeprefix(STEP_FOLDER)), report
    return None, None


def _newest_metadata(folder: str) -> checkpoint.Metadata | None:
    checkpoints = storage.join(folder, "checkpoints")
    for step in reversed(checkpoint.steps_in(checkpoints)):
        try:
            return checkpoint.read_metadata(storage.join(checkpoints, checkpoint.step_folder(step)))
        except checkpoint.CheckpointError:
            continue
    return None


def compare(runs: Sequence[RunFacts], replicates: Sequence[RunFacts] = (), noise_from: str = "") -> Comparison:
    """Compare runs with the first.

    Args:
        replicates: runs for the noise; those that differ only in their seed form groups.

    Raises:
        ConfigError: fewer than two runs.
    """
    if len(runs) < 2:
        raise ConfigError("give two runs or more: folders, MLflow ids or names")
    groups: dict[str, list[RunFacts]] = {}
    for run in replicates:
        groups.setdefault(_settings_without_seed(run), []).append(run)
    differences = [*_config_differences(runs), *_differing("data", [run.data for run in runs])]
    differences += _differing("code", [{"commit": run.commit or MISSING} for run in runs])
    differences += _differing("versions", [run.versions for run in runs])
    names = [name for name in NUMBERS if any(finite_or_none(run.results.get(name)) is not None for run in runs)]
    results = []
    for name in names:
        known = [
            [v for run in group if (v := finite_or_none(run.results.get(name))) is not None]
            for group in groups.values()
        ]
        results.append(
            MetricComparison(name, tuple(finite_or_none(run.results.get(name)) for run in runs), pooled_noise(known))
        )
    return Comparison(tuple(runs), tuple(differences), tuple(results), noise_from)


def _settings_without_seed(run: RunFacts) -> str:
    """Text that is equal for runs that differ only in their seed."""
    params = {key: value for key, value in run.params.items() if key != "seed" and not key.startswith(NO_EFFECT)}
    return json.dumps([params, run.data], sort_keys=True)


def _config_differences(runs: Sequence[RunFacts]) -> list[Difference]:
    marked = [
        Difference(d.part, d.key, d.values, d.key.startswith(NO_EFFECT))
        for d in _differing("config", [run.params for run in runs])
    ]
    return sorted(marked, key=lambda difference: (difference.neutral, difference.key))


def _differing(part: Part, contents: Sequence[Mapping[str, str]]) -> list[Difference]:
    keys = sorted({key for content in contents for key in content})
    rows = [(key, tuple(content.get(key, MISSING) for content in contents)) for key in keys]
    return [Difference(part, key, values) for key, values in rows if len(set(values)) > 1]


# Finding the runs


def open_runs(
    names: Sequence[str], noise: Sequence[str], *, tracking: str | None, storage_uri: str
) -> tuple[list[RunFacts], list[RunFacts], str]:
    """Find runs and replicates; the text names the source of the replicates.

    Args:
        names: folders, MLflow ids or names.
        noise: replicates, likewise; default: the runs of the sweeps that `names` belong to.

    Raises:
        ConfigError, RunLookupError: a run cannot be found.
    """
    runs = [open_run(name, tracking, storage_uri) for name in names]
    if noise:
        replicates = [open_run(name, tracking, storage_uri) for name in noise]
        return runs, replicates, f"{len(replicates)} runs given as replicates"
    parents = {run.parent_id for run in runs if run.parent_id}
    if not parents:
        return runs, [], "no sweep and no --noise runs"
    known = Runs(tracking, storage_uri)
    children = [child for parent in sorted(parents) for child in known.children(parent)]
    return runs, [child for child in children if child.status == "finished"], "the runs of their sweep"


def open_run(name: str, tracking: str | None, storage_uri: str) -> RunFacts:
    """Read a run from its folder, or find it in MLflow, with its whole experiment."""
    if (found := read_folder(name)) is not None:
        return found
    known = Runs(tracking, storage_uri)
    facts = known.find(name)
    assert facts.run_id is not None
    with tempfile.TemporaryDirectory() as folder:
        file = known.download(facts.run_id, EXPERIMENT_FILE, folder)
        return facts if file is None else replace(facts, params=_params(read_yaml(file)))


# Text and page


def comparison_text(comparison: Comparison) -> str:
    """Comparison for the console."""
    lines = [
        f"{letter}  {run.title}, {run.status}"
        for letter, run in zip(_letters(comparison), comparison.runs, strict=True)
    ]
    lines += _noise_lines(comparison)
    for part in ("config", "data", "code", "versions"):
        differences = [difference for difference in comparison.effective if difference.part == part]
        lines += ["", f"{part}: no difference" if not differences else f"{part}:"]
        lines += [f"  {d.key}: " + "  |  ".join(map(_short, d.texts)) for d in differences]
    neutral = [difference.key for difference in comparison.differences if difference.neutral]
    if neutral:
        lines.append(f"\nalso different, without effect on the result: {', '.join(neutral)}")
    lines += ["", "results:" if comparison.results else "results: none of these runs has results"]
    for result in comparison.results:
        lines.append("  " + "  |  ".join([f"{result.name:9} {_number_text(result.values[0])}", *_changes(result)]))
    return "\n".join(lines)


def _changes(result: MetricComparison) -> list[str]:
    band = f" ±{result.noise.band():.4f}" if result.noise.df else ""
    pairs = zip(result.values[1:], result.changes, strict=True)
    return [
        f"{_number_text(value)} ({change:+.4f}{band}, {result.word(change)})"
        if change is not None
        else _number_text(value)
        for value, change in pairs
    ]


def _noise_lines(comparison: Comparison) -> list[str]:
    ap = next((result for result in comparison.results if result.name == "AP"), None)
    if ap is None:
        return []
    return [
        f"noise of AP, from {comparison.noise_from}: {ap.noise.text()}",
        "each band is for one metric and two single runs (95 %): one of twelve metrics may well lie outside by chance",
    ]


def comparison_page(comparison: Comparison) -> str:
    """Comparison as a self-contained HTML page."""
    return html_pages.render(
        "pipeline.tuning.analysis",
        "compare.html.j2",
        comparison=comparison,
        letters=_letters(comparison),
        parts=[
            (part, [difference for difference in comparison.differences if difference.part == part])
            for part in ("config", "data", "code", "versions")
        ],
        noise_lines=_noise_lines(comparison),
        number=_number_text,
        images=paired_images(comparison.runs),
    )


def _letters(comparison: Comparison) -> list[str]:
    return [chr(ord("A") + n) if n < 26 else str(n + 1) for n in range(len(comparison.runs))]


def _number_text(value: float | None) -> str:
    return MISSING if value is None else f"{value:.4f}"


def _short(text: str) -> str:
    return text if len(text) <= MAX_VALUE_LENGTH else f"{text[: MAX_VALUE_LENGTH - 1]}…"
