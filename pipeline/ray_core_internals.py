"""Private parts of Ray's core that the start of a cluster needs, verified with Ray 2.60.

`ray_internals.py` holds those of Ray Data and Ray Train, whose import takes seconds.
"""

from ray._common.utils import env_bool
from ray._private import ray_constants
from ray._private.services import canonicalize_bootstrap_address
from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

LOOPBACK_VARIABLE = ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR


def read_environment_again() -> None:
    """Apply RAY_AUTH_MODE, the token and the loopback variable, each of which a process reads only once.

    Ray takes the address of a network interface for its node's, and its processes listen on all interfaces. With "0" in the
    loopback variable it takes 127.0.0.1, and they listen there alone: Ray's default on macOS and Windows.
    """
    Config.initialize("")  # before the token: in token mode a request that finds none ends the process
    AuthenticationTokenLoader.instance().reset_cache()
    default = not ray_constants.IS_WINDOWS_OR_OSX
    ray_constants.ENABLE_RAY_CLUSTER = env_bool(LOOPBACK_VARIABLE, default)  # type: ignore[no-untyped-call]


def address_to_connect_to() -> str | None:
    """HOST:PORT to which Ray connects for RAY_ADDRESS; None for an "auto" that finds no cluster on this machine.

    For a loopback address Ray connects to a network interface, unless the loopback variable is "0".

    Raises:
        OSError: the host name is unknown.
    """
    try:
        address: str | None = canonicalize_bootstrap_address("auto")
    except ConnectionError:
        return None
    return address
