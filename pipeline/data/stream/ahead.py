"""An iterator that runs ahead in a thread."""

import queue
import threading
import weakref
from collections.abc import Iterator
from contextlib import suppress
from typing import TypeVar

T = TypeVar("T")

POLL_SECONDS = 0.1  # after which a thread notices that nobody takes its items any more


class _End:
    """Last entry of the queue.

    Args:
        error: that ended the items; None at their regular end.
    """

    def __init__(self, error: BaseException | None) -> None:
        self.error = error


def ahead(items: Iterator[T], count: int) -> Iterator[T]:
    """Yield the same items; a thread makes up to `count` of them in advance, beginning now."""
    ready: queue.Queue[T | _End] = queue.Queue(count)
    stopped = threading.Event()

    def put(entry: T | _End) -> None:
        while not stopped.is_set():
            with suppress(queue.Full):
                ready.put(entry, timeout=POLL_SECONDS)
                return

    def make() -> None:
        try:
            for item in items:
                put(item)
                if stopped.is_set():
                    return
            put(_End(None))
        except BaseException as error:  # noqa: BLE001 - raised again in the consumer's thread
            put(_End(error))

    threading.Thread(target=make, daemon=True, name="ahead").start()

    def taken() -> Iterator[T]:
        while not isinstance(entry := ready.get(), _End):
            yield entry
        if entry.error is not None:
            raise entry.error

    consumer = taken()
    # A `finally` in the generator would not run where it was never asked for an item.
    weakref.finalize(consumer, stopped.set)
    return consumer
