"""The one place that starts Ray, or joins the cluster that a job was submitted to."""

import logging
import os
import sys
import traceback

import ray
from ray._private.node import Node

# Ray reads these when it starts, and its workers inherit them from a local cluster. What is set already stays.
QUIET_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # which would show every print of a worker twice
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
}
LOCAL_ENVIRONMENT = {
    "RAY_AUTH_MODE": "disabled",  # a cluster on this machine alone; the default writes a token to the home folder
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
}
# Ray's agent must be up in 15 seconds, which cannot be set (ray-project/ray#65983) and are few on a very busy machine.
START_ATTEMPTS = 4


def start_ray(num_cpus: int | None = None, *, dashboard: bool = False) -> None:
    """Join the cluster that RAY_ADDRESS names, as in a submitted job, or start one on this machine.

    Args:
        num_cpus: of a cluster on this machine, by default all of it; a cluster that is joined has what it has.
        dashboard: of a cluster on this machine. Ray Train and Ray Tune need it, for its State API; it takes ten more
            processes and most of the time to start.
    """
    if ray.is_initialized():
        return
    joins = bool(os.environ.get("RAY_ADDRESS"))
    for name, value in (QUIET_ENVIRONMENT if joins else QUIET_ENVIRONMENT | LOCAL_ENVIRONMENT).items():
        os.environ.setdefault(name, value)
    if joins:
        ray.init(logging_level=logging.WARNING)
    else:
        _start_here(num_cpus, dashboard)


def _start_here(num_cpus: int | None, dashboard: bool) -> None:
    for attempt in range(1, START_ATTEMPTS + 1):
        try:
            ray.init(num_cpus=num_cpus, include_dashboard=dashboard, logging_level=logging.WARNING)
            return
        except Exception as error:  # Ray raises no narrower one
            if "timed out during startup" not in str(error) or attempt == START_ATTEMPTS:
                raise
            _kill_half_started(error)
            print(f"Ray was too slow to start; attempt {attempt + 1} of {START_ATTEMPTS}", file=sys.stderr, flush=True)


def _kill_half_started(error: Exception) -> None:
    """End the processes of a start that failed: Ray leaves them running, where they slow the next attempt down."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if isinstance(node := frame.f_locals.get("self"), Node):
            node.kill_all_processes(check_alive=False, allow_graceful=False)
