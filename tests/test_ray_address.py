"""RAY_ADDRESS: an address that no command can join is refused within seconds, before Ray tries it for a minute."""

import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import HTTPServer, SimpleHTTPRequestHandler

import grpc
import pytest

from pipeline import ray_address
from pipeline.ray_address import ClusterError, refuse_dead, refuse_other_forms
from pipeline.ray_job import cluster_address


@pytest.fixture(autouse=True)
def short_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_address, "PROBE_S", 0.6)
    monkeypatch.delenv("RAY_USE_TLS", raising=False)


@pytest.mark.parametrize("address", ["10.0.0.1:6379", "head:6379", "[fd00::1]:6379", "auto"])
def test_addresses_of_clusters_are_accepted(address: str) -> None:
    refuse_other_forms(address)


@pytest.mark.parametrize(
    ("address", "way_out"),
    [
        ("http://head:8265", "ray job submit"),
        ("https://head", "ray job submit"),
        ("ray://head:10001", "HOST:6379"),
        ("head", "HOST:PORT"),
        ("head:", "HOST:PORT"),
        ("head:ray", "HOST:PORT"),
        ("head:0", "HOST:PORT"),
        ("head:65536", "HOST:PORT"),
        (":6379", "HOST:PORT"),
    ],
)
def test_other_forms_are_refused_with_the_way_out(address: str, way_out: str) -> None:
    with pytest.raises(ClusterError, match=way_out) as refused:
        refuse_other_forms(address)
    assert f"RAY_ADDRESS={address}" in str(refused.value)


@pytest.mark.parametrize(
    ("value", "address"), [("", None), (" ", None), ("local", None), ("a:1", "a:1"), ("auto", "auto")]
)
def test_only_a_named_cluster_is_joined(value: str, address: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", value)
    assert cluster_address() == address


def refusal(address: str) -> str:
    with pytest.raises(ClusterError) as refused:
        refuse_dead("head:6379", address)
    return str(refused.value)


@contextmanager
def listening(backlog: int = 5) -> Iterator[str]:
    """Address of a socket that accepts and never responds."""
    with socket.create_server(("127.0.0.1", 0), backlog=backlog) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


def test_a_port_that_nobody_listens_on_is_refused() -> None:
    with listening() as address:
        pass
    text = refusal(address)
    assert text.startswith(f"RAY_ADDRESS=head:6379: no Ray cluster responds at {address} (Connection refused): start")
    assert "unset it to run on this machine" in text


def test_an_unknown_host_is_refused() -> None:
    assert "the host name nowhere.invalid is unknown" in refusal("nowhere.invalid:6379")


def test_a_server_that_does_not_respond_is_refused() -> None:
    with listening() as address:
        assert "timed out" in refusal(address)


def test_another_kind_of_server_is_refused() -> None:
    """The port of the dashboard is often given instead."""
    with HTTPServer(("127.0.0.1", 0), SimpleHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        assert "something else listens there" in refusal(f"127.0.0.1:{server.server_address[1]}")
        server.shutdown()


def test_a_grpc_server_is_accepted_as_is_a_port_with_tls(monkeypatch: pytest.MonkeyPatch) -> None:
    server = grpc.server(ThreadPoolExecutor(1))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    refuse_dead("head:6379", f"127.0.0.1:{port}")
    server.stop(None)
    monkeypatch.setenv("RAY_USE_TLS", "1")
    with listening() as address:
        refuse_dead("head:6379", address)
