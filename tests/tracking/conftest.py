"""Shared by the tests of tracking."""

from pathlib import Path

import pytest
from mlflow import MlflowClient


@pytest.fixture(scope="module")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Database with MLflow's tables, which take seconds to create."""
    folder = tmp_path_factory.mktemp("database")
    MlflowClient(f"sqlite:///{folder}/mlflow.db").search_experiments()
    return folder / "mlflow.db"
