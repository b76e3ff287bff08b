"""Prepares training input in processes of its own: a thread shares Python's lock with the training loop.

One thread prepares some thousand rows a second and delays the loop meanwhile; a GPU takes more. torch's DataLoader
starts the processes, moves tensors through shared memory and keeps the order.
"""

import atexit
import multiprocessing
import os
import pickle
import threading
import traceback
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from pbe.errors import UserError, one_line

T = TypeVar("T")
AHEAD = 2  # items that each process prepares ahead


class InputProcessError(UserError, RuntimeError):
    """A process that prepares training input was ended from outside."""


@dataclass(frozen=True)
class Turn:
    """Of an iterator's items, number `first`, first + of, first + 2 of, ..."""

    first: int = 0
    of: int = 1


def in_processes(make: Callable[..., Iterator[T]], count: int) -> Generator[T, None, None]:
    """The items of `make()` in their order, made by `count` processes that take turns; there is no end to them.

    make: called as make(turn=...), it gives the items of that turn; it is pickled. Its errors are raised here as they
    are. Closing the iterator ends the processes. Raises InputProcessError if one is killed.
    """
    # spawned: in a fork of a process with threads, a GPU or an S3 client, a lock may never be released
    loader: DataLoader[Any] = DataLoader(
        _Turns(make),
        batch_size=None,
        num_workers=count,
        prefetch_factor=AHEAD,
        multiprocessing_context="spawn",
        worker_init_fn=_end_well,
        generator=torch.Generator(),  # else it draws a seed from the global one
    )
    items = iter(loader)
    try:
        while True:
            killed = ""
            try:
                item = next(items)
            except RuntimeError as error:  # DataLoader's only news of a process that died
                killed = one_line(error, 100)
            if killed:  # raised here, since a traceback with DataLoader's frames would keep its processes
                raise InputProcessError(
                    f"a process of train.input_processes was killed ({killed}), by the kernel if memory was short "
                    "(`dmesg` says so) or /dev/shm full; lower train.input_processes, or give the container a larger "
                    "--shm-size"
                )
            if isinstance(item, _Failure):
                raise item.error
            yield item
    finally:
        del items  # ends the processes, although a traceback may keep this frame


@dataclass(frozen=True)
class _Failure:
    error: Exception


class _Turns(IterableDataset[Any]):
    def __init__(self, make: Callable[..., Iterator[Any]]) -> None:
        self._make = pickle.dumps(make)  # loaded below, where an error can be told

    def __iter__(self) -> Iterator[Any]:
        """The items; after an error that error, without end: DataLoader would go on without this process's turns."""
        worker = get_worker_info()
        assert worker is not None
        try:
            yield from pickle.loads(self._make)(turn=Turn(worker.id, worker.num_workers))
            raise EOFError("the input of training has ended")
        except Exception as error:  # as an item: DataLoader would put its traceback into the message
            failure = _Failure(_portable(error))
        while True:
            yield failure


def _portable(error: Exception) -> Exception:
    """The error as it can be pickled, with its traceback unless it is the user's."""
    try:
        error = pickle.loads(pickle.dumps(error))
    except Exception:  # whatever a foreign class does
        return RuntimeError("".join(traceback.format_exception(error)))
    if not isinstance(error, UserError):
        error.add_note(traceback.format_exc())
    return error


def _end_well(_: int) -> None:
    """In a new process: make it end with the training process, and in silence.

    Once the training process is gone, DataLoader's would wait for ever on a full pipe. At its own end, Python would
    stop the thread that fills the pipe amid C++ code, which prints "terminate called without an active exception".
    """
    atexit.register(os._exit, 0)

    def watch() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="pbe-parent").start()
