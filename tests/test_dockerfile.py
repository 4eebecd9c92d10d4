"""The container image: its Dockerfile, as far as a machine without Docker can build it."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.support.processes import free_port, kill_driver, wait_for

ROOT = Path(__file__).parent.parent
SYSTEM_STEPS = ("apt-get ", "useradd ")  # need a machine of their own


@dataclass(frozen=True)
class Image:
    """What the Dockerfile's commands made, in a virtual environment instead of the container's own Python."""

    environment: Path
    app: Path

    def run(self, *command: str, **variables: str) -> str:
        """Output of a program of the image, started where nothing of the project is."""
        program = self.environment / "bin" / command[0]
        done = subprocess.run(
            [program, *command[1:]],
            cwd="/",
            env=self.variables(**variables),
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def variables(self, **more: str) -> dict[str, str]:
        ours = {"PATH": f"{self.environment / 'bin'}:{os.environ['PATH']}", "HOME": str(self.app.parent)}
        return {**os.environ, "RAY_AUTH_MODE": "disabled", **ours, **more}


def instructions() -> list[tuple[str, str]]:
    """Instructions of the Dockerfile and their arguments, each on one line."""
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [(name, text.strip()) for name, _, text in (line.partition(" ") for line in joined.splitlines() if line)]


def arguments(name: str) -> list[str]:
    return [text for instruction, text in instructions() if instruction == name]


def names_that_enter() -> list[str]:
    """Files and folders that .dockerignore lets into the build."""
    first, *rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert first == "*"
    return [rule.removeprefix("!") for rule in rules if rule.startswith("!")]


def build(folder: Path) -> Image:
    """Run every step of the Dockerfile but those of the system."""
    context, image = folder / "context", Image(folder / "python", folder / "app")
    for name in names_that_enter():
        copy_into(ROOT / name, context / name)
    subprocess.run([python_of_the_image(), "-m", "venv", image.environment], check=True)
    image.app.mkdir()
    variables = {"PYTHON": str(image.environment / "bin" / "python")}
    for instruction, text in instructions():
        if instruction == "COPY":
            *sources, target = text.split()
            assert target == "./"
            for source in sources:
                copy_into(context / source, image.app / source)
        if instruction == "RUN" and not text.startswith(SYSTEM_STEPS):
            subprocess.run(["/bin/sh", "-c", text], cwd=image.app, env=image.variables(**variables), check=True)
    return image


def copy_into(source: Path, target: Path) -> None:
    """Copy a file, or the contents of a folder, but no bytecode."""
    if source.is_dir():
        shutil.copytree(source, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, target)


def python_of_the_image() -> str:
    """The image's version of Python where this machine has it, else the one that runs the tests."""
    wanted = f"python{image_python()}"
    found = subprocess.run([wanted, "--version"], capture_output=True, check=False) if shutil.which(wanted) else None
    return wanted if found is not None and found.returncode == 0 else sys.executable


def image_python() -> str:
    (base,) = arguments("FROM")
    found = re.fullmatch(r"python:(3\.\d+)-slim-\w+", base)
    assert found
    return found.group(1)


