"""The same training on both devices: loss curves, checkpoints that move between them, ZeRO stages through Ray Train."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pbe.store import Manifest, Store, load_manifest, save_manifest
from pbe.train.worker import train_worker
from tests.gpu.process import CaseError, DeviceProcess, join_one_rank
from tests.train.ranks import loss_curve, tiny_config, tiny_encoded, tiny_spec

LIMIT_S = 90.0
STEPS, SWITCHED_AT = 30, 15
# Largest relative difference of any loss of 30 steps from the CPU's float32 curve. float32 sums in another order, and
# 30 steps of a large learning rate make it grow; bfloat16 keeps 8 bits. Stated before the first run on a GPU.
FP32_BOUND, BF16_BOUND, LEAST_BF16_DIFFERENCE = 1e-3, 2e-2, 1e-5


def parity(device: str, here: DeviceProcess, cpu: DeviceProcess, ray: DeviceProcess, work: Path) -> Iterator[dict]:
    """Rows with a case, its difference and its bound. here: the process on `device`. ray: the one that starts Ray."""
    want = cpu.result(train_straight, work, "cpu", "fp32", 0, limit_s=LIMIT_S)
    for precision, stage, bound in (
        ("fp32", 0, FP32_BOUND),
        ("fp32", 2, FP32_BOUND),
        ("bf16", 2, BF16_BOUND),
        ("bf16_autocast", 2, BF16_BOUND),
    ):
        name = f"{device}, {precision}, ZeRO {stage}"
        yield _row(name, want, bound, here, train_straight, work, device, precision, stage)
    for name, first, second in (
        (f"checkpoint of {device} resumed on cpu", here, cpu),
        (f"checkpoint of cpu resumed on {device}", cpu, here),
    ):
        run = "half-here-first" if first is here else "half-cpu-first"
        try:
            first.result(train_half, work, run, SWITCHED_AT, limit_s=LIMIT_S)
        except CaseError as error:
            yield {"case": name, "failed": str(error)}
            continue
        yield _row(name, want, FP32_BOUND, second, train_half, work, run, STEPS)
    for stage in range(4):
        row = _row(f"Ray Train, ZeRO {stage}", want, FP32_BOUND, ray, train_through_ray, work, device, stage)
        yield row
        if "failed" in row:
            break  # the others would take as long to fail
    ray.close()


def _row(name: str, want: Sequence[float], bound: float, process: DeviceProcess, function: Any, *args: Any) -> dict:
    try:
        losses = process.result(function, *args, limit_s=LIMIT_S)
    except CaseError as error:
        return {"case": name, "failed": str(error)}
    difference = float(np.max(np.abs(np.array(losses) - want) / np.abs(want)))
    # a bfloat16 curve as near as float32's cannot have been computed in bfloat16
    least = LEAST_BF16_DIFFERENCE if bound == BF16_BOUND else 0.0
    return {"case": name, "difference": difference, "bound": bound, "missed": not least <= difference <= bound}


def train_straight(device: torch.device, work: Path, name: str, precision: str, stage: int) -> list[float]:
    return _train(device, work, f"straight-{name}-{precision}-{stage}", precision=precision, zero_stage=stage)


def train_half(device: torch.device, work: Path, run: str, steps: int) -> list[float]:
    """Train up to `steps`, from the run's checkpoint if it has one."""
    return _train(device, work, run, steps=steps)


def train_through_ray(device: torch.device, work: Path, name: str, stage: int) -> list[float]:
    import ray

    from pipelines.runtime.parts import start_ray
    from pipelines.train import new_trainer

    start_ray()
    if device.type == "cuda" and not ray.cluster_resources().get("GPU"):
        raise RuntimeError("Ray sees no GPU here, though torch does")
    store = Store(str(work / "parity"))
    on_gpu = device.type == "cuda"
    resources = {"cpus": 1, "gpus": int(on_gpu), "memory_gib": 1}
    changes = {"zero_stage": stage, "per_worker": resources, "max_failures": 0}
    cfg = tiny_config(steps=STEPS, final_lr_frac=1.0, **changes)
    run = f"ray-{name}-{stage}"
    new_trainer(tiny_spec(store, _encoded(store, work), cfg, run), attempt="0").fit()
    return loss_curve(store, run)


def _train(device: torch.device, work: Path, run: str, *, steps: int = STEPS, **changes: Any) -> list[float]:
    """A constant learning rate after the warm-up, so that half a run equals the first half of a whole one."""
    join_one_rank(device, work)
    store = Store(str(work / "parity"))
    cfg = tiny_config(steps=steps, final_lr_frac=1.0, **changes)
    train_worker(tiny_spec(store, _encoded(store, work), cfg, run), device)
    return loss_curve(store, run)


def _encoded(store: Store, work: Path) -> Manifest:
    path = work / "parity.json"
    if not path.exists():
        save_manifest(path, tiny_encoded(store))
    return load_manifest(path)
