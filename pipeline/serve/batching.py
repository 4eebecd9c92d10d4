"""Images of many requests through the detector together, without waiting for company."""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from typing import Generic, TypeVar

In = TypeVar("In")
Out = TypeVar("Out")


class Batcher(Generic[In, Out]):
    """Whatever waits when the worker is free goes together; the first of an idle time goes at once, alone.

    So nothing ever waits for a clock, and batches grow exactly as far as there is more to do than is done.

    Args:
        work: called in `executor`, one batch at a time; answers in order.
        size: of the largest batch.
    """

    def __init__(self, work: Callable[[Sequence[In]], Sequence[Out]], size: int, executor: Executor) -> None:
        self._work, self._size, self._executor = work, size, executor
        self._waiting: deque[tuple[In, asyncio.Future[Out]]] = deque()
        self._worker: asyncio.Task[None] | None = None

    async def __call__(self, items: Sequence[In]) -> list[Out]:
        """Raises: what `work` raised for a batch with one of the items in it."""
        loop = asyncio.get_running_loop()
        futures = [loop.create_future() for _ in items]
        self._waiting.extend(zip(items, futures, strict=True))
        if self._worker is None:
            self._worker = loop.create_task(self._empty())
        try:
            return await asyncio.gather(*futures)
        finally:  # a caller that gave up takes its items out of later batches
            for future in futures:
                future.cancel()

    async def _empty(self) -> None:
        while batch := self._next():
            items, futures = zip(*batch, strict=True)
            try:
                results = await asyncio.get_running_loop().run_in_executor(self._executor, self._work, items)
            except Exception as error:
                for future in futures:
                    if not future.done():
                        future.set_exception(error)
                continue
            for future, result in zip(futures, results, strict=True):
                if not future.done():
                    future.set_result(result)
        self._worker = None

    def _next(self) -> list[tuple[In, "asyncio.Future[Out]"]]:
        batch: list[tuple[In, asyncio.Future[Out]]] = []
        while self._waiting and len(batch) < self._size:
            item, future = self._waiting.popleft()
            if not future.done():
                batch.append((item, future))
        return batch
