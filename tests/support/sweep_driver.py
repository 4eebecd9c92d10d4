"""A sweep whose trials only pretend to train, in a process that a test can kill: everything but the training is real.

python -m tests.support.sweep_driver SWEEP.yaml
"""

import json
import sys
import time
from typing import Any

from ray import tune

from pipeline import storage
from pipeline.tuning.curves import EVALUATION, Curve, TrialSettings, read_curve, runs_folder, write_curve
from pipeline.tuning.driver import SweepInterruptedError, run_sweep
from pipeline.tuning.load import load_sweep
from pipeline.tuning.records import Reading
from pipeline.tuning.sweep import Trial, evaluations_of

SECONDS = 0.3  # of an evaluation


def pretended(config: dict[str, Any], settings: TrialSettings) -> None:
    """AP grows, most with a rate of 1e-3, or stays at nearly nothing where the rate is too high; one weight fails."""
    trial = Trial(**config["trial"])
    total = evaluations_of(settings.sweep)
    assert total is not None
    known = read_curve(settings.folder, trial).readings
    for number in range(1, len(known) + 1):
        if number < total:
            tune.report({**known[number - 1].metrics, EVALUATION: number})
    if config["ended"]:
        return
    with open(f"{settings.folder}/begun.txt", "a") as begun:
        begun.write(f"{trial.id} {len(known)}\n")
    if trial.point.get("loss.ddf") == 3.0:
        raise RuntimeError("the disk is full")
    rate = trial.point.get("optimizer.lr", 1e-3)
    readings = list(known)
    for number in range(len(known) + 1, total + 1):
        time.sleep(SECONDS)
        ap = 0.1 * number + 0.01 * trial.point["loss.ddf"] + 0.02 * (rate == 1e-3) if rate <= 1e-3 else 0.001
        ap += 0.001 * (trial.seed % 7)
        readings.append(Reading(number, float(number), {"AP": ap, "AP50": 1.5 * ap}, SECONDS * number))
        write_curve(settings.folder, trial, Curve(tuple(readings), SECONDS * number))
        if number < total:
            tune.report({"AP": ap, EVALUATION: number})
    result = {"numbers": readings[-1].metrics, "latency_ms": 5.0}
    path = storage.join(runs_folder(settings.folder), f"{trial.id}/result.json")
    storage.write_atomic(path, json.dumps(result).encode())


if __name__ == "__main__":
    try:
        print(run_sweep(load_sweep(sys.argv[1]), pretended).summary())
    except SweepInterruptedError as stopped:
        print(stopped)
        sys.exit(130)
