"""PyTorch's process group on a local Ray: its sockets listen on the loopback address, as Ray's own do.

Workers find each other through a store of PyTorch. It has no token, and listens on all interfaces unless it is given a socket.
"""

import importlib
import os
import socket
import sys
from typing import Any

from ray.train.torch import TorchConfig
from ray.util import get_node_ip_address
from torch.distributed import TCPStore  # type: ignore[attr-defined]

LOOPBACK = "127.0.0.1"
# Gloo and NCCL listen on the interface that these name, else on the one of the host name, or on the first.
INTERFACE_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
LOOPBACK_INTERFACE = "lo0" if sys.platform == "darwin" else "lo"


class LocalTorchConfig(TorchConfig):  # type: ignore[misc]
    """Ray Train's configuration of PyTorch, with loopback sockets where all workers are on a local Ray."""

    @property
    def backend_cls(self) -> type:
        """Implement Ray's interface."""
        return LocalTorchBackend


class LocalTorchBackend(TorchConfig().backend_cls):  # type: ignore[misc]
    """Ray Train's setup of PyTorch's process group."""

    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        """Prepare all workers, then set up the process group."""
        worker_group.execute(listen_on_loopback_if_local)
        super().on_start(worker_group, backend_config)


def listen_on_loopback_if_local() -> None:
    """Restrict the sockets of this worker's process group, if its node has the loopback address: it is the only one."""
    if get_node_ip_address() != LOOPBACK:  # type: ignore[no-untyped-call]
        return
    # By its full name: `torch.distributed.rendezvous` is a function.
    importlib.import_module("torch.distributed.rendezvous").TCPStore = _loopback_store  # type: ignore[attr-defined]
    for name in INTERFACE_VARIABLES:
        os.environ.setdefault(name, LOOPBACK_INTERFACE)


def _loopback_store(host_name: str, port: int, *, is_master: bool, **settings: Any) -> TCPStore:
    """Create PyTorch's TCPStore, whose server has a socket of its own."""
    if is_master:
        settings["master_listen_fd"] = socket.create_server((LOOPBACK, port)).detach()
    return TCPStore(host_name, port, is_master=is_master, **settings)
