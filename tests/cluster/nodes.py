"""Three machines on one: Ray nodes in namespaces of their own, with an S3 server and an MLflow server between them.

Everything lives in the network namespace that `make test-cluster` opens: no packet leaves it, and all of it ends with it.
"""

import logging
import os
import re
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import requests
from moto.server import ThreadedMotoServer
from pyarrow import fs

from tests.support.processes import descendants, wait_until
from tests.support.s3_server import VARIABLES

ROOT = Path(__file__).parents[2]
OUTSIDE = "10.77.0.1"  # this process, with both servers
UPLOADED = ("configs", "dfine_core", "jobs", "pipeline")
ENVIRONMENT = {
    **VARIABLES,
    "AWS_ENDPOINT_URL": f"http://{OUTSIDE}:5555",
    "MLFLOW_TRACKING_URI": f"http://{OUTSIDE}:5000",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": secrets.token_hex(32),
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
}


@dataclass
class Nodes:
    """The running nodes, and the outside that submits jobs to them."""

    folder: Path  # logs of the nodes, and the working directory of the jobs
    running: dict[int, subprocess.Popen[bytes]] = field(default_factory=dict)
    jobs: list["Job"] = field(default_factory=list)

    @property
    def working_dir(self) -> Path:
        """Folder that travels with every job."""
        return self.folder / "job"

    def start(self, number: int, *arguments: str) -> None:
        """Start a node, and lay its cable: `node<number>` with address 10.77.0.(10 + number)."""
        script, venv = Path(__file__).with_name("node.sh"), Path(sys.prefix)
        namespaces = ["--net", "--pid", "--uts", "--mount", "--ipc", "--fork", "--kill-child", "--mount-proc"]
        process = subprocess.Popen(
            ["unshare", *namespaces, "bash", script, self.folder, venv, f"node{number}", address(number), *arguments],
            env={**os.environ, **ENVIRONMENT},
        )
        self.running[number] = process
        outer = os.readlink("/proc/self/ns/net")
        wait_until(
            lambda: os.readlink(f"/proc/{process.pid}/ns/net") != outer, 10
        )  # `unshare` itself moves, then forks
        ip(f"link add cable{number} type veth peer name eth0 netns {process.pid}")
        ip(f"link set cable{number} master switch up")

    def start_head(self) -> None:
        """Start node 0 with Ray's own processes, and no CPUs for work."""
        self.start(0, "--head", "--port=6379", "--num-cpus=0", "--dashboard-host=0.0.0.0")
        wait_until(lambda: address(0) in self._alive(), 90)

    def join(self, number: int) -> None:
        """Start a node with three CPUs, and wait until the cluster has it."""
        self.start(number, f"--address={address(0)}:6379", "--num-cpus=3")
        wait_until(lambda: address(number) in self._alive(), 90)

    def kill(self, number: int) -> None:
        """Kill a node with everything on it, as if its power had failed."""
        process = self.running.pop(number)
        process.kill()
        process.wait()

    def with_process(self, title: str) -> set[int]:
        """Numbers of the nodes on which a process has this title now."""
        return {
            number
            for number, process in self.running.items()
            if any(title in found for found in descendants(process.pid).values())
        }

    def submit(self, *command: str, watch: str = "RayTrainWorker") -> tuple[str, set[int]]:
        """Run a job to its end; returns its output, and the nodes on which processes with the title `watch` were seen."""
        job = self.begin(*command)
        seen: set[int] = set()
        while job.process.poll() is None:
            seen |= self.with_process(watch)
            time.sleep(0.5)
        assert job.process.returncode == 0, job.output()[-6000:]
        return job.output(), seen

    def begin(self, *command: str) -> "Job":
        """Submit a job from outside the cluster: `python -m COMMAND`."""
        log = self.folder / f"job-{len(list(self.folder.glob('job-*')))}.log"
        arguments = ["--working-dir", ".", "--log-style=record", "--", "python", "-m", *command]
        with log.open("w") as stream:
            process = subprocess.Popen(
                [sys.executable, "-m", "ray.scripts.scripts", "job", "submit", *arguments],
                cwd=self.working_dir,
                env={**os.environ, **ENVIRONMENT, "RAY_ADDRESS": f"http://{address(0)}:8265"},
                stdout=stream,
                stderr=subprocess.STDOUT,
            )
        self.jobs.append(Job(process, log))
        return self.jobs[-1]

    def stop(self, job: "Job") -> None:
        """`ray job stop`."""
        (name,) = set(re.findall(r"raysubmit_\w+", job.output()))
        subprocess.run(
            [sys.executable, "-m", "ray.scripts.scripts", "job", "stop", name],
            env={**os.environ, **ENVIRONMENT, "RAY_ADDRESS": f"http://{address(0)}:8265"},
            check=True,
            capture_output=True,
        )

    def _alive(self) -> set[str]:
        """Addresses of the nodes that the cluster has."""
        headers = {"Authorization": f"Bearer {ENVIRONMENT['RAY_AUTH_TOKEN']}"}
        try:
            answer = requests.get(f"http://{address(0)}:8265/nodes?view=summary", headers=headers, timeout=3).json()
            nodes = answer["data"]["summary"]
            return {node["raylet"]["nodeManagerAddress"] for node in nodes if node["raylet"]["state"] == "ALIVE"}
        except (requests.RequestException, KeyError, TypeError):
            return set()


