"""The service on Ray Serve: replicas, their routes, and the life of the server.

Replicas answer `/detect` together. A body is bounded twice: the proxy stops reading it (`body_limit.py`), the replica
refuses it. A request waits in one place, its replica, which says how many may; the proxy's own queue is short.
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
from pipeline.serve.body_limit import environment
from pipeline.serve.metrics import Counts, Totals, as_text
from pipeline.serve.page import page
from pipeline.serve.replica import RETRY_AFTER_S, SAFE, ServeSettings, Service, json_response, refusal
from pipeline.serve.request_parsing import RequestError

NAME = "detector"  # of the application on Ray Serve
ASIDE = 8  # requests beside those to /detect that a replica answers while it is full
PROXY_GRACE_S = 10.0  # a replica answers in time by itself; past that the proxy gives up
TOLD_EVERY_S = 1.0
QUIET = LoggingConfig(log_level="WARNING", enable_access_log=False)

app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)  # FastAPI's pages load scripts from elsewhere


@app.exception_handler(HTTPException)
@app.exception_handler(404)
@app.exception_handler(405)
async def _no_such_route(request: Request, error: HTTPException) -> Response:
    return refusal(RequestError(error.status_code, f"{error.detail}: POST /detect, GET /health, /metrics, /model or /"))


class SharedTotals:
    """Where replicas tell what they have counted."""

    def __init__(self) -> None:
        self.totals = Totals()

    async def told(self, replica: str, counts: Counts) -> Counts:
        return self.totals.told(replica, counts)


@serve.ingress(app)
class DetectionServer:
    """One replica.

    Args:
        totals: of all replicas, if there are several.
    """

    def __init__(self, settings: ServeSettings, totals: DeploymentHandle[SharedTotals] | None) -> None:
        self.service = Service(settings)
        self.totals, self.will_tell = totals, False
        self.replica = serve.get_replica_context().replica_id.unique_id
        self.page, self.page_headers = page()

    @app.post("/detect")
    async def detect(self, request: Request) -> Response:
        response = await self.service.detect(request)
        if self.totals is not None and not self.will_tell:
            self.will_tell = True
            asyncio.get_running_loop().call_later(TOLD_EVERY_S, self._tell)
        return response

    @app.get("/health")
    async def health(self) -> Response:
        if self.service.failed:
            return refusal(RequestError(503, "the last batch failed", retry_after_s=RETRY_AFTER_S))
        return json_response({"status": "ready"})

    @app.get("/metrics")
    async def metrics(self) -> Response:
        counts = self.service.counts.copy()  # the detecting thread writes on
        if self.totals is not None:
            counts = await self.totals.told.remote(self.replica, counts)
        return Response(as_text(counts), headers=SAFE, media_type="text/plain; version=0.0.4")

    @app.get("/model")
    async def model(self) -> Response:
        described = self.service.description()
        return json_response(described | {"versions": {**described["versions"], "ray": ray.__version__}})

    @app.get("/")
    async def index(self) -> Response:
        return Response(self.page, headers=self.page_headers, media_type="text/html; charset=utf-8")

    async def check_health(self) -> None:
        """Ray Serve asks; where it raises, it makes a new replica."""
        await self.service.check()

    def _tell(self) -> None:
        assert self.totals is not None
        self.will_tell = False
        self.totals.told.remote(self.replica, self.service.counts.copy())


def application(settings: ServeSettings) -> serve.Application:
    """As `serve run` and a Serve config file take it: `import_path: pipeline.serve.deployment:application`."""
    replicas = serve.deployment(
        num_replicas=settings.replicas,
        max_ongoing_requests=settings.max_waiting + ASIDE,
        max_queued_requests=settings.max_waiting,
        backpressure_config=BackpressureConfig(retry_after_s=RETRY_AFTER_S),
        ray_actor_options={"num_cpus": settings.cpus, "num_gpus": settings.gpus},
        max_constructor_retry_count=1,
        graceful_shutdown_timeout_s=settings.timeout_s,
        health_check_period_s=5,
        logging_config=QUIET,
    )(DetectionServer)
    totals = serve.deployment(ray_actor_options={"num_cpus": 0}, logging_config=QUIET)(SharedTotals)
    return replicas.bind(settings, totals.bind() if settings.replicas > 1 else None)


def start(settings: ServeSettings, *, host: str, port: int) -> str:
    """Serve, and come back when the server answers with its URL.

    Raises:
        ConfigError: the port is taken, the cluster too small, or another server answers.
    """
    if not os.environ.get("RAY_ADDRESS"):
        _refuse_taken(host, port)
    for name, value in environment(settings.limits.max_bytes).items():
        os.environ.setdefault(name, value)
    start_ray()
    _refuse_too_small(settings)
    options = HTTPOptions(host=host, port=port, request_timeout_s=settings.timeout_s + PROXY_GRACE_S)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    serve.start(http_options=options, logging_config=QUIET)
    serve.run(application(settings), name=NAME, route_prefix="/")
    reached = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    _wait_for(reached, port)
    return f"http://{f'[{reached}]' if ':' in reached else reached}:{port}"


def stop() -> None:
    """Let replicas finish and take the application away; then a Ray that was started here, or a Ray Serve left with nothing."""
    if not ray.is_initialized():
        return
    if NAME in serve.status().applications:
        serve.delete(NAME)
    if os.environ.get("RAY_ADDRESS") and not serve.status().applications:
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
    there = ray.cluster_resources()  # type: ignore[no-untyped-call]
    for kind, each in (("CPU", settings.cpus), ("GPU", settings.gpus)):
        needed = settings.replicas * each
        if needed > there.get(kind, 0):
            raise ConfigError(
                f"{settings.replicas} replica(s) of {each:g} {kind} need {needed:g}, the cluster has"
                f" {there.get(kind, 0):g}: fewer --replicas, or less of --cpus or --gpus each"
            )


def _wait_for(host: str, port: int, seconds: float = 30.0) -> None:
    """The proxy learns of the application a moment after Ray Serve says that it runs."""
    until = time.monotonic() + seconds
    answer = "nothing"
    while time.monotonic() < until:
        connection = http.client.HTTPConnection(host, port, timeout=seconds)
        try:
            connection.request("GET", "/health")
            response = connection.getresponse()
            answer = f"{response.status} {response.read(200).decode(errors='replace')}"
            if response.status == 200:
                return
        except OSError as error:
            answer = f"{error}"
        finally:
            connection.close()
        time.sleep(0.2)
    raise ConfigError(
        f"{host}:{port} answers {answer}: on a cluster, Ray Serve may be running with another host or port already"
        " (see serve status), which a second start cannot change"
    )
