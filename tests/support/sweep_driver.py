"""A sweep with simulated trainings, in a process that a test can kill. Everything except the training is real.

python -m tests.support.sweep_driver SWEEP.yaml
"""

import json
import sys
import time
from typing import Any

from ray import tune

from pipeline import storage
from pipeline.tuning.driver import SweepInterruptedError, run_sweep
from pipeline.tuning.load import load_sweep
from pipeline.tuning.sweep import Trial, evaluations_per_trial
from pipeline.tuning.trial_files import (
    EVALUATION,
    TrialProgress,
    TrialSettings,
    read_progress,
    runs_folder,
    write_progress,
)
from pipeline.tuning.trial_records import TrialEvaluation

SECONDS = 0.3  # per evaluation


def simulated_trial(config: dict[str, Any], settings: TrialSettings) -> None:
    """AP grows, fastest at a rate of 1e-3, or stays near zero if the rate is too high; one loss weight fails."""
    trial = Trial(**config["trial"])
    total = evaluations_per_trial(settings.sweep)
    assert total is not None
    known = read_progress(settings.folder, trial).evaluations
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
    evaluations = list(known)
    for number in range(len(known) + 1, total + 1):
        time.sleep(SECONDS)
        ap = 0.1 * number + 0.01 * trial.point["loss.ddf"] + 0.02 * (rate == 1e-3) if rate <= 1e-3 else 0.001
        ap += 0.001 * (trial.seed % 7)
        evaluations.append(TrialEvaluation(number, float(number), {"AP": ap, "AP50": 1.5 * ap}, SECONDS * number))
        write_progress(settings.folder, trial, TrialProgress(tuple(evaluations), SECONDS * number))
        if number < total:
            tune.report({"AP": ap, EVALUATION: number})
    result = {"numbers": evaluations[-1].metrics, "latency_ms": 5.0}
    path = storage.join(runs_folder(settings.folder), f"{trial.id}/result.json")
    storage.write_atomic(path, json.dumps(result).encode())


if __name__ == "__main__":
    try:
        print(run_sweep(load_sweep(sys.argv[1]), simulated_trial).summary())
    except SweepInterruptedError as stopped:
        print(stopped)
        sys.exit(130)
