"""The DeepSpeed engine. Only this file imports deepspeed.

The config dict is derived from the train settings; there is no ds_config.json. The optimizer is torch's AdamW, also for
masters in the CPU's memory: DeepSpeed's own would compile a kernel at first use and is no faster
(tests/benchmarks/cpu_adamw.py).
"""

import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
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
    if cfg.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": on_gpu}
    if cfg.offload == "all":
        zero["offload_param"] = {"device": "cpu", "pin_memory": on_gpu}
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
    if cfg.offload != "none":
        config["zero_force_ds_cpu_optimizer"] = False  # it would refuse torch's AdamW
    if cfg.optimizer == "adamw_8bit":
        config["zero_allow_untested_optimizer"] = True  # it knows none of 8 bits
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
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    engine, _, _, _ = deepspeed.initialize(
        model=model,
        optimizer=_optimizer(trained, cfg),
        config=deepspeed_config(cfg, on_gpu=on_gpu, universal=universal),
        dist_init_required=False,
    )
    return engine


def _optimizer(trained: list[nn.Parameter], cfg: TrainConfig) -> torch.optim.Optimizer:
    if cfg.optimizer == "adamw_8bit":
        try:
            from bitsandbytes.optim import AdamW8bit
        except ImportError:  # not in requirements.lock: where it is installed, every import of diffusers loads it
            raise EngineError(
                "train.optimizer = adamw_8bit needs bitsandbytes: install it with "
                "`.venv/bin/python -m pip install bitsandbytes==0.50.2`, or set train.optimizer: adamw"
            ) from None
        return AdamW8bit(
            trained, lr=cfg.lr, betas=cfg.adam_betas, eps=cfg.adam_eps, weight_decay=cfg.weight_decay, is_paged=False
        )
    return torch.optim.AdamW(
        trained,
        lr=cfg.lr,
        betas=cfg.adam_betas,
        eps=cfg.adam_eps,
        weight_decay=cfg.weight_decay,
        fused=cfg.kernels.fused_adamw,
    )


def save_engine(engine: Any, folder: Path, client_state: dict[str, Any]) -> None:
    """Write each rank's shard below `folder`, which may differ between ranks, without frozen parameters.

    Collective. Raises EngineError.
    """
    try:
        engine.save_checkpoint(
            str(folder),
            tag=TAG,
            client_state=client_state | _UNIVERSAL | _of_the_run(engine),
            save_latest=False,
            exclude_frozen_parameters=True,
        )
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

    Frozen parameters stay as they are. Collective. Raises EngineError.
    """
    refuse_code(folder)
    whole = all(parameter.requires_grad for parameter in engine.module.parameters())
    try:
        loaded, client_state = engine.load_checkpoint(str(folder), tag=TAG, load_module_strict=whole)
    except (RuntimeError, KeyError, ValueError, AssertionError, FileNotFoundError) as error:
        raise EngineError(f"{folder}: this checkpoint does not match the settings: {_first_line(error)}") from error
    if loaded is None:
        raise EngineError(f"{folder}: DeepSpeed found no checkpoint in this folder")
    ours = _of_the_run(engine)
    said = ours | {key: value for key, value in client_state.items() if key in ours}  # older checkpoints do not say
    if said["moments"] != ours["moments"]:
        raise EngineError(
            f"{folder}: this checkpoint holds moments of {said['moments']}, but train.optimizer uses "
            f"{ours['moments']}: set train.optimizer to that run's value, or start from its export with train.init"
        )
    if said["trained"] != ours["trained"]:
        raise EngineError(
            f"{folder}: this checkpoint was trained on other parameters; set train.trainable to that run's value, or "
            "start from its export with train.init"
        )
    return client_state


def use_settings(engine: Any, cfg: TrainConfig) -> None:
    """Give the optimizer the settings of this run: a checkpoint that is loaded brings those of the run that wrote it,
    which `train.resume_from` may continue under others. The loop sets the learning rate.
    """
    for group in engine.optimizer.param_groups:
        group.update(betas=cfg.adam_betas, eps=cfg.adam_eps, weight_decay=cfg.weight_decay)
    if hasattr(engine.optimizer, "clip_grad"):  # ZeRO 1 and 2 keep it in their checkpoints
        engine.optimizer.clip_grad = cfg.grad_clip or 0.0


def _of_the_run(engine: Any) -> dict[str, Any]:
    """What a checkpoint's moments belong to."""
    return {"trained": list(_trained(engine)), "moments": type(engine.basic_optimizer).__name__}


def _trained(engine: Any) -> dict[str, Any]:
    """The parameters that are not frozen, by name."""
    return {name: parameter for name, parameter in engine.module.named_parameters() if parameter.requires_grad}


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

    Returns None, or on that micro-batch the 2-norm of the gradient over all trained parameters and all ranks before
    clipping: a scalar on the training device, infinite if any gradient is.
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
    for name, parameter in _trained(engine).items():
        whole = safe_get_full_fp32_param(parameter)
        if whole is None:  # stage 0
            whole = masters.get(id(parameter), parameter.detach())
        if engine.global_rank == 0:
            out[name] = whole.detach().to("cpu", torch.float32, copy=True)
    return out


@torch.no_grad()
def set_full_parameters(engine: Any, whole: Callable[[str], Tensor]) -> None:
    """Write this rank's part of every master weight. The network's own weights follow with `refresh_weights`.

    whole: gives a trainable parameter's float32 values, in its shape, by name.
    """
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

    stage, masters = engine.zero_optimization_stage(), _unfused_masters(engine.optimizer)
    for name, parameter in _trained(engine).items():
        value = whole(name)
        if stage == 3:  # DeepSpeed's setter of whole values fails where the last rank's part is padded
            size = parameter.ds_tensor.numel()
            padded = F.pad(value.flatten(), (0, size * dist.get_world_size() - value.numel()))
            safe_set_local_fp32_param(parameter, padded.narrow(0, size * dist.get_rank(), size))
        elif stage:
            safe_set_full_fp32_param(parameter, value)
        else:
            masters.get(id(parameter), parameter).copy_(value)


def masters_of(engine: Any) -> list[Tensor]:
    """This rank's master weights, which a step updates in place: float32, but bfloat16 under bf16_pure.

    Frozen weights have none. At stage 0 they are whole parameters, else flat partitions; order and padding depend on
    the number of ranks.
    """
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage == 3:
        return list(optimizer.fp32_partitioned_groups_flat)
    if stage:
        return list(optimizer.single_partition_of_fp32_groups)
    masters = _unfused_masters(optimizer)
    return [masters.get(id(parameter), parameter) for parameter in _trained(engine).values()]


@torch.no_grad()
def refresh_weights(engine: Any) -> None:
    """Round the master weights to those that the network computes with, bit for bit as a step does. Collective."""
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage == 3:
        optimizer._partition_all_parameters()  # gathered weights would keep their values
        for group in range(len(optimizer.fp32_partitioned_groups_flat)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
    elif stage:
        optimizer.update_lp_params()
    else:
        for low, high in _unfused_pairs(optimizer):
            low.copy_(high)


def _unfused_masters(optimizer: Any) -> dict[int, Tensor]:
    """The float32 master weights by id of their bfloat16 parameter, which stage 0 keeps in parallel lists."""
    return {id(low): high for low, high in _unfused_pairs(optimizer)}


def _unfused_pairs(optimizer: Any) -> list[tuple[Tensor, Tensor]]:
    groups = zip(getattr(optimizer, "fp16_groups", []), getattr(optimizer, "fp32_groups", []), strict=False)
    return [pair for lows, highs in groups for pair in zip(lows, highs, strict=True)]


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:300]
