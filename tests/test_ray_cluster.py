"""The cluster that commands start on this machine: who can use it, and where it keeps its files."""

import json
import logging
import os
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import ray

from pipeline.ray_address import ClusterError
from pipeline.ray_cluster import LONGEST_BASE, SHORT_BASE, make_cluster_folder, start_ray
from tests.support.processes import descendants
from tests.support.ray_clients import environment_of_cluster

# Without the last two, Ray repeats a refused connection for 20 seconds, and looks for the cluster on other interfaces.
CLIENT = """
import ray
ray.init(logging_level="ERROR")
print("joined", ray.get(ray.remote(num_cpus=0)(lambda: "and ran a task").remote()))
"""
IMPATIENT = {"RAY_NUM_REDIS_GET_RETRIES": "1", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
CLIENT_TIMEOUT_S = 60
ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class RunningCluster:
    """A cluster of this process, whose folder for temporary files has too long a path for sockets."""

    environment: dict[str, str]  # of a process that may join it
    dashboard: str
    folder: Path
    home: Path

    @property
    def token(self) -> str:
        return self.environment["RAY_AUTH_TOKEN"]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningCluster]:
    assert not ray.is_initialized()
    home, temporary = tmp_path_factory.mktemp("home"), tmp_path_factory.mktemp("temporary" * 7)
    assert len(str(temporary)) > 60 > LONGEST_BASE
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(home))
        patch.setenv("TMPDIR", str(temporary))
        patch.setattr(tempfile, "tempdir", None)  # Python reads TMPDIR once
        for name in ("RAY_DFINE_TMPDIR", "RAY_TMPDIR"):
            patch.delenv(name, raising=False)
        for name in ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
            patch.delenv(name, raising=False)
        start_ray(num_cpus=2, dashboard=True)
        url = f"http://{ray._private.worker._global_node.webui_url}"
        yield RunningCluster(environment_of_cluster(), url, Path(os.environ["RAY_TMPDIR"]), home)
        ray.shutdown()


def join(environment: dict[str, str]) -> "subprocess.CompletedProcess[str]":
    """Run a client in a process of its own."""
    command = [sys.executable, "-c", CLIENT]
    environment = environment | IMPATIENT
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=CLIENT_TIMEOUT_S, check=False
    )


def test_a_process_with_the_token_joins(cluster: RunningCluster) -> None:
    done = join(cluster.environment)
    assert (done.returncode, done.stdout) == (0, "joined and ran a task\n"), done.stderr


@pytest.mark.parametrize(
    "attempt",
    [
        {},
        {"RAY_AUTH_MODE": "disabled"},
        {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64},
    ],
    ids=["no variable", "disabled", "another token"],
)
def test_a_process_without_the_token_cannot_join(cluster: RunningCluster, attempt: dict[str, str]) -> None:
    without = {name: value for name, value in cluster.environment.items() if not name.startswith("RAY_AUTH")}
    done = join(without | attempt)
    assert done.returncode == 1
    assert done.stdout == ""
    assert "Failed to connect to Ray cluster" in done.stderr


