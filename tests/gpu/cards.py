"""The profiles for one card: the memory of their training at the paper's size, and what infra/memory.py counts."""

from pathlib import Path
from typing import Any

import torch

from infra.memory import CARDS, GIB, peak_of
from pbe.train.settings import TrainConfig
from tests.gpu.sizes import Sizes
from tests.gpu.training import measure_training, paper_config
from tests.profiles import profile

TAKEN = ("trainable", "precision", "zero_stage", "offload", "optimizer", "ema_decay", "micro_batch", "kernels")


def measure_profile(device: torch.device, work: Path, sizes: Sizes, name: str) -> dict[str, Any]:
    """Of steps with two micro-batches. `cfg` has the profile's settings that decide the memory; the weights are random,
    whose size is that of the published ones."""
    cfg = config_of(sizes, name)
    measured = measure_training(device, work, sizes, cfg)
    out = {key: measured[key] for key in ("peak_gib", "rows_per_s", "start_s", "loss")}
    return {"predicted_gib": peak_of(cfg, sizes.arch) / GIB, "card_gb": CARDS[name]} | out


def config_of(sizes: Sizes, name: str) -> TrainConfig:
    settings = profile(name).train.model_dump()
    taken = {key: settings[key] for key in TAKEN}
    return paper_config(sizes, init="sd", batch=2 * taken["micro_batch"], **taken)
