"""From a sweep to what is used of it: the best confirmed point as an experiment's file, its model as a registered version."""

from pipeline import storage
from pipeline.config import ConfigError
from pipeline.config_files import as_yaml, check
from pipeline.tracking.model_registry import register
from pipeline.tracking.settings import TrackingSettings
from pipeline.training import run_dir
from pipeline.tuning.analysis.factors import point_text
from pipeline.tuning.analysis.sweep_report import make_report
from pipeline.tuning.analysis.verdict import PointVerdict
from pipeline.tuning.driver import as_trials_see_it
from pipeline.tuning.records import TrialRecord, read_records
from pipeline.tuning.space import as_text
from pipeline.tuning.sweep import Sweep, experiment_of, tracking_of
from pipeline.tuning.trial_store import RECORDS

FILE = "promoted.yaml"


def promote(folder: str, registered_model_name: str | None = None) -> str:
    """What was done, for people.

    Args:
        folder: of a sweep.
        registered_model_name: name of the model version; the sweep's name if left out.

    Raises:
        ConfigError: nothing was confirmed.
    """
    folder = storage.absolute(folder.rstrip("/"))
    path = storage.join(folder, run_dir.RUN_START)
    if not storage.exists(path) or not storage.exists(storage.join(folder, RECORDS)):
        raise ConfigError(f"{folder}: not the folder of a sweep with results")
    sweep = check(Sweep, storage.read_json(path, "sweep")["sweep"], source=path)
    records = read_records(storage.join(folder, RECORDS))
    points = make_report(sweep, records).verdict.points
    if not points:
        raise ConfigError(f"{folder}: no point was confirmed; finish the sweep, with confirm.top above 0")
    sign = 1 if sweep.mode == "max" else -1
    best = max(points, key=lambda point: sign * point.mean)
    said = (
        f"{point_text(best.point)}: {sweep.metric} {best.mean:.4f} over {best.runs} run(s), {best.effect:+.4f} against the"
        f" default ({best.low:+.4f} to {best.high:+.4f}): {best.verdict}"
    )
    tracking = TrackingSettings.resolve(
        folder.rpartition("/")[0], experiment="", run_name="", uri=tracking_of(sweep).uri
    )
    target = storage.join(folder, FILE)
    content = experiment_of(as_trials_see_it(sweep, folder, tracking.uri), best.point, 0)
    content |= {"name": f"{sweep.name}-promoted"}
    del content["seed"]
    head = f"# Promoted from sweep {sweep.name}: {said}.\n#     python -m jobs.train {target}\n"
    storage.write_atomic(target, (head + as_yaml(content)).encode())
    return "\n".join(
        [said, f"experiment: {target}", _registered(tracking.uri, sweep, records, best, registered_model_name)]
    )


def _registered(
    uri: str, sweep: Sweep, records: list[TrialRecord], best: PointVerdict, registered_model_name: str | None
) -> str:
    """The model of the middle one of the point's confirmation runs: the best of several would promise too much."""
    runs = [
        (value, record.id, record.run_id)
        for record in records
        if record.phase == "confirm" and as_text(record.point) == as_text(best.point) and record.run_id
        if (value := record.result(sweep.metric)) is not None
    ]
    if not runs:
        return "model: not registered, MLflow does not know the runs"
    _, trial, run_id = sorted(runs)[(len(runs) - 1) // 2]
    return f"model: models:/{register(uri, run_id, registered_model_name or sweep.name or 'sweep')}, of trial {trial}"
