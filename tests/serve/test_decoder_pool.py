"""Decoder processes: the same pixels as without them, bounded time, and a new process after the end of one."""

import asyncio
import os
import signal
import time
from collections.abc import Iterator

import numpy as np
import pytest

from dfine_core.images import read_image, stretch_image
from pipeline.serve.decoder_pool import STUCK_GRACE_S, DecoderPool
from pipeline.serve.decoding import DecodedImage, DecodingJob, EncodedImage
from pipeline.serve.request_error import RequestError
from tests.support.image_bombs import bmp_runs, jpeg, png

SLOW = bmp_runs(8_000, 8_000, b"\1\0\0\0" * 8_000)  # within every limit, and some seconds of work


@pytest.fixture
def pool() -> Iterator[DecoderPool]:
    pool = DecoderPool(1, limit_s=1.0)
    yield pool
    pool.close()


def decode(pool: DecoderPool, *contents: bytes) -> list[DecodedImage]:
    images = tuple(EncodedImage(f"images[{n}]", content) for n, content in enumerate(contents))
    return asyncio.run(pool.decode(DecodingJob(images, 80_000_000, (40, 60))))


def test_pixels_and_refusals_are_those_of_a_direct_call(pool: DecoderPool) -> None:
    first, second = decode(pool, jpeg(90, 70), png(30, 200))
    assert (first.size, second.size) == ((90, 70), (30, 200))
    for image, content in ((first, jpeg(90, 70)), (second, png(30, 200))):
        assert np.array_equal(image.pixels, stretch_image(read_image(content), (40, 60)))
    for content, status in ((b"hello", 415), (jpeg()[:-300], 422), (png(80_000_001, 1), 413)):
        with pytest.raises(RequestError) as refused:
            decode(pool, jpeg(), content)
        assert (refused.value.status, refused.value.field) == (status, "images[1]")


def test_an_image_that_takes_too_long_is_refused_and_its_process_is_gone(pool: DecoderPool) -> None:
    decode(pool, jpeg())
    (before,) = pool.process_ids()
    started_at = time.monotonic()
    with pytest.raises(RequestError, match="not decoded within 1 s") as refused:
        decode(pool, SLOW)
    assert refused.value.status == 422
    assert time.monotonic() - started_at < 10
    with pytest.raises(ProcessLookupError):
        os.kill(before, 0)
    assert len(decode(pool, jpeg())) == 1
    assert pool.process_ids() != [before]


def test_a_process_that_ends_is_replaced(pool: DecoderPool) -> None:
    async def killed_in_the_middle() -> None:
        job = asyncio.create_task(pool.decode(DecodingJob((EncodedImage("body", SLOW),), 80_000_000, (40, 60))))
        await asyncio.sleep(0.5)
        os.kill(pool.process_ids()[0], signal.SIGKILL)
        await job

    decode(pool, jpeg())
    with pytest.raises(RequestError, match="retry later") as refused:
        asyncio.run(killed_in_the_middle())
    assert (refused.value.status, refused.value.retry_after_s) == (503, 1)
    os.kill(pool.process_ids()[0], signal.SIGKILL)  # while idle
    time.sleep(0.3)
    assert len(decode(pool, jpeg())) == 1


def test_a_pool_is_stuck_while_all_its_processes_are() -> None:
    pool = DecoderPool(1, limit_s=0.5)
    try:
        os.kill(pool.process_ids()[0], signal.SIGSTOP)  # while it imports, which is given more time

        async def scenario() -> None:
            job = asyncio.create_task(pool.decode(DecodingJob((EncodedImage("body", jpeg()),), 10_000, (40, 60))))
            await asyncio.sleep(0.1)
            assert not pool.stuck()
            await asyncio.sleep(0.5 + STUCK_GRACE_S)
            assert pool.stuck()
            os.kill(pool.process_ids()[0], signal.SIGCONT)
            assert len(await job) == 1

        asyncio.run(scenario())
        assert not pool.stuck()
    finally:
        pool.close()


def test_decoders_end_with_their_server() -> None:
    pool = DecoderPool(2)
    processes = [decoder.process for decoder in pool._decoders]
    for decoder in pool._decoders:
        decoder._wait_until_ready()
        decoder._connection.close()
    assert [process.wait(10) for process in processes] == [0, 0]
