"""Detection service on Ray Serve: replicas, their routes, start and stop of the server.

Replicas share the requests to `/detect`. A body is limited twice: the proxy stops reading it (`proxy.py`), and the
replica refuses it. Requests wait in their replica, which limits their number; the queue of the proxy is short.
"""

import asyncio
import http.client
import logging
import os
import socket
import time

import ray
from fastapi import FastAPI, HTTPException
from ray import serve
from ray.serve.config import BackpressureConfig, HTTPOptions
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import LoggingConfig
from starlette.requests import Request
from starlette.responses import Response

from pipeline.config import ConfigError
from pipeline.ray_cluster import start_ray
from pipeline.ray_job import cluster_address
from pipeline.serve.metrics import MetricsAggregator, prometheus_text
from pipeline.serve.page import read_page
from pipeline.serve.proxy import RETRY_AFTER_S, proxy_environment
from pipeline.serve.replica import (
    NOSNIFF,
    DetectionService,
    ServeSettings,
    error_response,
    json_response,
)
from pipeline.serve.request_error import RequestError
from pipeline.wording import plural

APPLICATION = "detector"  # name on Ray Serve
OTHER_REQUESTS = 8  # requests to other routes that a replica accepts while it is full
PROXY_GRACE_S = 10.0  # a replica enforces the timeout itself; the proxy gives up this much later
REPORT_INTERVAL_S = 1.0
WARNINGS_ONLY = LoggingConfig(log_level="WARNING", enable_access_log=False)

app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)  # these pages would load scripts from a CDN


@app.exception_handler(HTTPException)
@app.exception_handler(404)
@app.exception_handler(405)
async def _no_such_route(_: Request, error: HTTPException) -> Response:
    return error_response(
        RequestError(error.status_code, f"{error.detail}: POST /detect, GET /health, /metrics, /model or /")
    )


@serve.ingress(app)
class DetectionServer:
    """One replica of the server.

    Args:
        aggregator: collects the metrics if there are several replicas.
    """

    def __init__(self, settings: ServeSettings, aggregator: DeploymentHandle[MetricsAggregator] | None) -> None:
        self.service = DetectionService(settings)
        self.aggregator, self.report_scheduled = aggregator, False
        self.replica = serve.get_replica_context().replica_id.unique_id
        self.page, self.page_headers = read_page()

    @app.post("/detect")
    async def detect(self, request: Request) -> Response:
        """Detect in the images of a request."""
        response = await self.service.detect(request)
        if self.aggregator is not None and not self.report_scheduled:
            self.report_scheduled = True
            asyncio.get_running_loop().call_later(REPORT_INTERVAL_S, self._report_metrics)
        return response

    @app.get("/health")
    async def health(self) -> Response:
        """Return 200 unless the last batch failed, or every decoder is stuck; never waits for either."""
        if problem := self.service.problem():
            return error_response(RequestError(503, f"not ready: {problem}", retry_after_s=RETRY_AFTER_S))
        return json_response({"status": "ready"})

    @app.get("/metrics")
    async def metrics(self) -> Response:
        """Return the metrics of all replicas."""
        metrics = self.service.metrics.copy()  # the detecting thread updates the original
        if self.aggregator is not None:
            metrics = await self.aggregator.update.remote(self.replica, metrics)
        return Response(prometheus_text(metrics), headers=NOSNIFF, media_type="text/plain; version=0.0.4")

    @app.get("/model")
    async def model(self) -> Response:
        """Return class names, input size, limits and versions."""
        description = self.service.description()
        return json_response(description | {"versions": {**description["versions"], "ray": ray.__version__}})

    @app.get("/")
    async def index(self) -> Response:
        """Return the web page."""
        return Response(self.page, headers=self.page_headers, media_type="text/html; charset=utf-8")

    async def check_health(self) -> None:
        """Raise if the detector fails. Ray Serve calls this method and then replaces the replica."""
        await self.service.check_health()

    def _report_metrics(self) -> None:
        assert self.aggregator is not None
        self.report_scheduled = False
        self.aggregator.update.remote(self.replica, self.service.metrics.copy())


