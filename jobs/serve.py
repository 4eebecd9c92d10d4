"""Serve a detector over HTTP: detections as JSON, and a page to try it in a browser.

    dfine serve runs/mine                              http://127.0.0.1:8000, until Ctrl-C
    dfine serve models:/shapes@champion --replicas 2 --threshold 0.3
    ray job submit --working-dir . -- python -m jobs.serve s3://bucket/exported --host 0.0.0.0

POST /detect takes a form with files named image, JSON {"images": [base64, ...]}, or one image as the body; threshold,
max_detections, coverage and joint are further fields, or part of the query. GET /health, /metrics (Prometheus), /model, and /
for the page. The server listens on this machine alone unless --host names another address: there are no passwords and no TLS.
"""

import argparse
import ipaddress
import signal
import threading
from typing import TYPE_CHECKING

from jobs.command import (
    add_coverage,
    add_precision,
    announce,
    at_least,
    command_parser,
    detector,
    not_negative,
    parsed,
    positive,
    refuse_missing,
    threshold,
    user_errors,
)
from pipeline.ray_job import cluster_address

if TYPE_CHECKING:
    from pipeline.serve.replica import ServeSettings


@user_errors(extra="serve")
def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    args = parsed(parser(), argv)
    refuse_missing(args.source, "detector")
    announce("serve", f"{args.source}: opening the detector …")
    from pipeline.config import ConfigError

    if args.detach and not cluster_address():
        raise ConfigError("--detach leaves the server on a cluster: set RAY_ADDRESS, or leave it out")

    from pipeline.open_detector import open_detector
    from pipeline.pretrained import pinned
    from pipeline.thresholds import refuse_unmeasured, refuse_without_intervals
    from pipeline.wording import plural

    settings = settings_of(args)
    settings = settings.model_copy(update={"source": pinned(settings.source)})  # for replicas that start later
    loaded = open_detector(settings.source, exported=True)  # fails before anything starts if it is no detector
    refuse_unmeasured(loaded, settings.threshold)
    refuse_without_intervals(loaded, settings.coverage, settings.joint)
    print(f"{loaded.origin}: {plural(len(loaded.names), 'class')}, starting", flush=True)
    del loaded
    serve(settings, args.host, args.port, detach=args.detach)


def serve(settings: "ServeSettings", host: str, port: int, *, detach: bool) -> None:
    """Start the server; without `detach`, stop it after Ctrl-C or SIGTERM."""
    from pipeline.serve.deployment import start, stop

    try:
        url = start(settings, host=host, port=port)
    except BaseException:
        stop()
        raise
    warn_if_public(host)
    print(f"serving at {url}\n  curl -F image=@image.jpg {url}/detect", flush=True)
    if not detach:
        wait_for_the_end()
        stop()


def settings_of(args: argparse.Namespace) -> "ServeSettings":
    """Settings of the server: the arguments that were given, and a share of this machine for each replica.

    Raises:
        ConfigError: with every value that is not accepted.
    """
    import torch

    from dfine_core.cpu import available_cores
    from pipeline.config_files import check
    from pipeline.serve.replica import ServeSettings

    given = vars(args) | {"batch": args.batch_size}
    given = {name: value for name in ServeSettings.model_fields if (value := given.get(name)) is not None}
    joins = bool(cluster_address())
    gpus = given.setdefault("gpus", 0.0 if joins or not torch.cuda.is_available() else 1.0)
    if not joins and not gpus:
        given.setdefault("cpus", max(1, available_cores() // args.replicas))
    return check(ServeSettings, given, source="dfine serve")


def warn_if_public(host: str) -> None:
    """Print a warning if other machines can reach the server."""
    try:
        local = ipaddress.ip_address(host).is_loopback
    except ValueError:
        local = host == "localhost"
    if not local:
        print(
            f"warning: {host} is reachable from other machines, without password or encryption; put a proxy with both"
            " before it",
            flush=True,
        )


def wait_for_the_end() -> None:
    """Wait for Ctrl-C, or for SIGTERM, which the stop of a job sends."""
    ended = threading.Event()

    def end(*_: object) -> None:
        ended.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end)
    while not ended.wait(1.0):
        pass
    print("stopping", flush=True)


def port(text: str) -> int:
    """Argument type: port number."""
    if not 0 < (number := int(text)) < 2**16:
        raise argparse.ArgumentTypeError(f"{number} is not in 1..65535")
    return number


def parser() -> argparse.ArgumentParser:
    """Parser of the arguments; values that are not given are those of `ServeSettings`."""
    count = at_least(1)
    arguments = command_parser("serve", __doc__)
    arguments.add_argument(
        "source",
        type=detector,
        metavar="MODEL",
        help="checkpoint, run or exported folder, exported file, runs:/, models:/, .pth, hf://ORG/NAME or published name",
    )
    arguments.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s); 0.0.0.0 for all")
    arguments.add_argument("--port", type=port, default=8000, help="%(default)s")
    arguments.add_argument("--replicas", type=count, default=1, help="copies of the detector (%(default)s)")
    arguments.add_argument("--cpus", type=positive, help="per replica; default: its share of this machine")
    arguments.add_argument(
        "--gpus", type=not_negative, help="per replica; default: 1 if this machine has one, 0 on a cluster"
    )
    arguments.add_argument(
        "--threshold",
        type=threshold,
        help="minimum score for requests that give none; default: by class the best on the validation images, or 0.4"
        "; precision=0.9: by class the score that reached it",
    )
    add_coverage(arguments)
    arguments.add_argument("--batch-size", type=count, metavar="N", help="images per forward pass (8)")
    arguments.add_argument("--timeout-s", type=positive, help="time limit per request (30)")
    arguments.add_argument("--max-waiting", type=count, help="requests per replica; further ones receive 503 (32)")
    arguments.add_argument("--max-megabytes", type=positive, help="size limit per request (20)")
    arguments.add_argument("--max-images", type=count, help="image limit per request (16)")
    arguments.add_argument("--max-megapixels", type=positive, help="limit on all images of a request together (50)")
    add_precision(arguments)
    arguments.add_argument("--detach", action="store_true", help="on a cluster: end here, and leave the server running")
    return arguments


if __name__ == "__main__":
    main()
