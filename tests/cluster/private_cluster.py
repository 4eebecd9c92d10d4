"""A cluster as commands start it, on a machine of its own: who listens where, and what a neighbour reaches.

Runs in network and UTS namespaces of its own, where the host name resolves to nothing and there is no network except a cable
to the neighbour. Prints JSON.
"""

import json
import os
import socket
import subprocess
import sys
import time

import psutil
import ray

from pipeline.ray_cluster import start_ray
from tests.support.processes import descendants

HERE, NEIGHBOUR = "10.78.0.1", "10.78.0.2"
ATTEMPT = """
import json, socket, sys
reached = []
for port in json.loads(sys.argv[2]):
    try:
        socket.create_connection((sys.argv[1], port), timeout=2).close()
        reached.append(port)
    except OSError:
        pass
print(json.dumps(reached))
"""


def run(command: str) -> None:
    subprocess.run(command.split(), check=True)


def main() -> None:
    run("ip link set lo up")
    socket.sethostname("resolves-to-nothing")
    neighbour = subprocess.Popen(["unshare", "--net", "sleep", "300"])
    while os.readlink(f"/proc/{neighbour.pid}/ns/net") == os.readlink("/proc/self/ns/net"):
        time.sleep(0.01)
    run(f"ip link add cable type veth peer name eth0 netns {neighbour.pid}")
    run(f"ip address add {HERE}/24 dev cable")
    run("ip link set cable up")
    there = ["nsenter", "--target", str(neighbour.pid), "--net"]
    for command in (f"ip address add {NEIGHBOUR}/24 dev eth0", "ip link set eth0 up"):
        subprocess.run([*there, *command.split()], check=True)

    start_ray(num_cpus=1, dashboard=True)
    assert ray.get(ray.remote(lambda: 1).remote()) == 1
    own = set(descendants(os.getpid()))
    with socket.create_server(("0.0.0.0", 0)) as open_to_all:
        ports = sorted(
            connection.laddr.port
            for connection in psutil.net_connections("tcp")
            if connection.status == psutil.CONN_LISTEN and connection.pid in own
        )
        done = subprocess.run(
            [*there, sys.executable, "-c", ATTEMPT, HERE, json.dumps(ports)], capture_output=True, text=True, check=True
        )
        print(json.dumps({"ports": ports, "open": open_to_all.getsockname()[1], "reached": json.loads(done.stdout)}))
    ray.shutdown()
    neighbour.kill()


if __name__ == "__main__":
    main()
