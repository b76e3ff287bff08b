"""Finds the lines of pbe, DeepSpeed or diffusers that make the CPU wait for the device."""

import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pbe.places import repo_root

READS = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal")
ROOMS = (f"{repo_root()}/pbe/", "/deepspeed/", "/diffusers/", "/transformers/")


@contextmanager
def stops(device: torch.device) -> Iterator[Counter[str]]:
    """Counts the waits within the block, by place.

    On a GPU: what torch's sync debug mode reports, and explicit synchronisation of device, streams and events. As a
    rehearsal on a CPU, where nothing waits: every read of a tensor's value, and the device's `synchronize`.
    """
    seen: Counter[str] = Counter()

    def note(*_: Any, **__: Any) -> None:
        seen[_place()] += 1

    def warned(message: Any, *_: Any, **__: Any) -> None:
        if "synchronizing CUDA operation" in str(message):
            note()

    if device.type == "cpu":
        from deepspeed.accelerator import get_accelerator

        with patch.object(get_accelerator(), "synchronize", note), _Reads(note):
            yield seen
        return
    with _explicit(note), warnings.catch_warnings(), patch.object(warnings, "showwarning", warned):
        warnings.filterwarnings("always", message=".*synchronizing CUDA operation.*")
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield seen
        finally:
            torch.cuda.set_sync_debug_mode(before)


class _Reads(TorchDispatchMode):
    def __init__(self, note: Any) -> None:
        super().__init__()
        self._note = note

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in READS:
            self._note()
        return func(*args, **(kwargs or {}))


@contextmanager
def _explicit(note: Any) -> Iterator[None]:
    """Records every call of a method that waits, and passes it on."""
    with (
        patch.object(torch.cuda, "synchronize", _noting(torch.cuda.synchronize, note)),
        patch.object(torch.cuda.Stream, "synchronize", _noting(torch.cuda.Stream.synchronize, note)),
        patch.object(torch.cuda.Event, "synchronize", _noting(torch.cuda.Event.synchronize, note)),
    ):
        yield


def _noting(function: Any, note: Any) -> Any:
    def noted(*args: Any, **kwargs: Any) -> Any:
        note()
        return function(*args, **kwargs)

    return noted


def _place() -> str:
    """The innermost frame in one of the ROOMS, as file:line."""
    for frame in reversed(traceback.extract_stack()):
        room = next((room for room in ROOMS if room in frame.filename), None)
        if room is not None:
            return f"{Path(room).name}/{frame.filename.rpartition(room)[2]}:{frame.lineno}"
    return "elsewhere"


class _EnoughStepsError(Exception):
    """Ends a training from inside once enough has been recorded."""


def stops_of_steps(device: torch.device, spec: Any, *, skip: int = 2, steps: int = 4) -> list[Counter[str]]:
    """The waits in each of `steps` steps of `train_worker` after the first `skip`; none of them logs or saves."""
    from pbe.train import worker

    by_step: list[Counter[str]] = []
    learning_rate = worker.learning_rate

    def at_each_step(cfg: Any, step: int) -> float:  # the loop calls it once, at the start of a step
        by_step.append(Counter(seen))
        if len(by_step) > skip + steps:
            raise _EnoughStepsError
        return learning_rate(cfg, step)

    with stops(device) as seen, patch.object(worker, "learning_rate", at_each_step), suppress(_EnoughStepsError):
        worker.train_worker(spec, device)
    return [after - before for before, after in pairwise(by_step[skip:])]
