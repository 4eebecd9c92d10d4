"""The one place that starts Ray, or joins the cluster that a job was submitted to."""

import logging
import os
import sys
import tempfile
from pathlib import Path

import ray

# Ray reads these when it starts, and its workers inherit them from a local cluster. What is set already stays.
QUIET_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # which would show every print of a worker twice
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # a report of a worker waits for the next one
}
LOCAL_ENVIRONMENT = {
    "RAY_AUTH_MODE": "disabled",  # a cluster on this machine alone; the default writes a token to the home folder
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    # Processes that have nothing to do stay for the next stream: starting them anew takes most of its first seconds.
    "RAY_num_workers_soft_limit": str((os.cpu_count() or 1) + 6),
    "RAY_DATA_LOGGING_CONFIG": str(Path(__file__).with_name("ray_data_logging.yaml")),
}


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
    if "ray.data" in sys.modules:  # it has read the variables already, when it was imported
        from ray.data._internal.logging import configure_logging

        configure_logging()
    if joins:
        ray.init(logging_level=logging.WARNING)
        return
    # The place that the user named, also when this process or its parent has started a cluster before.
    base = os.environ.setdefault("RAY_DFINE_TMPDIR", os.environ.get("RAY_TMPDIR") or tempfile.gettempdir())
    os.environ["RAY_TMPDIR"] = folder = tempfile.mkdtemp(prefix="ray-", dir=base)
    try:
        ray.init("local", num_cpus=num_cpus, include_dashboard=dashboard, logging_level=logging.WARNING)
    except Exception as error:  # Ray raises no narrower one
        if "timed out during startup" in str(error):
            error.add_note(
                "Ray gives its agent 15 seconds to start, which cannot be set (ray-project/ray#65983); on a machine as busy"
                " as this one they are too few. Run it again when there is less to do, or join a running Ray by RAY_ADDRESS."
            )
        raise
    # Parts of Ray look for "the" cluster of this machine, such as what frees the places of a stopped trial, and take whichever
    # was noted last; in a folder of its own each cluster finds itself.
    Path(folder, "ray", "ray_current_cluster").write_text(ray.get_runtime_context().gcs_address)
