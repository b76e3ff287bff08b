"""A small training on this machine, for `pbe doctor`: ZeRO 2, saved, then resumed at another world size.

It runs the code of real training: the engine, its checkpoint, DeepSpeed's universal conversion, nccl on GPUs. Each rank
is a separate process, killed after a timeout.
"""

import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from pbe.errors import UserError
from pbe.model.settings import ExemplarConfig, UNetConfig
from pbe.train.settings import TrainConfig

ROWS_PER_RANK, STEPS, SAVED_AT = 2, 4, 2
TOLERANCE = 1e-3  # of a loss near 1; GPUs may multiply in TF32


class DrillError(UserError):
    """A rank failed or did not respond in time; the message quotes its error."""


@dataclass(frozen=True)
class Drill:
    """Losses of the last step, straight and resumed, and seconds by phase."""

    world: int
    resumed_world: int
    straight: float
    resumed: float
    seconds: dict[str, float]

    @property
    def agrees(self) -> bool:
        return abs(self.straight - self.resumed) < TOLERANCE


def run_drill(cfg: TrainConfig, *, world: int, on_gpu: bool, timeout_s: float) -> Drill:
    """Train STEPS steps on `world` ranks, then resume on one from their universal checkpoint of step SAVED_AT.

    cfg gives the precision, optimizer and kernels; its sizes are replaced by tiny ones. Raises DrillError.
    """
    resumed_world = 1
    seconds = {}
    with tempfile.TemporaryDirectory(prefix="pbe-drill-") as name:
        folder = Path(name)
        since = time.monotonic()
        tiny = _tiny(cfg, world, world=world)
        straight = _ranks(tiny, folder, on_gpu=on_gpu, resume=False, timeout_s=timeout_s)
        seconds["train and save"], since = time.monotonic() - since, time.monotonic()
        tiny = _tiny(cfg, resumed_world, world=world)
        resumed = _ranks(tiny, folder, on_gpu=on_gpu, resume=True, timeout_s=timeout_s)
        seconds["convert and resume"] = time.monotonic() - since
    return Drill(world, resumed_world, straight[0], resumed[0], seconds)


def _tiny(cfg: TrainConfig, workers: int, *, world: int) -> TrainConfig:
    """`world` ranks have one micro-batch a step; fewer of them accumulate to the same global batch."""
    tiny = {
        "batch": world * ROWS_PER_RANK,
        "streams": workers,
        "workers": workers,
        "micro_batch": ROWS_PER_RANK,
        "zero_stage": 2,
        "lr": 1e-3,
        "warmup_steps": 0,
    }
    return TrainConfig.model_validate(cfg.model_dump() | tiny)


def _ranks(cfg: TrainConfig, folder: Path, *, on_gpu: bool, resume: bool, timeout_s: float) -> Sequence[float]:
    world = cfg.workers
    context = multiprocessing.get_context("spawn")
    meeting = folder / f"meeting-{'resumed' if resume else 'straight'}"
    pipes: list[Connection] = []
    processes = []
    for rank in range(world):
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_rank, args=(theirs, meeting, folder, rank, cfg, on_gpu, resume), daemon=True)
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    losses: dict[int, float] = {}
    deadline = time.monotonic() + timeout_s
    try:
        while len(losses) < world:
            ready = wait([pipes[rank] for rank in range(world) if rank not in losses], deadline - time.monotonic())
            if not ready:
                raise DrillError(
                    f"not all ranks responded within {timeout_s:.0f} s; check that they can connect to each other"
                )
            for rank, pipe in enumerate(pipes):
                if pipe not in ready:
                    continue
                try:
                    ok, value = pipe.recv()
                except EOFError:
                    raise DrillError(f"rank {rank} died without an error message (out of memory?)") from None
                if not ok:
                    raise DrillError(f"rank {rank}: {value}")
                losses[rank] = value
    finally:
        for process in processes:
            if len(losses) < world:
                process.kill()
            process.join(timeout=10)
    return [losses[rank] for rank in range(world)]


def _rank(pipe: Any, meeting: Path, folder: Path, rank: int, cfg: TrainConfig, on_gpu: bool, resume: bool) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(cfg.workers)}
    # silence DeepSpeed and torch
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    try:
        pipe.send((True, _train(meeting, folder, rank, cfg, on_gpu=on_gpu, resume=resume)))
    except Exception:
        pipe.send((False, traceback.format_exc().strip().splitlines()[-1]))


def _train(meeting: Path, folder: Path, rank: int, cfg: TrainConfig, *, on_gpu: bool, resume: bool) -> float:
    """Train; returns the loss of the last step, mean over the global batch."""
    import torch
    import torch.distributed as dist

    from pbe.model.architecture import Architecture
    from pbe.model.unet import new_network
    from pbe.train.engine import load_engine, make_engine, save_engine, step_engine, to_universal

    device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    world = cfg.workers
    dist.init_process_group("nccl" if on_gpu else "gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
    torch.manual_seed(0)
    small = UNetConfig(
        block_channels=(32, 64),
        attention=(True, False),
        layers_per_block=1,
        attention_heads=4,
        norm_groups=8,
        context_width=16,
        class_embedding=False,
    )
    exemplar = ExemplarConfig(mapper_width=16, mapper_blocks=1)
    network = new_network(Architecture(4, 8, 16, unet=small, exemplar=exemplar))
    network.use_kernels(sdpa=cfg.kernels.sdpa, channels_last=cfg.kernels.channels_last, checkpointed_levels=0)
    if cfg.precision == "bf16_autocast":
        network.use_autocast()
    checkpoint, universal = folder / "checkpoint", folder / "universal"
    if resume and rank == 0:
        to_universal(checkpoint, universal)
    dist.barrier()
    engine = make_engine(network, cfg, device=device, universal=resume)
    start = load_engine(engine, universal)["step"] if resume else 0
    dtype = torch.bfloat16 if cfg.precision in ("bf16", "bf16_pure") else torch.float32
    mean = torch.zeros((), device=device)
    for step in range(start, STEPS):
        generator = torch.Generator().manual_seed(step)
        draws = [torch.randn(cfg.batch, channels, 8, 8, generator=generator) for channels in (4, 4, 1, 4)]
        tokens = torch.randn(cfg.batch, 1, 16, generator=generator)
        mean.zero_()
        for micro in range(cfg.accumulation_steps):
            first = (micro * world + rank) * cfg.micro_batch
            rows = slice(first, first + cfg.micro_batch)
            noisy, masked, keep, wanted = (draw[rows].to(device, dtype) for draw in draws)
            prediction = engine(
                noisy,
                torch.full((cfg.micro_batch,), 500, device=device),
                masked_latent=masked,
                keep_mask_latent=keep,
                exemplar_tokens=tokens[rows].to(device, dtype),
                drop_condition=torch.zeros(cfg.micro_batch, dtype=torch.bool, device=device),
            )
            loss = (prediction.float() - wanted.float()).pow(2).mean()
            engine.backward(loss)
            step_engine(engine)
            mean += loss.detach() / cfg.accumulation_steps
        if not resume and step + 1 == SAVED_AT:
            save_engine(engine, checkpoint, {"step": SAVED_AT})
            dist.barrier()
    dist.all_reduce(mean)
    dist.destroy_process_group()
    return float(mean) / world
