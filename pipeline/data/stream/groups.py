"""Groups of workers that share a coordinator of Ray Data."""

from collections.abc import Iterator, Sequence

import ray
import torch.distributed as dist

GROUP_WORKERS = 8  # most workers of a group: a coordinator takes part of a core for each


def nodes_of_workers(world_size: int) -> list[str]:
    """Node id of every rank. Collective where the workers are the processes of a process group."""
    here: str = ray.get_runtime_context().get_node_id()
    nodes = [here] * world_size
    if world_size > 1 and dist.is_available() and dist.is_initialized():
        dist.all_gather_object(nodes, here)
    return nodes


def groups_of(nodes: Sequence[str]) -> Iterator[range]:
    """Yield runs of ranks on one node, of at most `GROUP_WORKERS`.

    Args:
        nodes: node id of every rank.
    """
    first = 0
    for rank in range(1, len(nodes) + 1):
        if rank == len(nodes) or nodes[rank] != nodes[first] or rank - first == GROUP_WORKERS:
            yield range(first, rank)
            first = rank
