"""Prepares training input in processes of its own: a thread shares Python's lock with the training loop.

One thread prepares some thousand rows a second and delays the loop meanwhile; a GPU takes more. torch's DataLoader
starts the processes, moves tensors through shared memory and keeps the order.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

from torch.utils.data import DataLoader, IterableDataset, get_worker_info

T = TypeVar("T")
AHEAD = 2  # items that each process prepares ahead


@dataclass(frozen=True)
class Turn:
    """Of an iterator's items, number `first`, first + of, first + 2 of, ..."""

    first: int = 0
    of: int = 1


def in_processes(make: Callable[..., Iterator[T]], count: int) -> Iterator[T]:
    """The items of `make()` in their order, made by `count` processes that take turns.

    make: called as make(turn=...), it gives the items of that turn; it is pickled. Its errors are raised here as they are. Closing the iterator ends the processes.
    """
    # spawned: in a fork of a process with threads, a GPU or an S3 client, a lock may never be released
    loader = DataLoader(
        _Turns(make), batch_size=None, num_workers=count, prefetch_factor=AHEAD, multiprocessing_context="spawn"
    )
    for item in loader:
        if isinstance(item, BaseException):
            raise item
        yield item


class _Turns(IterableDataset[T | Exception], Generic[T]):
    def __init__(self, make: Callable[..., Iterator[T]]) -> None:
        self._make = make

    def __iter__(self) -> Iterator[T | Exception]:
        worker = get_worker_info()
        assert worker is not None
        try:
            yield from self._make(turn=Turn(worker.id, worker.num_workers))
        except Exception as error:  # as an item: DataLoader would put its traceback into the message
            yield error
