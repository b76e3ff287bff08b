"""A thread that prepares training input ahead of time."""

import queue
import threading
from collections.abc import Iterator
from typing import Generic, TypeVar

import torch

T = TypeVar("T")


class Prefetched(Generic[T]):
    """Runs an iterator in a thread, at most `depth` items ahead; `next` raises its errors."""

    def __init__(self, items: Iterator[T], depth: int) -> None:
        self._queue: queue.Queue[T | BaseException] = queue.Queue(depth)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._fill, args=(items,), daemon=True, name="pbe-prefetch")
        self._started, thread_count = threading.Event(), torch.get_num_threads()
        self._thread.start()
        self._started.wait()
        torch.set_num_threads(thread_count)  # its 1 became the default of threads to come

    def _fill(self, items: Iterator[T]) -> None:
        torch.set_num_threads(1)  # with more, this thread's OpenMP team spins on the cores of the training thread's
        self._started.set()
        try:
            for item in items:
                if not self._put(item):
                    return
            self._put(StopIteration())
        except BaseException as error:  # next() raises it
            self._put(error)

    def _put(self, item: T | BaseException) -> bool:
        while not self._stop.is_set():
            try:
                self._queue.put(item, timeout=0.2)
            except queue.Full:
                continue
            return True
        return False

    def next(self) -> T:
        item = self._queue.get()
        if isinstance(item, BaseException):
            raise item
        return item

    def close(self) -> None:
        self._stop.set()
        self._thread.join(timeout=10)