def submit(cluster: RunningCluster, token: str | None) -> int:
    """Status of a job's submission to the dashboard."""
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {})
    body = json.dumps({"entrypoint": "true"}).encode()
    request = urllib.request.Request(f"{cluster.dashboard}/api/jobs/", data=body, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        return error.code


def test_only_the_token_submits_a_job(cluster: RunningCluster) -> None:
    assert submit(cluster, None) == 401
    assert submit(cluster, "0" * 64) == 403
    assert submit(cluster, cluster.token) == 200


def test_all_processes_listen_on_this_machine_alone(cluster: RunningCluster) -> None:
    own = set(descendants(os.getpid()))
    addresses = {
        connection.laddr.ip.removeprefix("::ffff:")
        for connection in psutil.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN and connection.pid in own
    }
    assert addresses == {"127.0.0.1"}


def test_the_token_is_in_no_file_and_in_no_environment_of_others(cluster: RunningCluster) -> None:
    files = [path for path in cluster.folder.rglob("*") if path.is_file()]
    assert len(files) > 10
    assert not [path for path in files if cluster.token.encode() in path.read_bytes()]
    assert not list(cluster.home.rglob("*"))  # Ray would keep a token for all clusters there
    assert cluster.folder.stat().st_mode & 0o777 == 0o700
    assert "RAY_AUTH_TOKEN" not in os.environ  # nor in other programs that this process starts
    processes = Path("/proc")
    with_token = [p for p in descendants(os.getpid()) if cluster.token in _environment(processes / str(p))]
    assert with_token
    assert {(processes / str(p) / "environ").stat().st_mode & 0o777 for p in with_token} == {0o400}


def _environment(process: Path) -> str:
    try:
        return (process / "environ").read_text(errors="replace")
    except OSError:
        return ""


def test_a_long_path_for_temporary_files_is_no_obstacle(cluster: RunningCluster) -> None:
    assert cluster.folder.parent == Path(SHORT_BASE)
    assert len(list(cluster.folder.glob("ray/session_*/sockets/*"))) > 2
    assert not list(Path(os.environ["TMPDIR"]).glob("ray*"))


def test_the_next_cluster_of_a_process_has_another_token(cluster: RunningCluster) -> None:
    ray.shutdown()
    start_ray(num_cpus=1)
    other = environment_of_cluster()
    assert other["RAY_AUTH_TOKEN"] != cluster.token
    assert join(other).returncode == 0
    assert join(other | {"RAY_AUTH_TOKEN": cluster.token}).returncode == 1


# The folder of a cluster


@pytest.fixture
def unset(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setenv("RAY_DFINE_TMPDIR", "")
    monkeypatch.setenv("RAY_TMPDIR", "")
    return monkeypatch


def test_a_folder_that_is_too_long_for_sockets_is_replaced_and_named(
    unset: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    longest = "/" + "t" * (LONGEST_BASE - 1)
    unset.setattr(tempfile, "mkdtemp", lambda prefix, dir: f"{dir}/{prefix}12345678")  # nothing is made in /
    for base, used in ((longest, longest), (f"{longest}t", SHORT_BASE), (f"{longest[:-1]}\u00e9", SHORT_BASE)):
        unset.setenv("RAY_DFINE_TMPDIR", "")
        unset.setenv("RAY_TMPDIR", base)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert make_cluster_folder() == f"{used}/ray-12345678"
        assert caplog.messages == (
            [] if used == base else [f"Ray keeps its temporary files in /tmp: {base} is too long for its sockets"]
        )
        assert os.environ["RAY_DFINE_TMPDIR"] == used  # for the next cluster, and for processes that start one


def test_each_cluster_has_a_folder_that_its_user_alone_can_read(unset: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as base:
        unset.setenv("RAY_TMPDIR", base)
        folders = [Path(make_cluster_folder()) for _ in range(2)]
        assert {folder.parent for folder in folders} == {Path(base)}
        assert len(set(folders)) == 2
        assert {folder.stat().st_mode & 0o777 for folder in folders} == {0o700}


def test_a_folder_that_is_missing_ends_with_a_message(unset: pytest.MonkeyPatch) -> None:
    unset.setenv("RAY_TMPDIR", "/no/such/folder")
    with pytest.raises(ClusterError, match=r"/no/such/folder .*No such file.*set RAY_TMPDIR"):
        make_cluster_folder()


# Another machine


def can_make_namespaces() -> bool:
    command = ["unshare", "--net", "--uts", "ip", "link", "set", "lo", "up"]
    return sys.platform == "linux" and subprocess.run(command, capture_output=True, check=False).returncode == 0


@pytest.mark.slow
@pytest.mark.skipif(not can_make_namespaces(), reason="needs Linux, root, unshare and ip")
def test_without_a_network_ray_starts_and_a_neighbour_reaches_none_of_its_ports() -> None:
    command = [
        "unshare",
        "--net",
        "--uts",
        "--fork",
        "--kill-child",
        sys.executable,
        "-m",
        "tests.cluster.private_cluster",
    ]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found["ports"]) > 5
    assert found["reached"] == [found["open"]]
