"""Server on Ray Serve under slow clients, slow images, and the end of a replica."""

import json
import os
import signal
import socket
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote

import pytest
import ray

from pipeline.serve.replica import ServeSettings
from tests.support.fuzzed_requests import RequestFuzzer
from tests.support.image_bombs import bmp_runs, jpeg
from tests.support.processes import descendants, free_port, wait_until
from tests.support.served_detector import exported_detector, request

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # raised by pydantic about Ray Serve's own code
    from pipeline.serve import deployment

pytestmark = pytest.mark.slow
SLOW = bmp_runs(8_000, 8_000, b"\1\0\0\0" * 8_000)  # within every limit, and some seconds of work
HEAD = b"POST /detect HTTP/1.1\r\nHost: a\r\nContent-Type: image/png\r\n"


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    port = free_port()
    folder = exported_detector(tmp_path_factory.mktemp("exported"), ["disc", "box"])
    settings = ServeSettings(source=str(folder), max_megapixels=80, header_s=2, body_s=3, decode_s=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        for name in deployment.proxy_environment(1):  # those of another test's server
            patch.delenv(name, raising=False)
        try:
            deployment.start(settings, host="127.0.0.1", port=port)
            yield port
        finally:
            deployment.stop()


def received(client: socket.socket) -> tuple[int, dict[str, str]]:
    """Status and JSON of a response, which the server ends by closing the connection."""
    content = b""
    while part := client.recv(65536):
        content += part
    head, body = content.split(b"\r\n\r\n", 1)
    assert b"application/json" in head, content
    return int(head.split()[1]), json.loads(body)


def requests_with(port: int, status: int) -> float:
    lines = request(port, "/metrics")[2].splitlines()
    counts = [line.split()[-1] for line in lines if line.startswith(f'detect_requests_total{{status="{status}"}}')]
    return float(counts[0]) if counts else 0.0


def test_health_responds_while_images_take_too_long_and_they_are_refused(port: int) -> None:
    with ThreadPoolExecutor(3) as pool:
        slow = [pool.submit(request, port, "/detect", SLOW, Content_Type="image/bmp") for _ in range(3)]
        waits = []
        while not all(each.done() for each in slow):
            started_at = time.monotonic()
            assert request(port, "/health")[::2] == (200, {"status": "ready"})
            waits.append(time.monotonic() - started_at)
            time.sleep(0.1)
    assert len(waits) > 10
    assert max(waits) < 2.0
    for each in slow:
        status, _, content = each.result()
        assert (status, content["field"]) == (422, "body")
        assert "not decoded within 2 s" in content["error"]
    assert request(port, "/detect", jpeg(), Content_Type="image/jpeg")[0] == 200


@pytest.mark.parametrize("before", [b"", b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n"])
def test_headers_that_do_not_end_are_answered_408(port: int, before: bytes) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=30) as client:
        if before:
            client.sendall(before)
            answer = client.recv(4096)
            while not answer.endswith(b'"ready"}') and (more := client.recv(4096)):  # head and body may come apart
                answer += more
            assert answer.startswith(b"HTTP/1.1 200")
        client.sendall(HEAD[:40])
        started_at = time.monotonic()
        for _ in range(5):  # bytes do not extend the time
            time.sleep(0.2)
            client.sendall(b"x")
        status, content = received(client)
    assert status == 408
    assert "headers were not complete within 2 s" in content["error"]
    assert time.monotonic() - started_at < 15


def test_a_body_that_does_not_end_is_answered_408(port: int) -> None:
    before = requests_with(port, 408)
    with socket.create_connection(("127.0.0.1", port), timeout=30) as client:
        client.sendall(HEAD + b"Content-Length: 90000\r\n\r\n")
        for _ in range(8):
            time.sleep(0.2)
            client.sendall(b"x")
        status, content = received(client)
    assert status == 408
    assert content["field"] == "body"
    assert "did not arrive within 3 s" in content["error"]
    assert requests_with(port, 408) == before + 1


def test_a_client_that_leaves_is_counted_and_not_logged_as_an_error(port: int) -> None:
    logs = Path(ray._private.worker._global_node.get_session_dir_path()) / "logs"  # type: ignore[union-attr]
    before = requests_with(port, 499)
    for sent in (HEAD + b"Content-Length: 90000\r\n\r\nx", HEAD + b"Content-Length: %d\r\n\r\n" % len(SLOW) + SLOW):
        with socket.create_connection(("127.0.0.1", port), timeout=30) as client:
            client.sendall(sent)
            time.sleep(0.5)
    wait_until(lambda: requests_with(port, 499) == before + 2, 20)
    assert request(port, "/health")[0] == 200
    time.sleep(1)
    written = [path for path in logs.rglob("*") if path.is_file() and ("serve" in str(path) or "worker" in path.name)]
    assert len(written) > 3
    for path in written:
        text = path.read_text(errors="replace")
        assert "ClientDisconnect" not in text, path
        assert "Traceback" not in text, (path, text)


def test_mutated_requests_are_answered_or_refused(port: int) -> None:
    fuzzer = RequestFuzzer(7)
    statuses = Counter[int]()
    for number in range(240):
        fuzzed = fuzzer.request()
        head = [b"POST /detect?" + quote(fuzzed.query, safe="=&%").encode() + b" HTTP/1.1", b"Host: a"]
        head += [name + b": " + value for name, value in fuzzed.headers]
        if number % 8 == 0:  # broken HTTP too
            head[0] = [b"GET /detect HTTP/1.1", b"BREW / HTTP/1.1", b"POST  HTTP/9", b"\xff\xfe"][number // 8 % 4]
        length = b"Content-Length: %d" % len(fuzzed.body) if number % 5 else b"Content-Length: x"
        whole = b"\r\n".join([*head, length, b"Connection: close", b"", fuzzed.body])
        with socket.create_connection(("127.0.0.1", port), timeout=30) as client:
            client.sendall(whole)
            answer = b""
            while part := client.recv(65536):
                answer += part
        status = int(answer.split()[1])
        statuses[status] += 1
        assert status == 200 or 400 <= status < 500 or status == 503, (whole, answer)
    assert statuses[200] > 20, statuses
    assert request(port, "/health")[::2] == (200, {"status": "ready"})


def test_a_request_inside_a_killed_replica_is_answered_503(port: int) -> None:
    (replica,) = [pid for pid, title in descendants(os.getpid()).items() if "DetectionServer" in title]
    with ThreadPoolExecutor(1) as pool:
        inside = pool.submit(request, port, "/detect", SLOW, Content_Type="image/bmp")
        time.sleep(1)
        os.kill(replica, signal.SIGKILL)
        status, headers, content = inside.result()
    assert (status, headers["content-type"], headers["retry-after"]) == (503, "application/json", "1")
    assert "retry" in content["error"]
    codes = set()

    def works_again() -> bool:
        status, headers, content = request(port, "/detect", jpeg(), Content_Type="image/jpeg")
        codes.add(status)
        assert headers["content-type"] == "application/json", content
        return status == 200

    wait_until(works_again, 120)
    assert codes <= {200, 503}
