"""The DeepSpeed engine. Only this file imports deepspeed.

The config dict is derived from the train settings; there is no ds_config.json. The optimizer is torch's AdamW, because
DeepSpeed's own would compile a kernel at first use.
"""

import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pbe.errors import UserError
from pbe.model.torch_file import names_in
from pbe.pickles import Name
from pbe.train.settings import TrainConfig

# Gradient buckets in elements. DeepSpeed's default of 5e8 would allocate gigabytes on a small machine.
CPU_BUCKET = 4_000_000
GPU_BUCKET = 100_000_000
TAG = "engine"  # folder of DeepSpeed's files inside a checkpoint
# ds_to_universal requires it; without it ZeRO 1 and 2 cannot resume on another number of ranks
_UNIVERSAL = {"universal_checkpoint_info": {"universal_checkpoint_version": 0.2}}
_WRITTEN_BY_DEEPSPEED = {
    Name("collections", "OrderedDict"),
    Name("torch.storage", "UntypedStorage"),
    Name("torch._tensor", "_rebuild_from_type_v2"),
    *(Name("torch._utils", f"_rebuild_{kind}") for kind in ("tensor_v2", "tensor_v3", "parameter")),
    Name("torch.nn.parameter", "Parameter"),
    Name("deepspeed.runtime.fp16.loss_scaler", "LossScaler"),
    Name("deepspeed.runtime.fp16.loss_scaler", "DynamicLossScaler"),
    Name("deepspeed.runtime.zero.config", "ZeroStageEnum"),
    Name("deepspeed.utils.tensor_fragment", "fragment_address"),
}


class EngineError(UserError, RuntimeError):
    """DeepSpeed cannot write, read or convert a checkpoint; the message says which and why."""


def deepspeed_config(cfg: TrainConfig, *, on_gpu: bool, universal: bool = False) -> dict[str, Any]:
    """DeepSpeed's config dict for these settings.

    train_batch_size = micro_batch * accumulation_steps * workers, the same for any number of workers. universal: the
    checkpoint to be loaded comes from `to_universal`; DeepSpeed must know this beforehand.
    """
    bucket = GPU_BUCKET if on_gpu else CPU_BUCKET
    zero: dict[str, Any] = {
        "stage": cfg.zero_stage,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
        # to overlap, DeepSpeed synchronizes the device at every bucket; a single rank has nothing to overlap
        "overlap_comm": on_gpu and cfg.workers > 1,
        "contiguous_gradients": True,
    }
    if cfg.zero_stage == 3:
        # Parameters below the threshold stay whole on every rank: fewer, larger gathers. On CPU all are partitioned,
        # so that tests on a tiny network cover what a large one does.
        zero |= {
            "stage3_prefetch_bucket_size": bucket,
            "stage3_param_persistence_threshold": 100_000 if on_gpu else 0,
            # DeepSpeed's 1e9 would keep all of the paper's 0.92e9 parameters gathered
            "stage3_max_live_parameters": 2 * bucket,
            "stage3_max_reuse_distance": 2 * bucket,
        }
    config: dict[str, Any] = {
        "train_batch_size": cfg.batch,
        "train_micro_batch_size_per_gpu": cfg.micro_batch,
        "gradient_accumulation_steps": cfg.accumulation_steps,
        "gradient_clipping": cfg.grad_clip or 0.0,
        "steps_per_print": 1_000_000_000,
        # on by default, but it synchronizes the device twice per micro-batch; pbe/train/timing.py does not
        "timers": {"throughput": {"enabled": False}},
        "zero_optimization": zero,
    }
    if cfg.precision in ("bf16", "bf16_pure"):
        pure = cfg.precision == "bf16_pure"
        config["bf16"] = {"enabled": True} | (
            {"bf16_master_weights_and_grads": True, "bf16_optimizer_states": True} if pure else {}
        )
    if cfg.precision == "bf16" and cfg.zero_stage == 2:
        # sums gradients in one flat float32 partition and saves 3.5 bytes per parameter at the peak;
        # at the other stages it saves nothing
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    if universal:
        config["checkpoint"] = {"load_universal": True}
    return config


