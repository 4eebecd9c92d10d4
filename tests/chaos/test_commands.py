"""Prepare, predict, export and serve under blows at random moments: the files and answers of an undisturbed command."""

import hashlib
import http.client
import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from tests.support.chaos import PATIENCE_SECONDS, Blow, Command, Disturbance, chaos_seed, draw, report_landed, send
from tests.support.processes import descendants, free_port
from tests.support.small_detectors import small_detector
from tests.support.synthetic_shards import synthetic_records

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
ROOT = Path(__file__).parents[2]
IMAGES = 48
ROUNDS = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A detector, and images with annotations in COCO's format."""
    folder = tmp_path_factory.mktemp("commands")
    small_detector().save(folder / "detector")
    (folder / "images").mkdir()
    records = synthetic_records(IMAGES, longest_side=64)
    for number, record in enumerate(records):
        (folder / "images" / f"{number:03d}.jpg").write_bytes(record.image)
    images = [
        {"id": n + 1, "file_name": f"{n:03d}.jpg", "width": r.width, "height": r.height} for n, r in enumerate(records)
    ]
    box = {"category_id": 1, "bbox": [4.0, 4.0, 20.0, 16.0], "area": 320.0, "iscrowd": 0}
    annotations = [{**box, "id": n + 1, "image_id": n + 1} for n in range(IMAGES)]
    coco = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "box"}]}
    (folder / "instances.json").write_text(json.dumps(coco))
    return folder


def command(folder: Path, module: str, arguments: list[str], out: Path, count: Callable[[], int]) -> Command:
    """A command that writes files into `out`; its moments are its begin and one more file that `count` sees."""
    return Command(
        words=[sys.executable, "-m", f"jobs.{module}", *arguments, "--out", str(out)],
        folder=ROOT,
        log=folder / f"{out.name}.log",
        progress=count,
        moments={"begin": lambda _: True, "file": lambda attempt: count() > attempt.progress_before},
        targets={"raylet": raylets},
    )


def raylets(pid: int) -> list[int]:
    return [p for p, title in descendants(pid).items() if "/raylet/raylet" in title.split(" ")[0]]


