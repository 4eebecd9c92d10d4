"""Batch images of concurrent requests, without waiting for more of them."""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from typing import Generic, TypeVar

In = TypeVar("In")
Out = TypeVar("Out")


class Batcher(Generic[In, Out]):
    """Run everything that is queued when the worker becomes free as one batch; an idle worker starts at once.

    There is no timer: batches grow exactly as far as the load exceeds the throughput.

    Args:
        work: processes one batch in `executor`, and returns its results in order.
        max_batch_size: items per batch.
    """

    def __init__(self, work: Callable[[Sequence[In]], Sequence[Out]], max_batch_size: int, executor: Executor) -> None:
        self._work, self._max_batch_size, self._executor = work, max_batch_size, executor
        self._queue: deque[tuple[In, asyncio.Future[Out]]] = deque()
        self._worker: asyncio.Task[None] | None = None

    async def __call__(self, items: Sequence[In]) -> list[Out]:
        """Process items; raises the exception of `work` if a batch with one of them failed."""
        loop = asyncio.get_running_loop()
        futures = [loop.create_future() for _ in items]
        self._queue.extend(zip(items, futures, strict=True))
        if self._worker is None:
            self._worker = loop.create_task(self._drain())
        try:
            return await asyncio.gather(*futures)
        finally:  # the items of a cancelled caller are removed from later batches
            for future in futures:
                future.cancel()

    async def _drain(self) -> None:
        while batch := self._next_batch():
            items, futures = zip(*batch, strict=True)
            try:
                results = await asyncio.get_running_loop().run_in_executor(self._executor, self._work, items)
            except Exception as error:  # noqa: BLE001 - the failure belongs to the requests of the batch
                for future in futures:
                    if not future.done():
                        future.set_exception(error)
                continue
            for future, result in zip(futures, results, strict=True):
                if not future.done():
                    future.set_result(result)
        self._worker = None

    def _next_batch(self) -> list[tuple[In, "asyncio.Future[Out]"]]:
        batch: list[tuple[In, asyncio.Future[Out]]] = []
        while self._queue and len(batch) < self._max_batch_size:
            item, future = self._queue.popleft()
            if not future.done():
                batch.append((item, future))
        return batch
