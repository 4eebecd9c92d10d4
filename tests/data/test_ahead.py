"""Items made in advance by a thread."""

import threading
import time
from collections.abc import Iterator

import pytest

from pipeline.data.stream.ahead import ahead
from tests.support.processes import wait_until


def test_items_keep_their_order_and_are_made_before_they_are_asked_for() -> None:
    made: list[int] = []

    def items() -> Iterator[int]:
        for item in range(20):
            made.append(item)
            yield item

    taken = ahead(items(), 3)
    wait_until(lambda: len(made) == 4)  # three wait in the queue, one to enter it
    time.sleep(0.2)
    assert made == [0, 1, 2, 3]
    assert list(taken) == list(range(20))


def test_an_error_comes_after_the_items_before_it() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise ValueError("broken")

    taken = ahead(items(), 4)
    assert next(taken) == 1
    with pytest.raises(ValueError, match="broken"):
        next(taken)


@pytest.mark.parametrize("used", [0, 1, 3])
def test_the_thread_ends_with_its_consumer(used: int) -> None:
    before = set(threading.enumerate())
    taken = ahead(iter(range(1000)), 2)
    assert [next(taken) for _ in range(used)] == list(range(used))
    assert set(threading.enumerate()) - before
    del taken
    wait_until(lambda: not set(threading.enumerate()) - before)