def contents(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files
    timeless = {path: re.sub(rb'"seconds": [0-9.]+', b"", path.read_bytes()) for path in files}
    return {str(path.relative_to(folder)): hashlib.sha256(content).hexdigest() for path, content in timeless.items()}


def check(
    make: Callable[[str], Command],
    out: Path,
    plan: list[Disturbance],
    record_property: Callable[[str, object], None],
    *,
    least: int,
) -> None:
    """Run a command undisturbed and under a plan, and compare every file.

    Args:
        plan: with delays in shares of the undisturbed run's seconds. What comes too late is left to another run, in a new folder.
        least: number of disturbances that must have met the command.
    """
    started_at = time.monotonic()
    make("whole").run([])
    seconds = time.monotonic() - started_at
    plan = [replace(disturbance, delay_s=disturbance.delay_s * seconds) for disturbance in plan]
    landed: list[Disturbance] = []
    for number in range(ROUNDS):
        disturbed = make(f"disturbed-{number}")
        disturbed.run(plan[len(landed) :])
        landed += disturbed.landed
        assert contents(out / f"disturbed-{number}") == contents(out / "whole")
        if len(landed) >= least:
            break
    report_landed(landed, record_property, least=least)


def test_a_prediction_under_blows_has_the_files_of_an_undisturbed_one(
    folder: Path, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    def make(name: str) -> Command:
        out = tmp_path / name
        arguments = [
            str(folder / "detector"),
            str(folder / "images"),
            "--part-size",
            "1",
            "--json",
            "--num-images",
            "2",
            "--precision",  # auto is chosen by a measured time, and another choice differs in the last digits
            "fp32",
        ]
        return command(folder, "predict", arguments, out, lambda: len(list((out / "parts").glob("*.parquet"))))

    moments = ("begin", "file", "file", "file", "file", "begin")
    check(
        make,
        tmp_path,
        draw(chaos_seed(), moments, longest_delays={"begin": 0.6, "file": 0.02}),
        record_property,
        least=4,
    )


def test_a_prepare_under_blows_makes_the_set_of_an_undisturbed_one(
    folder: Path, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    def make(name: str) -> Command:
        out = tmp_path / name
        arguments = ["coco", "--images", str(folder / "images"), "--annotations", str(folder / "instances.json")]
        arguments += ["--split", "train", "--shard-mib", "0.005"]
        return command(folder, "prepare", arguments, out, lambda: len(list(out.glob(".prepare/shard-*.json"))))

    targets = ("command", "machine", "machine", "raylet")
    plan = draw(
        chaos_seed() + 1,
        ("begin", "file", "file", "begin"),
        longest_delays={"begin": 0.6, "file": 0.02},
        blows=("kill", "kill", "term", "freeze"),
        targets=targets,
    )
    check(make, tmp_path, plan, record_property, least=3)


def test_an_export_under_blows_has_the_files_of_an_undisturbed_one(
    folder: Path, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    def make(name: str) -> Command:
        out = tmp_path / name
        arguments = [str(folder / "detector"), "--to", "released", "safetensors", "--num-images", "3"]
        return command(folder, "export", arguments, out, lambda: sum(1 for path in out.rglob("*") if path.is_file()))

    moments = ("begin", "file", "file", "begin", "file")
    check(
        make,
        tmp_path,
        draw(chaos_seed() + 2, moments, longest_delays={"begin": 0.6, "file": 0.02}),
        record_property,
        least=3,
    )


# Serving


@pytest.fixture
def server(folder: Path, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    port, log = free_port(), tmp_path / "log"
    words = [sys.executable, "-m", "jobs.serve", str(folder / "detector"), "--port", str(port), "--replicas", "2"]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [*words, "--cpus", "0.5"],
            cwd=ROOT,
            env={**environment, "RAY_TMPDIR": "/tmp"},
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    below: dict[int, str] = {}
    try:
        until = time.monotonic() + PATIENCE_SECONDS
        while "serving at" not in log.read_text():
            assert process.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < until, log.read_text()[-3000:]
            time.sleep(0.2)
        below = descendants(process.pid)
        yield process, port
        below |= descendants(process.pid)
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 0, log.read_text()[-3000:]
    finally:
        send([*below, process.pid] if process.poll() is None else [*below], signal.SIGKILL)


def detect(port: int, image: bytes) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request("POST", "/detect", image, {"Content-Type": "image/png"})
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def test_a_server_whose_replicas_are_killed_and_stopped_answers_as_before(
    server: tuple[subprocess.Popen[bytes], int], record_property: Callable[[str, object], None]
) -> None:
    process, port = server
    written = io.BytesIO()
    Image.new("RGB", (60, 50), (200, 30, 90)).save(written, "PNG")
    image = written.getvalue()
    status, expected = detect(port, image)
    assert status == 200

    def replicas() -> list[int]:
        titles = descendants(process.pid)
        return [
            p for p in sorted(titles) if titles[p].startswith("ray::ServeReplica") and "Aggregator" not in titles[p]
        ]

    drawn = random.Random(chaos_seed() + 3)
    blows: list[Blow] = ["kill", "pause", "kill"]
    landed: list[Disturbance] = []
    for blow in drawn.sample(blows, 3):
        assert len(replicas()) == 2
        hit = drawn.choice(replicas())
        assert send([hit], signal.SIGKILL if blow == "kill" else signal.SIGSTOP)
        landed.append(Disturbance("answers", 0.0, blow, "replica"))
        answers = [detect(port, image) for _ in range(4)] if blow == "kill" else []
        if blow == "pause":
            time.sleep(drawn.uniform(0.5, 3))
            send([hit], signal.SIGCONT)
        assert {status for status, _ in answers} <= {200, 503}, answers
        assert {body for status, body in answers if status == 200} <= {expected}
        until = time.monotonic() + PATIENCE_SECONDS
        while len(replicas()) < 2 or detect(port, image) != (200, expected):
            assert time.monotonic() < until, "no second replica came back"
            time.sleep(0.5)
    report_landed(landed, record_property, least=3)
