"""Start Ray on this machine, or join the cluster that a job was submitted to: the only module that does either."""

import logging
import os
import secrets
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import ray

from pipeline.ray_core_internals import LOOPBACK_VARIABLE, read_environment_again

# Ray reads these when it starts, and its workers inherit them from a local cluster. Variables that are set already stay.
QUIET_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # it would print every line of a worker twice
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # a worker's report waits for the next health check
}
LOCAL_ENVIRONMENT = {
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    # Idle processes are kept for the next stream: starting new ones takes most of its first seconds.
    "RAY_num_workers_soft_limit": str((os.cpu_count() or 1) + 6),
    "RAY_prestart_worker_first_driver": "0",  # processes start when they are needed
    "RAY_enable_metrics_collection": "0",  # nobody collects them
    "RAY_task_events_report_interval_ms": "0",  # for the dashboard
    "RAY_worker_niceness": "0",  # the default, 15, puts a training behind everything else of the user
    "RAY_DATA_LOGGING_CONFIG": str(Path(__file__).with_name("ray_data_logging.yaml")),
}

_lacks_dashboard = False  # this process started its cluster without one


def start_ray(num_cpus: int | None = None, *, dashboard: bool = False) -> None:
    """Join the cluster that RAY_ADDRESS names, as in a submitted job, or start one on this machine.

    Args:
        num_cpus: size of a cluster on this machine, by default all its cores; ignored where a cluster is joined.
        dashboard: start the dashboard of a cluster on this machine. Ray Tune needs its State API, to free the resources of trials
            that were stopped; it takes ten more processes.
    """
    global _lacks_dashboard
    if ray.is_initialized():
        return

    # Ray's environment, before anything of it starts.
    joins = bool(os.environ.get("RAY_ADDRESS"))
    for name, value in (QUIET_ENVIRONMENT if joins else QUIET_ENVIRONMENT | LOCAL_ENVIRONMENT).items():
        os.environ.setdefault(name, value)
    if "ray.data" in sys.modules:  # it read the variables when it was imported
        from pipeline.ray_internals import reload_data_logging

        reload_data_logging()
    if joins:
        read_environment_again()
        ray.init(logging_level=logging.WARNING)
        _lacks_dashboard = False
        return

    # A folder of its own for each cluster, in the one that the user named, even if this process or its parent has started a
    # cluster before.
    base = os.environ.setdefault("RAY_DFINE_TMPDIR", os.environ.get("RAY_TMPDIR") or tempfile.gettempdir())
    os.environ["RAY_TMPDIR"] = folder = tempfile.mkdtemp(prefix="ray-", dir=base)
    try:
        with private_cluster():
            ray.init("local", num_cpus=num_cpus, include_dashboard=dashboard, logging_level=logging.WARNING)
    except Exception as error:  # Ray raises no narrower one
        if "timed out during startup" in str(error):
            error.add_note(
                "Ray gives its agent 15 seconds to start, which cannot be set (ray-project/ray#65983); this machine is too busy"
                " for that. Run the command again under less load, or join a running Ray cluster through RAY_ADDRESS."
            )
        raise

    _lacks_dashboard = not dashboard

    # Parts of Ray look up "the" cluster of this machine and take the one noted last, for example to free the resources of a
    # stopped trial. In a folder of its own each cluster finds itself.
    Path(folder, "ray", "ray_current_cluster").write_text(ray.get_runtime_context().gcs_address)


def lacks_dashboard() -> bool:
    """Whether this process is the driver of a cluster of its own without a dashboard."""
    return _lacks_dashboard and ray.is_initialized()


def stop_own_ray() -> None:
    """Stop a cluster that `start_ray` started in this process; leave one that it joined."""
    if not os.environ.get("RAY_ADDRESS"):
        ray.shutdown()


@contextmanager
def private_cluster() -> Iterator[None]:
    """Let no other user and no other machine use a cluster that starts meanwhile: a new token, and loopback addresses.

    The processes of the cluster inherit both. This process keeps the token in memory; other programs that it starts, and files,
    never have it.
    """
    variables = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), LOOPBACK_VARIABLE: "0"}
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        read_environment_again()
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
