"""Serve a trained detector over HTTP: detections as JSON, and a page to try it in a browser.

    python -m jobs.serve runs/mine                             http://127.0.0.1:8000, until Ctrl-C
    python -m jobs.serve models:/shapes@champion --replicas 2 --threshold 0.3
    ray job submit --working-dir . -- python -m jobs.serve s3://bucket/exported --host 0.0.0.0

POST /detect takes a form with files named image, JSON {"images": [base64, ...]} or one picture as the body; threshold and
max_detections stand beside them or in the query. GET /health, /metrics (Prometheus), /model, and / for the page. Only this
machine is listened to unless --host says otherwise: there are no passwords and no TLS.
"""

import argparse
import ipaddress
import os
import signal
import threading
from types import FrameType

import torch

from dfine_core.inference import DEFAULT_THRESHOLD
from jobs.command import location, user_errors
from pipeline.config import ConfigError
from pipeline.config_files import check
from pipeline.open_detector import open_detector
from pipeline.serve.deployment import start, stop
from pipeline.serve.replica import ServeSettings


@user_errors()
def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    settings = settings_of(args)
    if args.detach and not os.environ.get("RAY_ADDRESS"):
        raise ConfigError("--detach leaves the server on a cluster: set RAY_ADDRESS, or leave it out")
    trained = open_detector(settings.source)  # a wrong path fails before anything starts
    print(f"{trained.origin}: {len(trained.names)} classes, starting", flush=True)
    del trained
    serve(settings, args.host, args.port, detach=args.detach)


def serve(settings: ServeSettings, host: str, port: int, *, detach: bool) -> None:
    try:
        url = start(settings, host=host, port=port)
    except BaseException:
        stop()
        raise
    warn_of_strangers(host)
    print(f"serving at {url}\n  curl -F image=@picture.jpg {url}/detect", flush=True)
    if not detach:
        wait_for_the_end()
        stop()


def settings_of(args: argparse.Namespace) -> ServeSettings:
    """Raises: ConfigError, naming each value that cannot be."""
    given = {name: getattr(args, name) for name in ServeSettings.model_fields if getattr(args, name, None) is not None}
    joins = bool(os.environ.get("RAY_ADDRESS"))
    gpus = given.setdefault("gpus", 0.0 if joins or not torch.cuda.is_available() else 1.0)
    if not joins and not gpus:
        given.setdefault("cpus", max(1, (os.cpu_count() or 1) // max(1, args.replicas)))
    return check(ServeSettings, given, source="jobs.serve")


def warn_of_strangers(host: str) -> None:
    try:
        local = ipaddress.ip_address(host).is_loopback
    except ValueError:
        local = host == "localhost"
    if not local:
        print(
            f"warning: {host} lets others in, without password or encryption; put a proxy with both before it",
            flush=True,
        )


def wait_for_the_end() -> None:
    """Until Ctrl-C or SIGTERM, which a job's stop sends."""
    ended = threading.Event()

    def end(number: int, frame: FrameType | None) -> None:
        ended.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end)
    while not ended.wait(1.0):
        pass
    print("stopping", flush=True)


def port(text: str) -> int:
    """The type of --port."""
    if not 0 < (number := int(text)) < 2**16:
        raise argparse.ArgumentTypeError(f"{number} is not in 1..65535")
    return number


def parser() -> argparse.ArgumentParser:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument(
        "source", type=location, metavar="MODEL", help="checkpoint, run or exported folder, runs:/, models:/ or .pth"
    )
    arguments.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 for all")
    arguments.add_argument("--port", type=port, default=8000)
    arguments.add_argument("--replicas", type=int, default=1, help="copies of the detector")
    arguments.add_argument("--cpus", type=float, help="of each replica; on this machine its share of all unless given")
    arguments.add_argument(
        "--gpus", type=float, help="of each replica; on this machine 1 if there is one, on a cluster 0"
    )
    arguments.add_argument(
        "--threshold", type=float, help=f"least score, where a request names none ({DEFAULT_THRESHOLD})"
    )
    arguments.add_argument("--batch", dest="batch_size", type=int, help="images at once (8)")
    arguments.add_argument("--timeout-s", type=float, help="of a request (30)")
    arguments.add_argument("--max-waiting", type=int, help="requests in a replica before it says 503 (32)")
    arguments.add_argument("--max-megabytes", type=float, help="of a request (20)")
    arguments.add_argument("--max-images", type=int, help="of a request (16)")
    arguments.add_argument("--max-megapixels", type=float, help="of a request, all images together (50)")
    arguments.add_argument("--detach", action="store_true", help="on a cluster: end here and let it serve on")
    return arguments


if __name__ == "__main__":
    main()
