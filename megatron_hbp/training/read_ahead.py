"""Prepare the next items of an iterator in a thread, while the consumer works on the current one.

    items ──thread──> at most `depth` ready ──__next__──> consumer

Cutting one rank's slice out of a pack of 128K tokens and splitting its attention takes 3 to 11 ms of CPU (16K: 0.5 ms),
reading from a cold disk more. The thread shares the interpreter's lock with the consumer; numpy's copies, page faults
and pinning release it.
"""

import threading
import time
import weakref
from collections.abc import Callable, Iterator
from queue import SimpleQueue
from typing import Any


class ReadAhead[T]:
    """An iterator over `items` whose next `depth` items are made in a thread.

    An exception in `items` reaches the consumer in its turn, with the traceback of the thread. The thread starts with
    the first `__next__`, ends with the items, and is stopped by `close`, when the object is collected and at exit.
    """

    def __init__(self, items: Iterator[T], depth: int, *, prepare_thread: Callable[[], None] | None = None):
        """`prepare_thread` is called first in the thread (a CUDA device is set for each thread by itself)."""
        assert depth > 0
        self.waited = 0.0
        """Seconds that the consumer has spent waiting for items."""
        self._ready: SimpleQueue[tuple[T | None, BaseException | None]] = SimpleQueue()
        self._room = threading.Semaphore(depth)
        self._stop = threading.Event()
        self._ended: BaseException | None = None
        # the thread knows the queue and not this object, which is collected when nobody else holds it, and stops it
        arguments = (items, self._ready, self._room, self._stop, prepare_thread)
        # a daemon, because the interpreter joins all others before it runs what is to be done at exit
        self._thread = threading.Thread(target=_fill, args=arguments, name="hbp-read-ahead", daemon=True)
        self._finalizer = weakref.finalize(self, _stopped, self._thread, self._room, self._stop)

    def __iter__(self) -> "ReadAhead[T]":
        """An iterator."""
        return self

    def __next__(self) -> T:
        """The next item, in the order of `items`."""
        if self._ended is not None:
            raise StopIteration if isinstance(self._ended, StopIteration) else self._ended
        if self._thread.ident is None:
            self._thread.start()
        started = time.perf_counter()
        item, error = self._ready.get()
        self.waited += time.perf_counter() - started
        if error is not None:
            self._ended = error
            raise error
        self._room.release()  # the item is the consumer's: room for another one
        return item  # type: ignore[return-value]

    def close(self) -> None:
        """Stop the thread and wait for it."""
        self._ended = self._ended or StopIteration()
        self._finalizer()


def _fill(
    items: Iterator[Any],
    ready: "SimpleQueue[tuple[Any, BaseException | None]]",
    room: threading.Semaphore,
    stop: threading.Event,
    prepare_thread: Callable[[], None] | None,
) -> None:
    try:
        if prepare_thread is not None:
            prepare_thread()
        while True:
            room.acquire()
            if stop.is_set():
                return
            ready.put((next(items), None))
    except BaseException as error:  # StopIteration too: the consumer is told the end in its turn
        ready.put((None, error))


def _stopped(thread: threading.Thread, room: threading.Semaphore, stop: threading.Event) -> None:
    stop.set()
    room.release()
    if thread.ident is not None and thread is not threading.current_thread():
        thread.join(timeout=5)  # a read that hangs must not keep the program from ending
