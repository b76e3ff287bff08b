"""A separate process for everything that touches a device. A hang, a crash or lack of memory there costs one result:
the process is killed, and the next call starts another."""

import ctypes
import gc
import inspect
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

START_S, END_S = 120, 10
PR_SET_PDEATHSIG = 1  # linux/prctl.h
LEFT_OVER_GIB = 1.0  # what a call may leave allocated on the GPU before the next one gets a fresh process


class CaseError(Exception):
    """A call failed; the message is one line."""


class DeviceProcess:
    """Calls functions as `function(device, *args)`, one after the other. A generator function gives several results."""

    def __init__(self, device: str, log: Path) -> None:
        """device: "cpu", which then sees no GPU, or "cuda". log: what the process prints goes there."""
        self._device, self._log = device, log
        self._process: Any = None
        self._pipe: Any = None
        self._idle = self._ready = False

    def results(self, function: Callable[..., Any], *args: Any, limit_s: float) -> Iterator[Any]:
        """What the function returns or yields, as it comes. Raises CaseError when it fails, or when one result takes
        longer than `limit_s`."""
        self.start()
        if not self._ready:
            if not self._pipe.poll(START_S):
                self.close()
                raise CaseError(f"a process did not start within {START_S} s")
            self._pipe.recv()
            self._ready = True
        self._pipe.send((function, args))
        self._idle = False
        while True:
            if not self._pipe.poll(limit_s):
                self.close()
                raise CaseError(f"stopped after {limit_s:.0f} s")
            try:
                kind, value = self._pipe.recv()
            except (EOFError, ConnectionResetError):
                self.close()
                raise CaseError(f"its process died; see {self._log}") from None
            if kind == "result":
                yield value
                continue
            self._idle = True
            if kind == "failed":
                if self._device == "cuda":
                    self.close()  # the GPU memory that it holds would make the next call fail
                raise CaseError(value)
            if value > LEFT_OVER_GIB:  # finished, but this much is still allocated
                self.close()
            return

    def result(self, function: Callable[..., Any], *args: Any, limit_s: float) -> Any:
        """The result of a function that returns once."""
        [value] = self.results(function, *args, limit_s=limit_s)
        return value

    def close(self) -> None:
        """End the process and everything that it started: ranks, compilers, Ray."""
        if self._process is None:
            return
        self._pipe.close()  # an idle process then ends by itself
        self._process.join(timeout=END_S if self._idle else 0)
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.join()
        self._process = None

    def start(self) -> None:
        """Start the process if there is none, without waiting; it imports while others work."""
        if self._process is not None and self._process.is_alive():
            return
        context = multiprocessing.get_context("spawn")  # a fork of a process that has used CUDA cannot use it
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, self._device, self._log))
        self._process.start()
        self._idle = self._ready = False
        theirs.close()


def _serve(pipe: Connection, device_name: str, log: Path) -> None:
    os.setsid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # it must not outlive a killed program
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "NODE_RANK": "0"}
    if device_name == "cpu":
        os.environ |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    import deepspeed  # noqa: F401 - with torch, most of the import time of every case
    import torch

    device = torch.device("cuda", 0) if device_name == "cuda" else torch.device("cpu")
    if device_name == "cpu":
        torch.set_num_threads(1)  # all that runs there is tiny
    pipe.send("ready")
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:
            return
        pipe.send(_answer(pipe, function, device, args))


def _answer(pipe: Connection, function: Callable[..., Any], device: Any, args: tuple[Any, ...]) -> tuple[str, Any]:
    import torch

    print(f"-- {time.strftime('%H:%M:%S')} {function.__module__}.{function.__name__}", flush=True)
    try:
        value = function(device, *args)
        for result in value if inspect.isgenerator(value) else [value]:
            pipe.send(("result", result))
    except torch.OutOfMemoryError as error:
        return "failed", f"out of memory: {str(error).split('. ')[0]}"
    except Exception as error:
        traceback.print_exc()
        return "failed", f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    finally:
        value = result = None
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return "done", torch.cuda.memory_allocated() / 2**30 if device.type == "cuda" else 0.0


def join_one_rank(device: Any, folder: Path) -> None:
    """Join a process group of this process alone, once: nccl on a GPU, gloo on a CPU."""
    import torch.distributed as dist

    if not dist.is_initialized():
        meeting = folder / f"meeting-{os.getpid()}"
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, init_method=f"file://{meeting}", rank=0, world_size=1)
