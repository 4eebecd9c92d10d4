"""Report of a sweep: one page with the verdict first, and its table and figures for MLflow."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from matplotlib.figure import Figure

from pipeline import html_pages
from pipeline.config import Experiment
from pipeline.config_files import check, dump
from pipeline.tuning.analysis import sweep_figures
from pipeline.tuning.analysis.factors import factors_of, point_text, value_text
from pipeline.tuning.analysis.importance import Importance, importances
from pipeline.tuning.analysis.noise import point_name
from pipeline.tuning.analysis.verdict import SweepVerdict, judge_sweep
from pipeline.tuning.space import Point, canonical_text
from pipeline.tuning.sweep import Sweep, default_point, evaluations_per_trial, rungs, value_at
from pipeline.tuning.trial_records import STATUSES, TrialRecord
from pipeline.wording import plural

Cell = str | int | float | bool | None
BINS = ("reg_max", "reg_scale", "up")  # fields of the model; a trial with other values starts with re-binned heads
MAPPED = ("model.reg_max", "loss.ddf")  # preferred keys of the map

TITLES = {
    "effects": "Every setting compared with the default",
    "cost": "Metric by cost",
    "importance": "Importance of the keys",
    "map": "Two keys together",
    "pareto": "Accuracy and latency",
    "parallel": "All trials over all keys",
}


@dataclass(frozen=True)
class SweepReport:
    """Records of a sweep with everything derived from them."""

    sweep: Sweep
    records: tuple[TrialRecord, ...]  # in order of their numbers
    default: Point
    rungs: tuple[int, ...]
    verdict: SweepVerdict
    importances: tuple[Importance, ...]
    source_ap: float | None  # AP of the initial detector on the sweep's validation set, if known

    @property
    def unit(self) -> str:
        """Unit of the costs."""
        return "GPU" if any(record.cost.get("gpu_s") for record in self.records) else "CPU"


def make_report(
    sweep: Sweep, records: Sequence[TrialRecord], source_bins: Mapping[str, float] | None = None
) -> SweepReport:
    """Judge the trials. Some may still be running.

    Args:
        source_bins: `BINS` of the detector that all trials start from.
    """
    default = default_point(sweep)
    verdict = judge_sweep(records, space=sweep.space, default=default, metric=sweep.metric, mode=sweep.mode)
    total = evaluations_per_trial(sweep) or max((len(record.curve) for record in records), default=0)
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
    """AP of the initial detector: that of a trial whose heads needed no re-binning, before training."""
    if bins is None:
        return None
    experiment = dump(check(Experiment, sweep.base, source=sweep.experiment))
    for record in records:
        own = {name: record.point.get(f"model.{name}", value_at(experiment, f"model.{name}")) for name in BINS}
        if record.ap_before_training is not None and own == bins:
            return record.ap_before_training
    return None


def draw_figures(report: SweepReport) -> dict[str, Figure]:
    """Figures by name, in reading order; without those that have nothing to show."""
    sweep, records, verdict = report.sweep, report.records, report.verdict
    figures: dict[str, Figure | None] = {
        "effects": sweep_figures.effects_figure(verdict.effects, sweep.metric),
        "cost": sweep_figures.cost_figure(records, sweep.metric, report.rungs, report.unit),
        "importance": sweep_figures.importance_figure(report.importances),
    }
    if verdict.evaluation is not None:
        points = len({point_name(record.point, report.default) for record in records})
        factors = {factor.key: factor for factor in factors_of(sweep.space, report.default, points)}
        if len(factors) > 1:
            across, up = map_keys(report)
            figures["map"] = sweep_figures.map_figure(
                records, factors[across], factors[up], report.default, sweep.metric, verdict.evaluation
            )
    figures["pareto"] = sweep_figures.pareto_figure(records, sweep.metric, verdict.final_noise)
    if verdict.evaluation is not None:
        figures["parallel"] = sweep_figures.parallel_figure(
            records, sweep.space, report.default, sweep.metric, verdict.evaluation
        )
    return {name: figure for name, figure in figures.items() if figure is not None}


def map_keys(report: SweepReport) -> tuple[str, str]:
    """Keys of the map: bins and DDF weight, or the two most important keys if these are not searched."""
    by_importance = [one.key for one in report.importances]
    keys = [*by_importance, *(key for key in report.sweep.space if key not in by_importance)]
    if set(MAPPED) <= set(keys):
        return MAPPED
    return keys[0], keys[1]


def trial_table(report: SweepReport) -> dict[str, list[Cell]]:
    """Columns of the table of trials, by name; for MLflow and for the page."""
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
    row |= {key: _plain_cell(record.point.get(key)) for key in report.sweep.space}
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


def _plain_cell(value: object) -> Cell:
    return value if isinstance(value, str | int | float | bool | None) else canonical_text(value)


def report_page(report: SweepReport, figures: Mapping[str, Figure] | None = None) -> str:
    """Report as a self-contained HTML page.

    Args:
        figures: from `draw_figures`, if they exist already.
    """
    figures = draw_figures(report) if figures is None else figures
    columns = trial_table(report)
    statuses = [record.status for record in report.records]
    return html_pages.render(
        "pipeline.tuning.analysis",
        "sweep.html.j2",
        report=report,
        sweep=report.sweep,
        verdict=report.verdict,
        headline=headline(report),
        facts=sweep_facts(report),
        figures=[(name, TITLES[name], sweep_figures.svg(figure, name)) for name, figure in figures.items()],
        captions=captions(report),
        columns=list(columns),
        rows=list(zip(statuses, zip(*columns.values(), strict=True), strict=True)),
        experiment=PurePosixPath(report.sweep.experiment).name,
        point_text=point_text,
        cell_text=_cell_text,
    )


def headline(report: SweepReport) -> str:
    """Verdict in one sentence."""
    verdict = report.verdict
    if verdict.points:
        words = [point.verdict for point in verdict.points]
        counts = ", ".join(f"{words.count(word)} {word}" for word in dict.fromkeys(words))
        return f"{plural(len(words), 'point')} confirmed with fresh seeds, compared with the default: {counts}."
    return "No point was confirmed yet. The comparison of settings below is from the search alone."


def sweep_facts(report: SweepReport) -> list[tuple[str, str]]:
    """Settings and cost of the sweep, as (name, value)."""
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
        ("searcher", f"{sweep.searcher.kind}, optimizes {' and '.join(sweep.objectives)}"),
        ("scheduler", f"{sweep.scheduler.kind}{at_rungs}"),
        ("seeds", f"{sweep.seeds_per_point} per point, {sweep.replicates} replicates of the default"),
        ("confirmation", f"the top {sweep.confirm.top} points with {sweep.confirm.seeds} fresh seeds each"),
        ("starts from", _initial_weights(report)),
        ("the default", point_text(report.default)),
    ]


def _initial_weights(report: SweepReport) -> str:
    sweep = report.sweep
    if sweep.init is None:
        return "the experiment's own initial weights"
    if report.source_ap is None:
        return f"{sweep.init}; its AP before training is not known: no trial has its bins"
    return f"{sweep.init}, AP {report.source_ap:.4f} on this data before training"


def captions(report: SweepReport) -> dict[str, str]:
    """Caption of each figure, by name."""
    after = f"after evaluation {report.verdict.evaluation}, the last that every trial reached"
    return {
        "effects": f"Measured {after}, with the other keys accounted for. Grey: within chance.",
        "cost": "One line per trial. Crosses mark trials that were stopped early; at the common evaluation they are part of"
        " every comparison. Collapsed trials run along the lower edge. The spread of the replicates of the default is the"
        " noise.",
        "importance": f"PED-ANOVA over the trials of the search, {after}. A bar that ends before the orange mark means nothing.",
        "map": f"Median of each cell {after}, over all values of the other keys. The frame marks the default.",
        "pareto": "Finished trials. Bars: 95 % of the differences between two single runs of equal points. The line is the"
        " Pareto front; its numbers are those of the table.",
        "parallel": f"Colour and last axis: the metric {after}. Lines at listed values are spread slightly, to keep them apart.",
    }


def _cell_text(value: Cell) -> str:
    if value is None:
        return ""
    return f"{value:.4f}" if isinstance(value, float) and 0.001 <= abs(value) < 1 else value_text(value)
