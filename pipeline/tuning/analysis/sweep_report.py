"""The report of a sweep: one page that holds everything, the verdict first; and the parts that MLflow shows by themselves."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

import jinja2
from matplotlib.figure import Figure

from pipeline.config import Experiment
from pipeline.config_files import check, dump
from pipeline.tuning.analysis import sweep_figures
from pipeline.tuning.analysis.factors import factors_of, point_text, shown
from pipeline.tuning.analysis.importance import Importance, importances
from pipeline.tuning.analysis.noise import point_name
from pipeline.tuning.analysis.verdict import Verdict, judge
from pipeline.tuning.records import STATUSES, TrialRecord
from pipeline.tuning.space import Point, as_text
from pipeline.tuning.sweep import Sweep, default_point, evaluations_of, rungs, value_at

Cell = str | int | float | bool | None
BINS = ("reg_max", "reg_scale", "up")  # of the model: with others its heads are re-binned
MAPPED = ("model.reg_max", "loss.ddf")  # the two keys of the map, where both are searched

TITLES = {
    "effects": "Every setting against the default",
    "cost": "What was reached for what it cost",
    "importance": "Which keys decide",
    "map": "Two keys together",
    "pareto": "Accuracy and latency",
    "parallel": "All trials, through all keys",
}


@dataclass(frozen=True)
class SweepReport:
    sweep: Sweep
    records: tuple[TrialRecord, ...]  # by number
    default: Point
    rungs: tuple[int, ...]
    verdict: Verdict
    importances: tuple[Importance, ...]
    source_ap: float | None  # of the detector that all trials start from, on their validation set

    @property
    def unit(self) -> str:
        """What costs are counted in."""
        return "GPU" if any(record.cost.get("gpu_s") for record in self.records) else "CPU"


def make_report(
    sweep: Sweep, records: Sequence[TrialRecord], source_bins: Mapping[str, float] | None = None
) -> SweepReport:
    """Judge the trials; also while some are still running.

    Args:
        source_bins: `BINS` of the detector that all trials start from.
    """
    default = default_point(sweep)
    verdict = judge(records, space=sweep.space, default=default, metric=sweep.metric, mode=sweep.mode)
    total = evaluations_of(sweep) or max((len(record.curve) for record in records), default=0)
    return SweepReport(
        sweep=sweep,
        records=tuple(sorted(records, key=lambda record: record.number)),
        default=default,
        rungs=rungs(sweep, total),
        verdict=verdict,
        importances=importances(records, sweep.space, sweep.metric, mode=sweep.mode),
        source_ap=source_ap(sweep, records, source_bins),
    )


def source_ap(sweep: Sweep, records: Sequence[TrialRecord], bins: Mapping[str, float] | None) -> float | None:
    """What trials begin with whose heads need no re-binning: that is the source itself."""
    if bins is None:
        return None
    experiment = dump(check(Experiment, sweep.base, source=sweep.experiment))
    for record in records:
        own = {name: record.point.get(f"model.{name}", value_at(experiment, f"model.{name}")) for name in BINS}
        if record.ap_before_training is not None and own == bins:
            return record.ap_before_training
    return None


def draw(report: SweepReport) -> dict[str, Figure]:
    """By name, in the order in which they are read; without what there is nothing to show of."""
    sweep, records, verdict = report.sweep, report.records, report.verdict
    drawn: dict[str, Figure | None] = {
        "effects": sweep_figures.effects_figure(verdict.effects, sweep.metric),
        "cost": sweep_figures.cost_figure(records, sweep.metric, report.rungs, report.unit),
        "importance": sweep_figures.importance_figure(report.importances),
    }
    if verdict.evaluation is not None:
        points = len({point_name(record.point, report.default) for record in records})
        factors = {factor.key: factor for factor in factors_of(sweep.space, report.default, points)}
        if len(factors) > 1:
            across, up = mapped_keys(report)
            drawn["map"] = sweep_figures.map_figure(
                records, factors[across], factors[up], report.default, sweep.metric, verdict.evaluation
            )
    drawn["pareto"] = sweep_figures.pareto_figure(records, sweep.metric, verdict.final_noise)
    if verdict.evaluation is not None:
        drawn["parallel"] = sweep_figures.parallel_figure(
            records, sweep.space, report.default, sweep.metric, verdict.evaluation
        )
    return {name: figure for name, figure in drawn.items() if figure is not None}


def mapped_keys(report: SweepReport) -> tuple[str, str]:
    """Bins and DDF weight; where these are not searched, the two most important keys."""
    by_importance = [one.key for one in report.importances]
    keys = [*by_importance, *(key for key in report.sweep.space if key not in by_importance)]
    if set(MAPPED) <= set(keys):
        return MAPPED
    return keys[0], keys[1]


def table(report: SweepReport) -> dict[str, list[Cell]]:
    """A row for each trial, by column; for `Tracker.table` and for the page."""
    columns: dict[str, list[Cell]] = {name: [] for name in _row(report, report.records[0])} if report.records else {}
    for record in report.records:
        for name, value in _row(report, record).items():
            columns[name].append(value)
    return columns


def _row(report: SweepReport, record: TrialRecord) -> dict[str, Cell]:
    metric, evaluation = report.sweep.metric, report.verdict.evaluation
    pruned = record.status == "pruned" and record.rung is not None
    status = f"pruned after {record.rung}" if pruned else record.status
    row: dict[str, Cell] = {"#": record.number, "phase": record.phase, "status": status}
    row |= {key: _cell(record.point.get(key)) for key in report.sweep.space}
    row["seed"] = record.seed
    if evaluation is not None:
        row[f"{metric} after {evaluation}"] = record.at(evaluation, metric)
    row[f"{metric} at the end"] = record.result(metric) if record.status == "finished" else None
    row["AP before training"] = before = record.ap_before_training
    if report.source_ap is not None:
        row["lost by re-binning"] = None if before is None else report.source_ap - before
    row["ms/image"] = record.latency_ms
    row[f"{report.unit} s"] = round(record.cost_s)
    row["reason"] = record.reason
    row["trial"] = record.id
    row["run"] = record.run_id
    return row


def _cell(value: object) -> Cell:
    return value if isinstance(value, str | int | float | bool | None) else as_text(value)


def as_html(report: SweepReport, drawn: Mapping[str, Figure] | None = None) -> str:
    """One self-contained page.

    Args:
        drawn: the figures, if they exist already.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("pipeline.tuning.analysis"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["shown"] = _shown
    environment.filters["point"] = point_text
    drawn = draw(report) if drawn is None else drawn
    rows = table(report)
    return environment.get_template("sweep.html.j2").render(
        report=report,
        sweep=report.sweep,
        verdict=report.verdict,
        headline=headline(report),
        facts=facts(report),
        figures=[(name, TITLES[name], sweep_figures.svg(figure, name)) for name, figure in drawn.items()],
        captions=captions(report),
        columns=list(rows),
        rows=list(zip([record.status for record in report.records], zip(*rows.values(), strict=True), strict=True)),
        experiment=PurePosixPath(report.sweep.experiment).name,
    )


def headline(report: SweepReport) -> str:
    """One sentence of what was found."""
    verdict = report.verdict
    if verdict.points:
        words = [point.verdict for point in verdict.points]
        counts = ", ".join(f"{words.count(word)} {word}" for word in dict.fromkeys(words))
        return f"{len(words)} point(s) confirmed with fresh seeds against the default: {counts}."
    return "No point was confirmed yet: what follows is how settings compare in the search."


def facts(report: SweepReport) -> list[tuple[str, str]]:
    """What was done, as name and value."""
    sweep, records = report.sweep, report.records
    counts = {status: sum(record.status == status for record in records) for status in STATUSES}
    cost = sum(record.cost_s for record in records)
    lost = sum(record.cost_s for record in records if record.status == "failed")
    budget = " and ".join(
        [f"{sweep.trials} points"] * (sweep.trials is not None) + [f"{sweep.hours} hours"] * (sweep.hours is not None)
    )
    at_rungs = f" at evaluations {', '.join(map(str, report.rungs))}" if report.rungs else ""
    return [
        ("trials", ", ".join(f"{count} {status}" for status, count in counts.items() if count) or "none"),
        ("cost", f"{cost / 3600:.2f} {report.unit}-hours" + (f", {lost / 3600:.2f} of them failed" if lost else "")),
        ("budget", budget or "the whole grid"),
        ("searcher", f"{sweep.searcher.kind}, for {' and '.join(sweep.objectives)}"),
        ("scheduler", f"{sweep.scheduler.kind}{at_rungs}"),
        ("seeds", f"{sweep.seeds_per_point} per point, {sweep.replicates} replicates of the default"),
        ("confirmation", f"the top {sweep.confirm.top} points with {sweep.confirm.seeds} fresh seeds each"),
        ("starts from", _source(report)),
        ("the default", point_text(report.default)),
    ]


def _source(report: SweepReport) -> str:
    sweep = report.sweep
    if sweep.init is None:
        return "the experiment's own weights"
    if report.source_ap is None:
        return f"{sweep.init}; no trial has its bins, so its own AP here is not known"
    return f"{sweep.init}, AP {report.source_ap:.4f} here before any training"


def captions(report: SweepReport) -> dict[str, str]:
    """What a reader must know to read each figure."""
    after = f"after evaluation {report.verdict.evaluation}, the last that every trial reached"
    return {
        "effects": f"Taken {after}; other keys are accounted for. Grey: chance alone would do as much.",
        "cost": "Each line is a trial. Crosses: stopped early by the scheduler; they are in all comparisons at the common"
        " evaluation. Trials that collapsed run along the lower edge. The spread of the repeated default is what chance does.",
        "importance": "PED-ANOVA, over the searched trials "
        + after
        + ". A bar that does not pass the orange mark says nothing.",
        "map": f"The median in each cell, {after}, over whatever the other keys were. The frame marks the default.",
        "pareto": "Finished trials. Bars: how far two single runs of equal points differ by chance (95 %). The line joins"
        " what no other trial beats in both; numbers are those of the table.",
        "parallel": f"Colour and last axis: the metric {after}. Listed values are spread a little, so that lines stay apart.",
    }


def _shown(value: Cell) -> str:
    if value is None:
        return ""
    return f"{value:.4f}" if isinstance(value, float) and 0.001 <= abs(value) < 1 else shown(value)
