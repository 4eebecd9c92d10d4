"""A training in one process under some 30 blows at random moments: it ends as one that was left alone."""

import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from pipeline.training import checkpoint
from tests.support.chaos import Attempt, Command, Disturbance, chaos_seed, draw, report_landed
from tests.support.finished_runs import assert_equal_runs
from tests.support.mlflow_server import Server
from tests.support.training_runs import shard_folders

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
ROOT = Path(__file__).parents[2]
STEPS, EPOCH = 24, 6
# In this order, because a step that is over does not come again. "resumed" twice is a second kill right after a resume.
MOMENTS = (
    *("begin", "step", "resumed", "resumed", "writing", "end of an epoch"),
    *("begin", "writing", "end of an epoch"),
)
END = ("last step", "last step", "last step", "result")
ROUNDS, LEAST_ON_TRACKER = 3, 5
LONGEST_DELAYS = {"begin": 4.0, "step": 0.5, "resumed": 0.3, "writing": 0.02, "end of an epoch": 1.0, "last step": 2.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chaos")
    content = {
        "storage": str(folder / "runs"),
        "data": shard_folders(folder, images=48),
        "model": {"variant": "n", "input_size": [64, 64], "num_queries": 20, "num_denoising": 10},
        "schedule": {"steps": STEPS, "global_batch_size": 8, "no_aug_epochs": 1, "micro_batch_size": 4},
        "evaluation": {"every_steps": EPOCH, "num_images": 1},
        "checkpoints": {"every_steps": 1},
        "tracking": {"every_steps": 1},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(content))
    return folder


def training(folder: Path, name: str, *flags: str) -> Command:
    run = folder / "runs" / name

    def newest() -> int:
        return max(checkpoint.steps_in(str(run / "checkpoints")), default=0)

    def advanced(condition: Callable[[int], bool]) -> Callable[[Attempt], bool]:
        return lambda attempt: newest() > attempt.progress_before and condition(newest())

    return Command(
        words=[sys.executable, "-m", "jobs.train", str(folder / "run.yaml"), "--name", name, *flags],
        folder=ROOT,
        log=folder / f"{name}.log",
        progress=newest,
        moments={
            "begin": lambda _: True,
            "step": advanced(lambda _: True),
            "writing": lambda _: any((run / "checkpoints").glob(".step-*.partial")),
            "end of an epoch": advanced(lambda step: step % EPOCH == 0),
            "resumed": lambda attempt: "continuing at step" in attempt.printed(),
            "last step": lambda _: newest() == STEPS,
            "result": lambda _: (run / "result.json").exists(),
        },
    )


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> Path:
    training(folder, "undisturbed").run([])
    return folder


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path)
    server.start()
    yield server
    server.kill()


def test_each_metric_arrives_once_while_tracking_server_and_training_are_killed(
    undisturbed: Path, server: Server, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    def strike(disturbance: Disturbance) -> None:
        if disturbance.blow == "kill":
            server.kill()
            time.sleep(disturbance.pause_s)
            server.start()
        else:
            server.send(signal.SIGSTOP)
            time.sleep(disturbance.pause_s)
            server.send(signal.SIGCONT)

    seed = chaos_seed() + 100
    blows = draw(seed, ("step",) * 4, longest_delays={"step": 2.0}, blows=("kill", "pause"), targets=("server",))
    killed = draw(seed + 1, ("step", "last step"), longest_delays=LONGEST_DELAYS, blows=("kill", "term"))
    last = draw(seed + 2, ("result",), longest_delays={}, blows=("kill",), targets=("server",))
    plan = [*blows[:2], killed[0], *blows[2:], killed[1], *last]
    landed: list[Disturbance] = []
    for number in range(
        ROUNDS
    ):  # a server takes as long to start as half of a training: what comes too late meets another one
        name = f"tracked-{number}"
        command = training(undisturbed, name, "--set", f"tracking.uri={server.uri}")
        command.acts = {"server": strike}
        command.run(plan[len(landed) :])
        landed += command.landed
        assert "Traceback" not in command.log.read_text()
        database = tmp_path / "mlflow.db"
        assert_equal_runs(undisturbed / "runs", "undisturbed", name, step=STEPS, database=database)
        if len(landed) >= LEAST_ON_TRACKER:
            break
    report_landed(landed, record_property, least=LEAST_ON_TRACKER)


@pytest.mark.parametrize("number", range(2))
def test_a_training_under_blows_ends_as_one_that_was_left_alone(
    undisturbed: Path, number: int, record_property: Callable[[str, object], None]
) -> None:
    name = f"disturbed-{number}"
    command = training(undisturbed, name)
    seed = chaos_seed() + 10 * number
    end = draw(seed + 1, END, longest_delays=LONGEST_DELAYS, blows=("kill", "kill", "term", "freeze"))
    command.run([*draw(seed, MOMENTS, longest_delays=LONGEST_DELAYS), *end])
    report_landed(command.landed, record_property, least=9)
    assert "Traceback" not in command.log.read_text()
    assert_equal_runs(undisturbed / "runs", "undisturbed", name, step=STEPS)
