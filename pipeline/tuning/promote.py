"""Promotion of a sweep's best confirmed point: an experiment file, and a registered version of its model."""

from pipeline import storage
from pipeline.config import ConfigError
from pipeline.config_files import as_yaml, check
from pipeline.redaction import HIDDEN
from pipeline.tracking.model_registry import register
from pipeline.tracking.settings import TrackingSettings
from pipeline.training.run_dir import SWEEP_START
from pipeline.tuning.analysis.factors import point_text
from pipeline.tuning.analysis.sweep_report import make_report
from pipeline.tuning.analysis.verdict import PointVerdict
from pipeline.tuning.driver import sweep_for_trials
from pipeline.tuning.space import canonical_text
from pipeline.tuning.sweep import Sweep, experiment_of, tracking_of
from pipeline.tuning.trial_records import TrialRecord, read_records
from pipeline.tuning.trial_store import RECORDS
from pipeline.wording import plural

PROMOTED = "promoted.yaml"


def promote(folder: str, registered_model_name: str | None = None) -> str:
    """Promote the best confirmed point, and return a summary for the console.

    Args:
        folder: of a sweep with results.
        registered_model_name: default: the sweep's name.

    Raises:
        ConfigError: no point was confirmed.
    """
    # 1. Read the sweep, and judge its records again.
    folder = storage.absolute(folder.rstrip("/"))
    path = storage.join(folder, SWEEP_START)
    if not storage.exists(path) or not storage.exists(storage.join(folder, RECORDS)):
        raise ConfigError(f"{folder}: not the folder of a sweep with results")
    sweep = check(Sweep, storage.read_json(path, "sweep")["sweep"], source=path)
    records = read_records(storage.join(folder, RECORDS))
    points = make_report(sweep, records).verdict.points
    if not points:
        raise ConfigError(f"{folder}: no point was confirmed; finish the sweep with confirm.top above 0")
    sign = 1 if sweep.mode == "max" else -1
    best = max(points, key=lambda point: sign * point.mean)

    # 2. Write its experiment, with the initial weights that the trials started from.
    summary = (
        f"{point_text(best.point)}: {sweep.metric} {best.mean:.4f} over {plural(best.runs, 'run')}, {best.effect:+.4f}"
        f" compared with the default ({best.low:+.4f} to {best.high:+.4f}): {best.verdict}"
    )
    uri = tracking_of(sweep).uri
    uri = None if uri and HIDDEN in uri else uri  # its password is not stored: MLFLOW_TRACKING_URI has it
    tracking = TrackingSettings.resolve(folder.rpartition("/")[0], experiment="", run_name="", uri=uri)
    target = storage.join(folder, PROMOTED)
    content = experiment_of(sweep_for_trials(sweep, folder, tracking.uri), best.point, 0)
    content |= {"name": f"{sweep.name}-promoted"}
    if content.get("tracking"):
        content["tracking"] = {**content["tracking"], "uri": uri}
    del content["seed"]
    head = f"# Promoted from sweep {sweep.name}: {summary}.\n#     dfine train {target}\n"
    storage.write_atomic(target, (head + as_yaml(content)).encode())

    # 3. Register its model.
    return "\n".join(
        [summary, f"experiment: {target}", _register_median(tracking.uri, sweep, records, best, registered_model_name)]
    )


def _register_median(
    uri: str, sweep: Sweep, records: list[TrialRecord], best: PointVerdict, registered_model_name: str | None
) -> str:
    """Register the model of the point's median confirmation run: the best of several would promise too much."""
    runs = [
        (value, record.id, record.run_id)
        for record in records
        if record.phase == "confirm" and canonical_text(record.point) == canonical_text(best.point) and record.run_id
        if (value := record.result(sweep.metric)) is not None
    ]
    if not runs:
        return "model: not registered, the runs are not in MLflow"
    _, trial, run_id = sorted(runs)[(len(runs) - 1) // 2]
    return f"model: models:/{register(uri, run_id, registered_model_name or sweep.name or 'sweep')} from trial {trial}"
