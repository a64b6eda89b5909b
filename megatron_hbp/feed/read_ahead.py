"""Prepare the next items of an iterator in a thread, while the consumer works on the current one.

    items --thread--> at most `depth` ready --__next__--> consumer

Cutting one rank's slice out of a pack of 128K tokens and splitting its attention takes 3 to 11 ms of CPU (16K: 0.5 ms),
reading from a cold disk more. The thread shares the interpreter's lock with the consumer; numpy's copies, page faults
and pinning release it.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor


class ReadAhead[T]:
    """An iterator over `items` whose next `depth` items are made in a thread.

    An exception in `items` reaches the consumer in its turn, with the traceback of the thread. The thread starts with
    the first `__next__`; it ends when the object is closed or collected, and at exit, with the item that it is making.
    """

    def __init__(self, items: Iterator[T], depth: int, *, prepare_thread: Callable[[], None] | None = None):
        """`prepare_thread` is called first in the thread (a CUDA device is set for each thread by itself)."""
        assert depth > 0
        self.waited = 0.0
        """Seconds that the consumer has spent waiting for items."""
        self._items, self._depth = items, depth
        self._ready: deque[Future[T]] = deque()
        self._ended: Exception | None = None
        self._pool = ThreadPoolExecutor(1, "hbp-read-ahead", initializer=prepare_thread)

    def __iter__(self) -> "ReadAhead[T]":
        """An iterator."""
        return self

    def __next__(self) -> T:
        """The next item, in the order of `items`."""
        if self._ended is not None:
            raise self._ended
        while len(self._ready) <= self._depth:
            self._ready.append(self._pool.submit(next, self._items))
        started = time.perf_counter()
        try:
            return self._ready.popleft().result()
        except Exception as error:  # StopIteration too: the end comes in its turn, and again
            self._ended = error
            raise
        finally:
            self.waited += time.perf_counter() - started

    def close(self) -> None:
        """Stop the thread and wait for it."""
        self._ended = self._ended or StopIteration()
        self._pool.shutdown(cancel_futures=True)
