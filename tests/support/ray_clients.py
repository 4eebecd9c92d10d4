"""Processes that join the cluster of the tests from outside."""

import os

import ray

JOINING = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER")


def environment_of_cluster() -> dict[str, str]:
    """Environment of a process that may join this process's cluster, as that cluster's own processes have it."""

    def variables() -> dict[str, str]:
        return {name: os.environ[name] for name in JOINING}

    own: dict[str, str] = ray.get(ray.remote(num_cpus=0)(variables).remote())
    return {**os.environ, **own, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
