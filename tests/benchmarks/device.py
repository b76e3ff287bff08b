"""Shared by the benchmarks: their --device, and the clocks and process group that depend on it. Not a benchmark.

torch is imported only where it is needed, because openimages_csv.py measures the memory of its imports.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

CHOICES = ("cpu", "cuda")


def add_device(parser: argparse.ArgumentParser) -> None:
    """Adds --device, the same for every benchmark, so that `make bench` can pass it to all."""
    parser.add_argument("--device", choices=CHOICES, default=CHOICES[0], help="cpu, or cuda: the first GPU (cpu)")


def open_device(name: str) -> "torch.device":
    """The processor, or the first GPU, which it makes current and prints. Call it before importing DeepSpeed, which
    otherwise chooses a device itself. Raises SystemExit with status 2 if there is no GPU."""
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        print("--device cuda: torch sees no GPU here", file=sys.stderr)
        raise SystemExit(2)
    os.environ["DS_ACCELERATOR"] = name
    if name == "cpu":
        return torch.device("cpu")
    device = torch.device("cuda", 0)
    torch.cuda.set_device(device)
    print(f"on {torch.cuda.get_device_name(device)}", flush=True)
    return device


def one_thread(device: "torch.device") -> None:
    """Limit torch to one thread on the processor, for steady times; on a GPU, leave its threads alone."""
    import torch

    if device.type == "cpu":
        torch.set_num_threads(1)


def now(device: "torch.device", on_processor: Callable[[], float] = time.perf_counter) -> float:
    """Seconds by the clock `on_processor`; on a GPU by the wall clock, after the GPU has finished, because kernels do
    not advance the processor's clock."""
    import torch

    if device.type == "cpu":
        return on_processor()
    torch.cuda.synchronize(device)
    return time.perf_counter()


@contextmanager
def one_rank(device: "torch.device") -> Iterator[None]:
    """A process group of only this process: gloo on the processor, nccl on a GPU."""
    import torch.distributed as dist

    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}  # DeepSpeed needs them
    backend = "nccl" if device.type == "cuda" else "gloo"
    with tempfile.TemporaryDirectory(prefix="pbe-meeting-") as meeting:
        dist.init_process_group(backend, init_method=f"file://{meeting}/ranks", rank=0, world_size=1)
        yield
        dist.destroy_process_group()


def say_processor_alone(device: str, why: str) -> None:
    """Print a line if --device cuda was given to a benchmark that cannot use it; the benchmark then runs as usual."""
    if device != "cpu":
        print(f"runs only on the processor, because {why}", flush=True)
