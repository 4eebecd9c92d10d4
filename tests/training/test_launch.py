"""What `launch` hands to Ray Train, without starting Ray."""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from ray.train import FailureConfig
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.constants import WORKER_GROUP_START_TIMEOUT_S_ENV_VAR, get_env_vars_to_propagate
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError
from ray.train.v2._internal.execution.failure_handling import FailureDecision
from ray.train.v2._internal.execution.failure_handling.default import DefaultFailurePolicy
from ray.train.v2.api.exceptions import ControllerError

from pipeline import ray_cluster
from pipeline.config import Cluster, ConfigError
from pipeline.config_files import load_cluster
from pipeline.training import launch, on_ray, preflight
from pipeline.training.preflight import Request
from tests.support.training_runs import experiment, shard_folders

CONFIGS = Path(__file__).parents[2] / "configs"


class RecordedTrainer:
    """A trainer that ends at once and keeps what Ray's own would take: its settings, and this process's variables."""

    settings: dict[str, Any]
    variables: dict[str, str]
    message: str

    def __init__(self, loop: Any, **settings: Any) -> None:
        RecordedTrainer.settings = settings

    def _register_sigint_handler(self, controller: Any) -> None: ...

    def _create_default_callbacks(self) -> list[Any]:
        return []

    def fit(self) -> Any:
        RecordedTrainer.variables = get_env_vars_to_propagate()
        RecordedTrainer.message = str(WorkerGroupStartupTimeoutError(num_workers=2))
        return SimpleNamespace(return_value={"step": 6, "best_ap": None, "skipped_steps": 0})


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.setenv(WORKER_GROUP_START_TIMEOUT_S_ENV_VAR, "7")  # taken back after the test
    monkeypatch.setattr(ray_cluster, "start_ray", lambda **_: None)
    monkeypatch.setattr(on_ray, "start_progress_board", lambda: None)
    monkeypatch.setattr(preflight, "request_for", lambda *_, **__: Request(2, 2, 0.0, {"CPU": 0.5}))
    monkeypatch.setattr(preflight, "problems_on_nodes", lambda *_: [])
    monkeypatch.setattr(on_ray, "TorchTrainer", RecordedTrainer)

    def start(cluster: Cluster) -> type[RecordedTrainer]:
        launch.launch(experiment(tmp_path, shard_folders(tmp_path)), cluster)
        return RecordedTrainer

    return start


def test_compilation_on_a_cpu_is_refused_before_the_start(tmp_path: Path) -> None:
    setting = experiment(tmp_path, shard_folders(tmp_path), numerics={"compile": "step"})
    with pytest.raises(ConfigError, match=r"numerics\.compile: .* wrong gradients"):
        launch.launch(setting, Cluster(workers=1))
    assert not (tmp_path / "runs").exists() or not list(tmp_path.glob("runs/*/checkpoints/*"))


@pytest.mark.parametrize("seconds", [0.5, 600])
def test_the_start_timeout_of_the_cluster_file_reaches_ray_train(launched: Any, seconds: float) -> None:
    trainer = launched(Cluster(start_timeout_s=seconds))
    assert float(trainer.variables[WORKER_GROUP_START_TIMEOUT_S_ENV_VAR]) == seconds
    assert f"timed out after {float(seconds)} seconds" in trainer.message


def test_the_cluster_file_wins_over_a_start_timeout_in_the_environment(launched: Any) -> None:
    assert os.environ[WORKER_GROUP_START_TIMEOUT_S_ENV_VAR] == "7"
    trainer = launched(load_cluster(CONFIGS / "clusters" / "several_nodes.yaml"))
    assert float(trainer.variables[WORKER_GROUP_START_TIMEOUT_S_ENV_VAR]) == 600


def test_ray_train_does_not_count_failed_starts_itself(launched: Any) -> None:
    config: FailureConfig = launched(Cluster()).settings["run_config"].failure_config
    decision = DefaultFailurePolicy(config).make_decision(ControllerError(WorkerGroupStartupTimeoutError(2)))
    assert decision == FailureDecision.RAISE


class FailingTrainer:
    """A trainer whose starts fail at given steps, and then succeed."""

    def __init__(self, failing_at: list[int]) -> None:
        self.failing_at, self.step, self.starts = failing_at, 0, 0

    def fit(self) -> Any:
        self.starts += 1
        if self.starts > len(self.failing_at):
            return "done"
        self.step = self.failing_at[self.starts - 1]
        raise ControllerError(RuntimeError("gloo: connection refused\nremote=[127.0.0.1]"))


@pytest.mark.parametrize("failing_at", [[], [0, 0, 0], [0, 0, 0, 5, 5, 5, 6]])
def test_a_failed_start_is_repeated_and_a_step_starts_the_count_anew(
    failing_at: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = FailingTrainer(failing_at)
    assert on_ray.fit_with_restarts(lambda: cast(TorchTrainer, trainer), lambda: trainer.step) == "done"
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(failing_at)
    assert all(line.endswith("gloo: connection refused") for line in lines)


@pytest.mark.parametrize(("failing_at", "starts"), [([0] * 9, 4), ([0, 7, 7, 7, 7, 7], 5)])
def test_the_fourth_failed_start_without_a_step_in_between_ends_the_run(failing_at: list[int], starts: int) -> None:
    trainer = FailingTrainer(failing_at)
    with pytest.raises(ControllerError, match="connection refused"):
        on_ray.fit_with_restarts(lambda: cast(TorchTrainer, trainer), lambda: trainer.step)
    assert trainer.starts == starts