@dataclass
class Job:
    """A submitted job: the process that follows it, and its output so far."""

    process: subprocess.Popen[bytes]
    log: Path

    def output(self) -> str:
        """Everything that the job has printed."""
        return self.log.read_text()

    def wait_for(self, text: str, seconds: float = 200) -> None:
        """Wait until the job has printed a text."""
        wait_until(lambda: text in self.output() or self.process.poll() is not None, seconds)
        assert text in self.output(), self.output()[-6000:]


@contextmanager
def cluster(folder: Path) -> Iterator[Nodes]:
    """Start the network, the servers, a head without CPUs and two nodes; sets the environment of this process too."""
    ip("link set lo up")
    ip("link add switch type bridge")
    ip(f"addr add {OUTSIDE}/24 dev switch")
    ip("link set switch up")
    names = [f"{address(number)} node{number}" for number in range(6)]
    (folder / "hosts").write_text("\n".join(["127.0.0.1 localhost", *names, ""]))
    nodes = Nodes(folder)
    for name in UPLOADED:
        shutil.copytree(ROOT / name, nodes.working_dir / name, ignore=shutil.ignore_patterns("__pycache__"))

    logging.getLogger("werkzeug").setLevel(logging.WARNING)  # a line for each request
    storage = ThreadedMotoServer(ip_address=OUTSIDE, port=5555, verbose=False)
    storage.start()
    mlflow = [
        "--backend-store-uri",
        f"sqlite:///{folder}/mlflow.db",
        "--artifacts-destination",
        str(folder / "artifacts"),
    ]
    with pytest.MonkeyPatch.context() as patch, (folder / "mlflow.log").open("w") as log:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        fs.S3FileSystem(endpoint_override=ENVIRONMENT["AWS_ENDPOINT_URL"], allow_bucket_creation=True).create_dir(
            "bucket"
        )
        server = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "mlflow",
                "server",
                "--host",
                OUTSIDE,
                "--workers",
                "1",
                "--allowed-hosts",
                "*",
                *mlflow,
            ],
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            wait_until(lambda: _answers(f"http://{OUTSIDE}:5000/health"), 90)
            nodes.start_head()
            nodes.join(1)
            nodes.join(2)
            yield nodes
        finally:
            for number in list(nodes.running):
                nodes.kill(number)
            for process in (server, *(job.process for job in nodes.jobs)):
                process.kill()
                process.wait()
            storage.stop()


def address(number: int) -> str:
    """IP address of a node."""
    return f"10.77.0.{10 + number}"


def ip(command: str) -> None:
    """Run `ip`, the tool that configures networks."""
    subprocess.run(["ip", *command.split()], check=True)


def _answers(url: str) -> bool:
    try:
        return requests.get(url, timeout=2).ok
    except requests.RequestException:
        return False