def application(settings: ServeSettings) -> serve.Application:
    """Build the application for `serve run` or a Serve config file: `import_path: pipeline.serve.deployment:application`."""
    replicas = serve.deployment(
        num_replicas=settings.replicas,
        max_ongoing_requests=settings.max_waiting + OTHER_REQUESTS,
        max_queued_requests=settings.max_waiting,
        backpressure_config=BackpressureConfig(retry_after_s=RETRY_AFTER_S),
        ray_actor_options={"num_cpus": settings.cpus, "num_gpus": settings.gpus},
        max_constructor_retry_count=1,
        graceful_shutdown_timeout_s=settings.timeout_s,
        health_check_period_s=5,
        logging_config=WARNINGS_ONLY,
    )(DetectionServer)
    aggregator = serve.deployment(ray_actor_options={"num_cpus": 0}, logging_config=WARNINGS_ONLY)(MetricsAggregator)
    return replicas.bind(settings, aggregator.bind() if settings.replicas > 1 else None)


def start(settings: ServeSettings, *, host: str, port: int) -> str:
    """Start the server, wait until it responds, and return its URL.

    Raises:
        ConfigError: the port is in use, the cluster is too small, or another server responds.
    """
    # 1. Everything that can fail is checked before replicas start. The proxy inherits the limit on bodies.
    if not cluster_address():
        _refuse_taken(host, port)
    for name, value in proxy_environment(settings.limits.max_bytes, settings.header_s).items():
        os.environ.setdefault(name, value)
    start_ray()
    _refuse_too_small(settings)

    # 2. Start the proxy and the replicas, whose constructors load the detector.
    options = HTTPOptions(host=host, port=port, request_timeout_s=settings.timeout_s + PROXY_GRACE_S)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    serve.start(http_options=options, logging_config=WARNINGS_ONLY)
    serve.run(application(settings), name=APPLICATION, route_prefix="/")

    # 3. Ray Serve returns before the proxy routes requests.
    address = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    _wait_until_ready(address, port)
    return f"http://{f'[{address}]' if ':' in address else address}:{port}"


def stop() -> None:
    """Stop the application once its requests are finished, then Ray if it was started here, or an idle Ray Serve."""
    if not ray.is_initialized():
        return
    if APPLICATION in serve.status().applications:
        serve.delete(APPLICATION)
    if cluster_address() and not serve.status().applications:
        serve.shutdown()  # type: ignore[no-untyped-call]
    ray.shutdown()


def _refuse_taken(host: str, port: int) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(
                f"cannot listen on {host}:{port}: {error.strerror}; choose another --port or --host"
            ) from None


def _refuse_too_small(settings: ServeSettings) -> None:
    available = ray.cluster_resources()  # type: ignore[no-untyped-call]
    for kind, each in (("CPU", settings.cpus), ("GPU", settings.gpus)):
        needed = settings.replicas * each
        if needed > available.get(kind, 0):
            raise ConfigError(
                f"{plural(settings.replicas, 'replica')} with {each:g} {kind}: {needed:g} in all, the cluster has"
                f" {available.get(kind, 0):g}: reduce --replicas, or --cpus and --gpus per replica"
            )


def _wait_until_ready(host: str, port: int, seconds: float = 30.0) -> None:
    """Poll /health: the proxy knows the application a moment after Ray Serve has started it."""
    until = time.monotonic() + seconds
    last = "no response"
    while time.monotonic() < until:
        connection = http.client.HTTPConnection(host, port, timeout=seconds)
        try:
            connection.request("GET", "/health")
            response = connection.getresponse()
            last = f"{response.status} {response.read(200).decode(errors='replace')}"
            if response.status == 200:
                return
        except OSError as error:
            last = f"{error}"
        finally:
            connection.close()
        time.sleep(0.2)
    raise ConfigError(
        f"{host}:{port} is not ready, its last response: {last}. On a cluster, Ray Serve may already be running with another"
        " host or port (see serve status), which a second start cannot change"
    )
