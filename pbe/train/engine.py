"""The DeepSpeed engine; the only file that imports deepspeed.

Its config dict is derived from the train settings, there is no ds_config.json. A client torch.optim.AdamW is
passed in: DeepSpeed's own would compile a kernel at first use.
"""

import os
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pbe.config import TrainConfig

# Gradient buckets in elements. DeepSpeed's default of 5e8 would allocate gigabytes on a small machine.
CPU_BUCKET = 4_000_000
GPU_BUCKET = 100_000_000


def deepspeed_config(cfg: TrainConfig, *, on_gpu: bool) -> dict[str, Any]:
    """train_batch_size = micro_batch * accumulation_steps * workers, constant whatever the worker count."""
    bucket = GPU_BUCKET if on_gpu else CPU_BUCKET
    return {
        "train_batch_size": cfg.batch,
        "train_micro_batch_size_per_gpu": cfg.micro_batch,
        "gradient_accumulation_steps": cfg.accumulation_steps,
        "gradient_clipping": cfg.grad_clip,
        "steps_per_print": 1_000_000_000,
        "zero_optimization": {
            "stage": cfg.zero_stage,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
            "overlap_comm": on_gpu,
            "contiguous_gradients": True,
        },
    }


def make_engine(model: nn.Module, cfg: TrainConfig) -> Any:
    """A DeepSpeedEngine over the process group that Ray Train has made (gloo on CPU, nccl on GPU)."""
    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else it looks for one, and warns
    import deepspeed
    import deepspeed.ops

    # DeepSpeed 0.19 calls an all-gather that torch 2.13 has renamed
    warnings.filterwarnings("ignore", message=".*all_gather_into_tensor.*", category=FutureWarning)
    if not on_gpu:
        # this op is compiled at first use and needs g++ and ninja; without it DeepSpeed uses plain gloo
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    optimizer = torch.optim.AdamW(model.parameters(), lr=cfg.lr, weight_decay=cfg.weight_decay, fused=True)
    engine, _, _, _ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=deepspeed_config(cfg, on_gpu=on_gpu), dist_init_required=False
    )
    return engine


def save_engine(engine: Any, folder: Path, client_state: dict[str, Any]) -> None:
    """Collective. Each rank writes its own shard into `folder`, which may differ between ranks."""
    engine.save_checkpoint(str(folder), tag="engine", client_state=client_state, save_latest=False)


def load_engine(engine: Any, folder: Path) -> dict[str, Any]:
    """Collective. `folder` holds the files of all ranks; returns the client state. Raises on a damaged file."""
    loaded, client_state = engine.load_checkpoint(str(folder), tag="engine")
    if loaded is None:
        raise RuntimeError(f"{folder}: DeepSpeed could not load this checkpoint")
    return client_state
