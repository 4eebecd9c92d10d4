"""A server of the hub's API on this machine: files of repositories by revision, with the headers that the hub sends.

It can cut connections, alter content, refuse as gated or private repositories do, and count requests.
"""

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

COMMIT = "0123456789abcdef0123456789abcdef01234567"
RESOLVE = re.compile(r"/([\w.-]+/[\w.-]+)/resolve/([\w.-]+)/(.+)")


@dataclass
class Hub:
    """State of the server, changed by a test while it runs."""

    url: str = ""
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)  # by repository and name
    altered: set[str] = field(default_factory=set)  # names of files that arrive with another last byte
    cut_after: int | None = None  # bytes of a body, then the connection is closed
    cuts: int = 10**9  # how often
    continues: bool = True  # takes Range requests
    status: int | None = None  # refuses everything with it
    error_code: str = ""  # X-Error-Code of a refusal
    token: str | None = None  # required of every request
    requests: list[str] = field(default_factory=list)  # "HEAD model.safetensors"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _answer(self, *, with_body: bool) -> None:
        hub = self.hub
        found = RESOLVE.fullmatch(self.path.partition("?")[0])
        if found is None:
            return self._refuse(404, "")
        repo, revision, name = found.groups()
        hub.requests.append(f"{self.command} {name}")
        if hub.status is not None:
            return self._refuse(hub.status, hub.error_code)
        if hub.token is not None and self.headers.get("Authorization") != f"Bearer {hub.token}":
            return self._refuse(401, "GatedRepo")
        if repo not in hub.files:
            return self._refuse(401, "RepoNotFound")  # as the hub does for everybody without a token
        if revision not in ("main", COMMIT):
            return self._refuse(404, "RevisionNotFound")
        if name not in hub.files[repo]:
            return self._refuse(404, "EntryNotFound")
        return self._send(name, hub.files[repo][name], with_body=with_body)

    def _refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _send(self, name: str, content: bytes, *, with_body: bool) -> None:
        hub, start = self.hub, 0
        etag = (
            hashlib.sha256(content).hexdigest() if name.endswith(".safetensors") else hashlib.sha1(content).hexdigest()
        )
        if name in hub.altered:
            content = content[:-1] + bytes([content[-1] ^ 1])
        if hub.continues and (asked := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")):
            start = int(asked[1])
        self.send_response(206 if start else 200)
        self.send_header("ETag", f'"{etag}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("X-Linked-Size", str(len(content)))
        self.send_header("Content-Length", str(len(content) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if not with_body:
            return
        if hub.cut_after is not None and hub.cuts > 0 and name.endswith(".safetensors"):
            hub.cuts -= 1
            self.wfile.write(content[start : start + hub.cut_after])
            self.close_connection = True
            return
        self.wfile.write(content[start:])


@contextmanager
def hub_server(repositories: dict[str, Path]) -> Iterator[Hub]:
    """Serve folders as repositories."""
    files = {
        repo: {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
        for repo, folder in repositories.items()
    }
    hub = Hub(files=files)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
