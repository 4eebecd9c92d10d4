"""Address of a running Ray cluster: the forms that commands can join, and whether Ray listens there.

Without this check Ray repeats a connection for more than a minute, with a warning for each attempt.
"""

import os
import socket
import time

from pipeline.errors import UserError

PROBE_S = 5.0  # for one address; a cluster that is being started may need a moment
RETRY_S = 0.5
WAYS_OUT = (
    "start the cluster, correct RAY_ADDRESS (or `address` of the cluster file), or unset it to run on this machine"
)

# HTTP/2, which gRPC speaks: the client's greeting with empty settings, and the type of the frame that every server opens with.
GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\x04\0\0\0\0\0"
SETTINGS_FRAME = 4


class ClusterError(UserError):
    """A Ray cluster that cannot be joined, or not be started on this machine."""


def refuse_other_forms(address: str) -> None:
    """Check that RAY_ADDRESS is HOST:PORT or "auto".

    Raises:
        ClusterError: it has another form, such as that of Ray's job server.
    """
    if address == "auto":
        return
    scheme, separator, _ = address.partition("://")
    if separator and scheme in ("http", "https"):
        raise ClusterError(
            f"RAY_ADDRESS={address} is the address of Ray's job server, which runs a command only as a job: `ray job submit"
            " --working-dir . -- COMMAND`. To join from here, set RAY_ADDRESS=HOST:6379 of the cluster's head"
        )
    if separator:
        raise ClusterError(
            f"RAY_ADDRESS={address}: commands do not run through {scheme}://. Set RAY_ADDRESS=HOST:6379 of the cluster's head on"
            " one of its nodes, or submit the command: `ray job submit --working-dir . -- COMMAND`"
        )
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ClusterError(f"RAY_ADDRESS={address} is not HOST:PORT, such as 10.0.0.1:6379: {WAYS_OUT}")


def refuse_dead(address: str, resolved: str) -> None:
    """Check within seconds that Ray listens at an address.

    Args:
        address: RAY_ADDRESS, for the message.
        resolved: HOST:PORT to which Ray connects for it.

    Raises:
        ClusterError: nothing listens there, or something else.
    """
    host, _, port = resolved.rpartition(":")
    if problem := _problem(host.strip("[]"), int(port)):
        at = "" if address == resolved else f" at {resolved}"
        raise ClusterError(f"RAY_ADDRESS={address}: no Ray cluster responds{at} ({problem}): {WAYS_OUT}")


def _problem(host: str, port: int) -> str | None:
    """Reason why no Ray responds there; None if it does."""
    until = time.monotonic() + PROBE_S
    while True:
        try:
            with socket.create_connection((host, port), timeout=max(until - time.monotonic(), RETRY_S)) as connection:
                return None if _speaks_grpc(connection) else "something else listens there"
        except socket.gaierror:
            return f"the host name {host} is unknown"
        except (OSError, UnicodeError) as error:
            if time.monotonic() + RETRY_S >= until:
                return getattr(error, "strerror", None) or str(error)
        time.sleep(RETRY_S)


def _speaks_grpc(connection: socket.socket) -> bool:
    if os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true"):
        return True  # encrypted: Ray itself finds out
    connection.sendall(GREETING)
    connection.settimeout(PROBE_S)
    answer = b""
    while len(answer) < 4 and (more := connection.recv(16)):
        answer += more
    return len(answer) >= 4 and answer[3] == SETTINGS_FRAME