def make_engine(model: nn.Module, cfg: TrainConfig, *, device: torch.device, universal: bool = False) -> Any:
    """A DeepSpeedEngine on the existing process group (gloo on CPU, nccl on GPU). Collective."""
    on_gpu = device.type == "cuda"
    if not on_gpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # otherwise it searches for one and warns
    import deepspeed
    import deepspeed.ops

    # DeepSpeed 0.19 calls collectives that torch 2.13 renamed, and torch warns at every call
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\..*` is deprecated", category=FutureWarning)
    if not on_gpu:
        # this op would be compiled at first use, with g++ and ninja; without it DeepSpeed uses plain gloo
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=cfg.lr,
        betas=cfg.adam_betas,
        eps=cfg.adam_eps,
        weight_decay=cfg.weight_decay,
        fused=cfg.kernels.fused_adamw,
    )
    engine, _, _, _ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        config=deepspeed_config(cfg, on_gpu=on_gpu, universal=universal),
        dist_init_required=False,
    )
    return engine


def save_engine(engine: Any, folder: Path, client_state: dict[str, Any]) -> None:
    """Write each rank's shard below `folder`, which may differ between ranks. Collective. Raises EngineError."""
    try:
        engine.save_checkpoint(str(folder), tag=TAG, client_state=client_state | _UNIVERSAL, save_latest=False)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        raise EngineError(f"{folder}: cannot write the checkpoint: {_first_line(error)}") from error


def refuse_code(folder: Path) -> None:
    """Raise EngineError for a file below `folder` that names anything but what DeepSpeed writes.

    DeepSpeed reads its files with pickle, which calls what they name, so whoever writes to the storage would run code.
    """
    for file in sorted(folder.rglob("*.pt")):
        try:
            foreign = sorted(f"{name.module}.{name.name}" for name in names_in(file) if not _is_deepspeeds(name))
        except (ValueError, OSError) as error:
            raise EngineError(f"{file}: {_first_line(error)}") from None
        if foreign:
            raise EngineError(
                f"{file}: names {foreign[0]}, which is not in DeepSpeed's checkpoints and may be code; nothing was "
                "loaded. Remove this checkpoint, and find out who wrote it"
            )


def _is_deepspeeds(name: Name) -> bool:
    if name.module == "torch":
        known = getattr(torch, name.name, None)
        return (
            name.name.endswith("Storage")
            or known in (torch.Size, torch.Tensor, torch.device)
            or (isinstance(known, torch.dtype))
        )
    return name in _WRITTEN_BY_DEEPSPEED


def load_engine(engine: Any, folder: Path) -> dict[str, Any]:
    """Load a checkpoint from `folder`, which holds the files of all ranks; returns the client state.

    Collective. Raises EngineError.
    """
    refuse_code(folder)
    try:
        loaded, client_state = engine.load_checkpoint(str(folder), tag=TAG)
    except (RuntimeError, KeyError, AssertionError) as error:
        raise EngineError(f"{folder}: this checkpoint does not match the settings: {_first_line(error)}") from error
    if loaded is None:
        raise EngineError(f"{folder}: DeepSpeed found no checkpoint in this folder")
    return client_state


def to_universal(folder: Path, out: Path) -> None:
    """Convert a checkpoint of ZeRO 1 to 3 below `folder` so that any number of ranks can load it from `out`.

    Not collective. Runs in a separate process, because DeepSpeed's converter forks and a training rank must not. Raises
    EngineError.
    """
    refuse_code(folder)
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--num_extract_workers=2"]
    done = subprocess.run(
        [*command, f"--input_folder={folder / TAG}", f"--output_folder={out / TAG}"],
        env=os.environ | {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise EngineError(f"{folder}: cannot convert the checkpoint to another number of ranks: {last}")


def step_engine(engine: Any) -> Tensor | None:
    """Call after every backward. The last micro-batch of a step updates the weights.

    Returns None, or on that micro-batch the 2-norm of the gradient over all parameters and ranks before clipping: a
    scalar on the training device, infinite if any gradient is.
    """
    if not engine.is_gradient_accumulation_boundary():
        engine.step()
        return None
    norm = None
    if engine.zero_optimization_stage() == 0:  # gradients are whole, and DeepSpeed computes no norm for plain float32
        gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
    engine.step()
    return torch.as_tensor(engine.get_global_grad_norm(), dtype=torch.float32) if norm is None else norm


def full_parameters(engine: Any) -> dict[str, Tensor]:
    """Every trainable parameter, gathered, by name: float32 on the CPU on rank 0, an empty dict on other ranks.

    Under bf16 these are the master weights. Collective.
    """
    from deepspeed.utils import safe_get_full_fp32_param

    masters = _unfused_masters(engine.optimizer)
    out = {}
    for name, parameter in engine.module.named_parameters():
        whole = safe_get_full_fp32_param(parameter)
        if whole is None:  # stage 0
            whole = masters.get(id(parameter), parameter.detach())
        if engine.global_rank == 0:
            out[name] = whole.detach().to("cpu", torch.float32, copy=True)
    return out


def _unfused_masters(optimizer: Any) -> dict[int, Tensor]:
    """The float32 master weights by id of their bfloat16 parameter, which stage 0 keeps in parallel lists."""
    groups = zip(getattr(optimizer, "fp16_groups", []), getattr(optimizer, "fp32_groups", []), strict=False)
    return {id(low): high for lows, highs in groups for low, high in zip(lows, highs, strict=True)}


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:300]
