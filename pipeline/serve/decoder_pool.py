"""Processes that decode images, each bounded in time: a process can be killed in the middle of a decoder, a thread cannot."""

import asyncio
import os
import queue
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection

from pipeline.serve.decoding import DecodedImage, DecodingJob, receive_result, send_job
from pipeline.serve.request_error import RequestError

DECODE_LIMIT_S = 10.0  # per request; ordinary images take milliseconds, the largest that are accepted some seconds
START_LIMIT_S = 60.0  # a decoder imports NumPy and Pillow
STUCK_GRACE_S = 2.0  # killing and starting a decoder
PROGRAM = "pipeline.serve.decoding"


class DecoderPool:
    """Fixed number of decoder processes.

    Args:
        count: processes, and jobs at a time.
        limit_s: time per job, after which its process is killed and started again.
    """

    def __init__(self, count: int, limit_s: float = DECODE_LIMIT_S) -> None:
        self._limit_s = limit_s
        self._decoders = [_Decoder() for _ in range(count)]
        self._idle: queue.SimpleQueue[_Decoder] = queue.SimpleQueue()
        for decoder in self._decoders:
            self._idle.put(decoder)
        self._threads = ThreadPoolExecutor(count, "decode")  # each waits for one process

    async def decode(self, job: DecodingJob) -> list[DecodedImage]:
        """Decode the images of a request.

        Raises:
            RequestError: an image is refused or broken, takes too long, or ends its decoder.
        """
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._decode, job)

    def stuck(self) -> bool:
        """Return whether every decoder is busy with one request for longer than the limit."""
        latest = time.monotonic() - self._limit_s - STUCK_GRACE_S
        return all(decoder.busy_since is not None and decoder.busy_since < latest for decoder in self._decoders)

    def process_ids(self) -> list[int]:
        """Ids of the processes."""
        return [decoder.process.pid for decoder in self._decoders]

    def close(self) -> None:
        """End the processes."""
        for decoder in self._decoders:
            decoder.end()

    def _decode(self, job: DecodingJob) -> list[DecodedImage]:
        decoder = self._idle.get()  # never waits: there are as many decoders as threads
        decoder.busy_since = time.monotonic()
        try:
            return decoder.decode(job, self._limit_s)
        finally:
            decoder.busy_since = None
            self._idle.put(decoder)


class _Decoder:
    """One process, replaced after its end."""

    def __init__(self) -> None:
        self.busy_since: float | None = None
        self._start()

    def decode(self, job: DecodingJob, limit_s: float) -> list[DecodedImage]:
        if self.process.poll() is not None:  # ended while idle, by the system for example
            self.end()
            self._start()
        try:
            self._wait_until_ready()
            send_job(self._connection, job, limit_s)
            if not self._connection.poll(limit_s):
                self._replace()
                raise RequestError(
                    422, f"not decoded within {limit_s:g} s: send fewer or smaller images", field=job.images[0].field
                )
            return receive_result(self._connection, job.input_size)
        except (EOFError, OSError):
            ended_by = self._replace()
            if ended_by in ("SIGKILL", "SIGTERM"):  # from outside, not by the image
                raise RequestError(503, "the decoder was stopped, retry later", retry_after_s=1) from None
            message = f"an image ended the program that decodes it ({ended_by}): save it again"
            raise RequestError(422, message, field=job.images[0].field) from None

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        self._connection.close()

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", PROGRAM, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                start_new_session=True,  # Ctrl-C ends the server, which then ends its decoders
            )
        self._connection = Connection(ours.detach())
        self._ready = False

    def _wait_until_ready(self) -> None:
        if not self._ready:
            if not self._connection.poll(START_LIMIT_S):
                self._replace()
                raise RequestError(503, "no decoder starts; see the log of the server", retry_after_s=1)
            self._connection.recv_bytes()
            self._ready = True

    def _replace(self) -> str:
        """Start another process; returns how the old one ended."""
        try:
            code = self.process.wait(0.2)
        except subprocess.TimeoutExpired:
            code = 0
        self.end()
        self._start()
        return signal.Signals(-code).name if code < 0 else f"status {code}"
