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
from ray.exceptions import AuthenticationError

from pipeline.ray_address import WAYS_OUT, ClusterError, refuse_dead, refuse_other_forms
from pipeline.ray_core_internals import LOOPBACK_VARIABLE, address_to_connect_to, read_environment_again
from pipeline.ray_job import cluster_address

# Ray reads these when it starts, and its workers inherit them from a local cluster. Variables that are set already stay.
QUIET_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # it would print every line of a worker twice
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    # Where a cluster is joined, of this process alone.
    "RAY_DATA_LOGGING_CONFIG": str(Path(__file__).with_name("ray_data_logging.yaml")),
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
}

# Systems limit the bytes of a socket's path. This is the longest of Ray's, below the folder for temporary files.
SOCKET = "/ray-12345678/ray/session_2000-01-01_00-00-00_123456_1234567/sockets/dash_MetricsHead"
LONGEST_BASE = (103 if sys.platform == "darwin" else 107) - len(SOCKET)
SHORT_BASE = "/tmp"

logger = logging.getLogger(__name__)

_lacks_dashboard = False  # this process started its cluster without one


def start_ray(num_cpus: int | None = None, *, dashboard: bool = False) -> None:
    """Join the cluster that RAY_ADDRESS names, as in a submitted job, or start one on this machine.

    Args:
        num_cpus: size of a cluster on this machine, by default all its cores; ignored where a cluster is joined.
        dashboard: start the dashboard of a cluster on this machine. Ray Tune needs its State API, to free the resources of trials
            that were stopped; it takes ten more processes.

    Raises:
        ClusterError: no cluster can be joined under RAY_ADDRESS, or there is no folder that Ray can use.
    """
    global _lacks_dashboard
    if ray.is_initialized():
        return
    address = cluster_address()

    # Ray's environment, before anything of it starts.
    for name, value in (QUIET_ENVIRONMENT if address else QUIET_ENVIRONMENT | LOCAL_ENVIRONMENT).items():
        os.environ.setdefault(name, value)
    if "ray.data" in sys.modules:  # it read the variables when it was imported
        from pipeline.ray_internals import reload_data_logging

        reload_data_logging()
    if address:
        _join(address)
        _lacks_dashboard = False
    else:
        _start(num_cpus, dashboard)
        _lacks_dashboard = not dashboard


def _join(address: str) -> None:
    """Join a running cluster. Its authentication is that of the environment."""
    refuse_other_forms(address)
    read_environment_again()
    resolved = address_to_connect_to()
    if resolved is None:
        raise ClusterError(f"RAY_ADDRESS=auto: no Ray cluster runs on this machine: {WAYS_OUT}")
    refuse_dead(address, resolved)
    try:
        ray.init(logging_level=logging.WARNING)
    except (
        ConnectionError,
        RuntimeError,
        AuthenticationError,
    ) as error:  # RuntimeError: another version of Ray or Python
        raise ClusterError(
            f"RAY_ADDRESS={address}: Ray responds at {resolved}, but cannot be joined. Set RAY_AUTH_MODE and RAY_AUTH_TOKEN or"
            f" RAY_AUTH_TOKEN_PATH as on the cluster, and use its version of Ray ({ray.__version__} here): {error}"
        ) from error


def _start(num_cpus: int | None, dashboard: bool) -> None:
    """Start a cluster on this machine, in a folder of its own."""
    os.environ["RAY_TMPDIR"] = folder = make_cluster_folder()
    try:
        with private_cluster(folder):
            ray.init("local", num_cpus=num_cpus, include_dashboard=dashboard, logging_level=logging.WARNING)
    except Exception as error:  # Ray raises no narrower one
        if "timed out during startup" in str(error):
            error.add_note(
                "Ray gives its agent 15 seconds to start, which cannot be set (ray-project/ray#65983); this machine is too busy"
                " for that. Run the command again under less load, or join a running Ray cluster through RAY_ADDRESS."
            )
        raise

    # Parts of Ray look up "the" cluster of this machine and take the one noted last, for example to free the resources of a
    # stopped trial. In a folder of its own each cluster finds itself.
    Path(folder, "ray", "ray_current_cluster").write_text(ray.get_runtime_context().gcs_address)


def make_cluster_folder() -> str:
    """Make a folder that only this user can read, even if this process or its parent has started a cluster before.

    It lies in the folder for temporary files, or in /tmp if Ray's sockets would have too long a path there.
    """
    base = os.environ.get("RAY_DFINE_TMPDIR") or os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()
    if _is_too_long(base):
        logger.warning("Ray keeps its temporary files in %s: %s is too long for its sockets", SHORT_BASE, base)
        base = SHORT_BASE
    os.environ["RAY_DFINE_TMPDIR"] = base
    try:
        return tempfile.mkdtemp(prefix="ray-", dir=base)
    except OSError as error:
        raise ClusterError(
            f"Ray cannot keep its temporary files in {base} ({error.strerror}): set RAY_TMPDIR to a folder that can be written,"
            f" with a path of at most {LONGEST_BASE} bytes"
        ) from None


def _is_too_long(base: str) -> bool:
    return len(os.fsencode(os.path.abspath(base))) > LONGEST_BASE


def lacks_dashboard() -> bool:
    """Whether this process is the driver of a cluster of its own without a dashboard."""
    return _lacks_dashboard and ray.is_initialized()


def stop_own_ray() -> None:
    """Stop a cluster that `start_ray` started in this process; leave one that it joined."""
    if not cluster_address():
        ray.shutdown()


@contextmanager
def private_cluster(folder: str) -> Iterator[None]:
    """Let no other user and no other machine use a cluster that starts meanwhile: a new token, and loopback addresses.

    The processes of the cluster inherit both. This process keeps the token in memory; other programs that it starts, and files,
    never have it.

    Args:
        folder: of the cluster, for sockets that Ray's processes make in TMPDIR, if that path is too long.
    """
    variables = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), LOOPBACK_VARIABLE: "0"}
    if _is_too_long(tempfile.gettempdir()):
        variables["TMPDIR"] = folder
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