def locked_versions(python: str) -> dict[str, str]:
    """Versions that the lock names for a version of Python."""
    lines = re.findall(r"^[a-z0-9_.-]+==.*$", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    assert len(lines) > 100
    requirements = [Requirement(line) for line in lines]
    wanted = [r for r in requirements if r.marker is None or r.marker.evaluate({"python_full_version": python})]
    return {r.name: str(r.specifier).removeprefix("==") for r in wanted}


def test_only_steps_of_the_system_are_left_out_of_the_test_below() -> None:
    steps = arguments("RUN")
    assert [step.split()[0] for step in steps if step.startswith(SYSTEM_STEPS)] == ["apt-get", "useradd"]
    assert all("$PYTHON" in step for step in steps if not step.startswith(SYSTEM_STEPS))
    assert len(steps) > 4


def test_the_image_installs_with_the_uv_of_the_makefile() -> None:
    version = re.search(r"UV_VERSION := (\S+)", (ROOT / "Makefile").read_text())
    assert version
    assert any(f"uv=={version.group(1)}" in step for step in arguments("RUN"))


def test_the_image_has_the_programs_that_kuberay_and_ray_up_call() -> None:
    (packages,) = [step for step in arguments("RUN") if step.startswith("apt-get")]
    assert {"bash", "wget", "rsync", "openssh-client"} <= set(packages.split())


def test_the_image_runs_as_an_ordinary_user_with_a_home() -> None:
    assert arguments("USER") == ["1000"]
    (home,) = [text.removeprefix("HOME=") for text in arguments("ENV") if text.startswith("HOME=")]
    (made,) = [step for step in arguments("RUN") if step.startswith("useradd")]
    assert "--uid 1000" in made
    assert Path(home).name == made.split()[-1]
    last_names = [name for name, _ in instructions()]
    assert last_names.index("USER") > max(i for i, name in enumerate(last_names) if name in ("COPY", "RUN"))


def test_everything_that_enters_the_image_is_in_git() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for name in names_that_enter():
        assert any(path == name or path.startswith(f"{name}/") for path in tracked), name


@pytest.mark.slow
def test_the_image_s_commands_make_a_node_of_a_cluster() -> None:
    with tempfile.TemporaryDirectory() as folder:  # of 7 GB, which pytest's own folders would keep
        image = build(Path(folder))
        assert "train" in image.run("dfine", "--help")
        locked = locked_versions(image.run("python", "--version").split()[-1])
        assert locked["ray"] in image.run("ray", "--version")
        listing = image.run("python", "-m", "pip", "list", "--format", "freeze", "--exclude-editable")
        installed = dict(re.findall(r"^([^=]+)==(\S+)$", listing.lower().replace("_", "-"), re.MULTILINE))
        tools = {"pip", "uv", "setuptools"}
        assert len(installed) > 100
        assert {name: version for name, version in installed.items() if locked.get(name) != version}.keys() <= tools
        assert not {"pytest", "mypy", "ruff", "moto"} & installed.keys()
        assert {"boto3", "torch", "onnxruntime", "fastapi"} <= installed.keys()
        assert not sources_without_bytecode(image)
        probe_a_head(image, Path(folder))


def sources_without_bytecode(image: Image) -> list[Path]:
    (packages,) = image.environment.glob("lib/python3.*/site-packages")
    sources = [path for package in ("torch", "mlflow", "ray") for path in (packages / package).glob("*.py")]
    sources += [path for package in ("dfine_core", "jobs", "pipeline") for path in (image.app / package).rglob("*.py")]
    assert len(sources) > 200
    return [path for path in sources if not list((path.parent / "__pycache__").glob(f"{path.stem}.*.pyc"))]


def probe_a_head(image: Image, folder: Path) -> None:
    """Start a head that demands a token, as KubeRay does, and probe it as KubeRay does: with bash and wget, without the token."""
    ports = {name: free_port() for name in ("port", "dashboard-port", "dashboard-agent-listen-port")}
    command = [*(f"--{name}={port}" for name, port in ports.items()), "--ray-client-server-port", str(free_port())]
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0123456789" * 4}
    log = folder / "head.log"
    with log.open("w") as output:
        head = subprocess.Popen(
            [image.environment / "bin" / "ray", "start", "--head", "--block", "--num-cpus=0", "--disable-usage-stats", *command],
            cwd="/", env=image.variables(**token), stdout=output, stderr=output, text=True, start_new_session=True,
        )  # fmt: skip
    try:
        for port, page in (("dashboard-agent-listen-port", "local_raylet_healthz"), ("dashboard-port", "gcs_healthz")):
            fetch = f"wget --tries 1 --timeout 10 --quiet --output-document - http://127.0.0.1:{ports[port]}/api/{page}"
            wait_for(lambda fetch=fetch: succeeds(fetch), head, log)
        image.run("ray", "health-check", f"--address=127.0.0.1:{ports['port']}", **token)
    finally:
        kill_driver(head)


def succeeds(fetch: str) -> bool:
    done = subprocess.run(["bash", "-c", f"{fetch} | grep success"], capture_output=True, check=False)
    return done.returncode == 0
