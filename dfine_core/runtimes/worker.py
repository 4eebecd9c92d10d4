"""Process that runs one exported file for another process, which survives a runtime's crash, endless loop or hunger for memory.

    python -m dfine_core.runtimes.worker DESCRIPTOR      a connected socket, inherited from the parent

Every message is one JSON object, followed by arrays where it announces them; nothing is unpickled on either side.
"""

import io
import json
import os
import sys
import threading
import time
from collections.abc import Mapping
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dfine_core.runtimes.files import import_opener
from dfine_core.runtimes.program import OpenOptions, Program

ORPHAN_POLL_S = 1.0
WARM_UP_CALLS = 3


def send(connection: Connection, message: Mapping[str, Any], **arrays: NDArray[Any]) -> None:
    """Send a message with arrays."""
    connection.send_bytes(json.dumps({**message, "arrays": bool(arrays)}).encode())
    if arrays:
        packed = io.BytesIO()
        np.savez(packed, **arrays)  # type: ignore[arg-type]
        connection.send_bytes(packed.getvalue())


def receive(connection: Connection) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """Receive a message with its arrays; EOFError if the other side has ended."""
    message: dict[str, Any] = json.loads(connection.recv_bytes())
    if not message["arrays"]:
        return message, {}
    with np.load(io.BytesIO(connection.recv_bytes()), allow_pickle=False) as packed:
        return message, dict(packed)


def serve(connection: Connection) -> None:
    """Open the file that the first message names, then detect or measure until the parent closes the connection."""
    first, _ = receive(connection)
    try:
        program = import_opener(first["opener"])(first["path"], OpenOptions(**first["options"]))
    except Exception as error:  # noqa: BLE001 - a runtime may raise anything
        send(connection, {"failure": one_line(error)})
        return
    facts = {
        "runtime": program.runtime,
        "input_size": program.input_size,
        "batch_size": program.batch_size,
        "description": dict(program.description),
    }
    send(connection, {"failure": None, **facts})
    while True:
        try:
            message, arrays = receive(connection)
        except EOFError:
            return
        try:
            answer = _answer(program, message, arrays)
        except Exception as error:  # noqa: BLE001 - a runtime may raise anything
            send(connection, {"failure": one_line(error)})
        else:
            send(connection, {"failure": None}, **answer)


def _answer(
    program: Program, message: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]
) -> dict[str, NDArray[Any]]:
    if calls := message["calls"]:
        return {"seconds": timed(program, arrays["images"], arrays["sizes"], calls)}
    labels, boxes, scores = program(arrays["images"], arrays["sizes"])
    return {"labels": labels, "boxes": boxes, "scores": scores}


def timed(program: Program, images: NDArray[np.float32], sizes: NDArray[np.int64], calls: int) -> NDArray[np.float64]:
    """Seconds of each call, after a warm-up."""
    placed = program.place(images), program.place(sizes)
    seconds = []
    for number in range(WARM_UP_CALLS + calls):
        started_at = time.perf_counter()
        program.run(*placed)
        program.wait()
        if number >= WARM_UP_CALLS:
            seconds.append(time.perf_counter() - started_at)
    return np.array(seconds)


def one_line(error: BaseException) -> str:
    """Type and first line of an error."""
    first, *_ = [*str(error).strip().splitlines(), "no message"]
    return f"{type(error).__name__}: {first}"


def end_with_parent() -> None:
    """End this process once its parent has ended, even in the middle of a call that never returns."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(ORPHAN_POLL_S)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    end_with_parent()
    serve(Connection(int(sys.argv[1])))
