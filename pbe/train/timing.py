"""Measures where a step's time goes, without synchronizing the device at every step.

On a GPU the CPU runs ahead, so its clock does not measure kernels. There, CUDA events mark the laps and are read when
a window is summed up; `data_s` is then the time in which the device was idle.
"""

import resource
import sys
import time

import torch


class StepTimer:
    """Sums up the time between marks, by name."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._marks: list[tuple[str, float | torch.cuda.Event]] = []

    def start(self) -> None:
        """Start measuring; the time until the next lap belongs to that lap."""
        self._marks.append(("", self._now()))

    def lap(self, name: str) -> None:
        """End a lap: the time since the last mark belongs to `name`."""
        self._marks.append((name, self._now()))

    def take(self) -> dict[str, float]:
        """Seconds by name since the last call. On a GPU it waits for the device."""
        if self._on_gpu:
            torch.cuda.synchronize()
        out: dict[str, float] = {}
        for (_, before), (name, after) in zip(self._marks, self._marks[1:], strict=False):
            if name:
                out[name] = out.get(name, 0.0) + _seconds(before, after)
        self._marks = []
        return out

    def _now(self) -> float | torch.cuda.Event:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _seconds(before: float | torch.cuda.Event, after: float | torch.cuda.Event) -> float:
    if isinstance(before, torch.cuda.Event) and isinstance(after, torch.cuda.Event):
        return before.elapsed_time(after) / 1000
    assert isinstance(before, float) and isinstance(after, float)
    return after - before


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory since the process began, in GiB: of the GPU's allocator, or on CPU of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # kilobytes on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
