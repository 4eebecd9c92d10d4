"""Shared by all tests."""

import os

import pytest

# Before torch starts: tests must not depend on the machine's width, and idle threads must leave the cores to other processes.
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

torch.set_num_threads(2)

# These start Ray: with several processes (`pytest -n 2`) all of them run in one, for two clusters would starve each other.
ON_RAY = frozenset(
    {
        "test_doctor",
        "test_prepare",
        "test_ray_cluster",
        "test_serve",
        "test_stream",
        "test_stream_in_train",
        "test_stream_on_nodes",
        "test_train_on_ray",
        "test_user_mistakes",
    }
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A file's tests stay together, as its fixtures serve all of them."""
    for item in items:
        item.add_marker(pytest.mark.xdist_group("on Ray" if item.path.stem in ON_RAY else item.path.stem))
