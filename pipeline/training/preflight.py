"""Checks before the start: the cluster has the requested resources, and every node reaches data and storage."""

import ipaddress
import os
import socket
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import psutil
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline import storage
from pipeline.config import Cluster, ConfigError
from pipeline.data.shards.manifest import ManifestError, load_shards
from pipeline.wording import plural

DECODING_CPUS = 1.0  # minimum left for data tasks


@dataclass(frozen=True)
class Request:
    """Resources that a training requests from the cluster."""

    least: int  # number of workers
    most: int
    gpus: float  # per worker
    per_worker: dict[str, float]  # amount by resource
    spread: bool = False  # workers are spread over the nodes, not packed

    def __str__(self) -> str:
        count = plural(self.most, "worker")
        if self.least < self.most:
            count = f"{self.least} to {count}"
        each = ", ".join(f"{amount:g} {name}" for name, amount in self.per_worker.items())
        return f"{count}, each with {each}"


def request_for(cluster: Cluster, *, decodes: bool, asynchronous_evaluation: bool = False) -> Request:
    """Resolve the cluster file against the running cluster.

    Args:
        decodes: data tasks decode images, and need CPUs of their own.
        asynchronous_evaluation: evaluations run as tasks, and need resources of their own.

    Raises:
        ConfigError: the cluster is too small; names everything that it lacks.
    """
    total: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    gpus = cluster.gpus_per_worker
    if gpus is None:
        gpus = 1.0 if total.get("GPU", 0) else 0.0
    workers = cluster.workers or (max(1, int(total.get("GPU", 0) // gpus)) if gpus else 1)
    least, most = workers if isinstance(workers, tuple) else (workers, workers)
    # Zero amounts are left out: Ray would ask nodes for resources that they do not have.
    per_worker = {"CPU": cluster.cpus_per_worker, **cluster.resources_per_worker, **({"GPU": gpus} if gpus else {})}
    amounts = {name: amount for name, amount in per_worker.items() if amount}
    request = Request(least, most, gpus, amounts, spread=cluster.placement in ("SPREAD", "STRICT_SPREAD"))
    if not cluster.autoscaling:
        evaluation = {"CPU": cluster.evaluation_cpus, "GPU": cluster.evaluation_gpus} if asynchronous_evaluation else {}
        refuse_what_never_fits(request, total, [node["Resources"] for node in _nodes()], decodes, evaluation)
    return request


def refuse_what_never_fits(
    request: Request,
    total: dict[str, float],
    nodes: list[dict[str, float]],
    decodes: bool,
    evaluation: Mapping[str, float] | None = None,
) -> None:
    """Raise for a request that no node can ever serve; Ray itself would wait for ever.

    Args:
        total: resources of the whole cluster.
        nodes: resources of each node.
        decodes: data tasks need CPUs of their own.
        evaluation: resources of an asynchronous evaluation.

    Raises:
        ConfigError: names every resource that is missing.
    """
    # The sum over the cluster, then a single worker on the largest node.
    problems = []
    for name, amount in request.per_worker.items():
        reserved = DECODING_CPUS if name == "CPU" and decodes else 0.0
        evaluating = (evaluation or {}).get(name, 0.0)
        needed, available = request.least * amount + reserved + evaluating, total.get(name, 0.0)
        if needed > available:
            more = f" and {reserved:g} for decoding" if reserved else ""
            more += f" and {evaluating:g} for asynchronous evaluation" if evaluating else ""
            problems.append(f"{name}: {request.least} x {amount:g}{more} are requested, the cluster has {available:g}")
        elif not any(node.get(name, 0.0) >= amount for node in nodes):
            problems.append(f"{name}: a worker requests {amount:g}, no node has that much")
    # A decode task needs a whole CPU of one node: what is left over on several nodes is of no use to it.
    if not problems and decodes and not leaves_cpu(request, nodes):
        problems.append(
            f"CPU: once {request.least} workers are placed, no node has {DECODING_CPUS:g} left for decoding"
        )
    if problems:
        ways = "lower `workers` or their resources in the cluster file, or set autoscaling: true if nodes will be added"
        without_tasks = "; data.decode_in=worker needs no CPUs for decoding" if decodes else ""
        raise ConfigError("\n  ".join(["the cluster is too small:", *problems, ways + without_tasks]))


def leaves_cpu(request: Request, nodes: Sequence[Mapping[str, float]]) -> bool:
    """Whether a node has `DECODING_CPUS` left once the workers are placed: in turn if spread, in the best way if packed."""
    each = request.per_worker.get("CPU", 0.0)
    if request.spread:
        placed = [0] * len(nodes)
        for _ in range(request.least):
            free = [n for n, node in enumerate(nodes) if _capacity(request, node) > placed[n]]
            if not free:
                return False
            placed[min(free, key=lambda n: placed[n])] += 1
        left = [node.get("CPU", 0.0) - each * count for node, count in zip(nodes, placed, strict=True)]
        return max(left) >= DECODING_CPUS
    # Packed: the workers must still fit if one node keeps its CPU free.
    capacities = [_capacity(request, node) for node in nodes]
    for capacity, node in zip(capacities, nodes, strict=True):
        cpus = node.get("CPU", 0.0) - DECODING_CPUS
        kept_free = _capacity(request, {**node, "CPU": cpus})
        if cpus >= 0 and sum(capacities) - capacity + kept_free >= request.least:
            return True
    return False


def _capacity(request: Request, node: Mapping[str, float]) -> int:
    """Number of workers that fit on a node."""
    rounding = 1e-6
    return min(
        (int(node.get(name, 0.0) / amount + rounding) for name, amount in request.per_worker.items()), default=10**9
    )


def waits_for(request: Request, *, started: bool) -> str | None:
    """Name the workers that wait for nodes, see `waiting_line`; None if none does."""
    free: dict[str, float] = ray.available_resources()  # type: ignore[no-untyped-call]
    return waiting_line(request, [node["Resources"] for node in _nodes()], free, started=started)


def waiting_line(
    request: Request, nodes: Sequence[Mapping[str, float]], free: Mapping[str, float], *, started: bool
) -> str | None:
    """Describe a start of the workers that takes long, by what they request and what the cluster has.

    Args:
        nodes: resources of each node.
        free: resources that nothing uses now.
        started: the workers have run before. They wait only if the nodes have no room for the least number of them.
    """
    room = min(sum(_capacity(request, node) for node in nodes), request.most)
    if started and room >= request.least:
        return None
    amounts = ", ".join(f"{free.get(name, 0.0):g} {name}" for name in request.per_worker)
    return f"waiting for {request}: {plural(len(nodes), 'live node')}, with room for {room}; free now: {amounts}"


def problems_on_nodes(request: Request, run: str, manifests: list[str]) -> list[str]:
    """Check on every node that it sees the run's folder, can write to it, can read the data and can be reached by its name."""
    probe = storage.join(run, ".preflight")
    storage.write_atomic(probe, b"")
    nodes = _nodes()
    if len(nodes) == 1:
        return []  # this node, which has just written
    # On CPUs, workers on several machines connect through gloo.
    largest = max(_capacity(request, node["Resources"]) for node in nodes)
    several = len({node["NodeManagerAddress"] for node in nodes}) > 1
    connects = several and not request.gpus and request.most > 1 and (request.spread or request.most > largest)
    # One task on every node, with hard affinity.
    check = ray.remote(num_cpus=0)(_problems_here)
    tasks = [
        check.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(
            run, manifests, node["NodeManagerAddress"] if connects else None
        )
        for node in nodes
    ]
    found: list[list[str]] = ray.get(tasks)
    return [
        f"node {node['NodeManagerHostname']}: {problem}"
        for node, problems in zip(nodes, found, strict=True)
        for problem in problems
    ]


def _nodes() -> list[Any]:
    return [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]


def _problems_here(run: str, manifests: list[str], address: str | None) -> list[str]:
    problems = []
    if address is not None and (wrong := name_problem(socket.gethostname(), address, os.environ)):
        problems.append(wrong)
    try:
        if not storage.exists(storage.join(run, ".preflight")):
            problems.append(f"{run} is another folder there: storage must be shared by all nodes")
        own = storage.join(run, f".preflight-{uuid.uuid4().hex}")  # process ids of different pods may be equal
        storage.write_atomic(own, b"")
        filesystem, path = storage.resolve(own)
        filesystem.delete_file(path)
    except OSError as error:
        problems.append(f"{run} cannot be written: {error}")
    for uri in manifests:
        try:
            load_shards(uri)
        except (ManifestError, OSError) as error:
            problems.append(f"data cannot be read: {error}")
    return problems


def name_problem(name: str, address: str, environment: Mapping[str, str]) -> str | None:
    """Why workers on other nodes could not connect to this one: gloo gives them the address of its host name.

    Args:
        address: by which Ray reaches this node.
    """
    if environment.get("GLOO_SOCKET_IFNAME"):
        return None
    try:
        found = socket.gethostbyname(name)
    except OSError:
        wrong = f"its host name {name} does not resolve"
    else:
        if not ipaddress.ip_address(found).is_loopback:
            return None
        wrong = f"its host name {name} resolves to {found}"
    interfaces = [i for i, given in psutil.net_if_addrs().items() if any(a.address == address for a in given)]
    interface = interfaces[0] if interfaces else f"<interface of {address}>"
    return (
        f"{wrong}, where workers of other nodes cannot connect: set GLOO_SOCKET_IFNAME={interface} where Ray is started on"
        " that node, or mend its /etc/hosts"
    )
