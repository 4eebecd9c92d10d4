"""A slow link to a server: a proxy that lets a limited number of bytes a second pass, and delays each request."""

import re
import socket
import threading
import time
from types import TracebackType
from typing import Self

BLOCK = 16384
REQUEST = re.compile(rb"^(GET|POST|PUT|PATCH|DELETE|HEAD) /")
BUFFER = 1 << 16  # the kernel takes no more than about this ahead of the link


class SlowLink:
    """Proxy in front of a port of this machine, as a context manager.

    Args:
        bytes_per_s: in the direction of the server.
        request_s: delay of every request.
    """

    def __init__(self, port: int, *, bytes_per_s: float, request_s: float = 0.0) -> None:
        self._to, self._bytes_per_s, self._request_s = port, bytes_per_s, request_s
        self._listening = socket.socket()
        self._listening.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER)
        self._listening.bind(("127.0.0.1", 0))
        self._listening.listen()
        self.passed = 0  # bytes to the server

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self._listening.getsockname()[1]}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._listening.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listening.accept()
            except OSError:  # closed
                return
            server = socket.create_connection(("127.0.0.1", self._to))
            for source, target, slow in ((client, server, True), (server, client, False)):
                threading.Thread(target=self._forward, args=(source, target, slow), daemon=True).start()

    def _forward(self, source: socket.socket, target: socket.socket, slow: bool) -> None:
        try:
            while block := source.recv(BLOCK):
                if slow:
                    time.sleep(len(block) / self._bytes_per_s + (self._request_s if REQUEST.match(block) else 0))
                    self.passed += len(block)
                target.sendall(block)
        except OSError:
            pass
        finally:
            for end in (source, target):
                try:
                    end.shutdown(socket.SHUT_RDWR)
                except OSError:
                    continue
