"""Our training against other people's, taking turns in one process on one card.

bare       the same UNet, optimizer and precision in a plain torch loop on tensors that are on the device already
official   written as upstream's loop runs (ldm/models/diffusion/ddpm.py, configs/v1.yaml): float32, photos and
           references encoded in every step, attention written out, activations recomputed, AdamW one parameter at a
           time; in TF32, as torch before 1.12 did on Ampere. From pictures that are on the device already, so without
           its reading of files.
"""

import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pbe.diffusion.objective import add_noise
from pbe.diffusion.schedule import alphas_cumprod
from pbe.diffusion.scheduler_config import scheduler_config
from pbe.model.architecture import Architecture
from pbe.model.precision import float32_products
from pbe.model.unet import ConditionedUNet, new_network
from pbe.train.settings import TrainConfig
from pbe.train.worker import train_worker
from tests.gpu.networks import new_clip_backbone, new_kl_codec
from tests.gpu.process import join_one_rank
from tests.gpu.sizes import Sizes
from tests.gpu.training import EnoughError, Windows, measured_on, paper_job

TURNS, TURN_STEPS = 3, 20  # enough steps that a few prefetched batches do not hide the reading
LARGEST_MICRO_BATCH = 16  # two networks with their optimizers are on the card
Step = Callable[[], None]


def in_turns(device: torch.device, work: Path, sizes: Sizes, cfg: TrainConfig, peer: str) -> dict[str, Any]:
    """Rows per second of both, and the median of the turns' ratios ours / theirs."""
    join_one_rank(device, work)
    cfg = cfg.model_copy(update={"log_every": TURN_STEPS})
    rows = cfg.batch if peer == "bare" else sizes.micro_batch
    step = bare_step(device, sizes.arch, cfg) if peer == "bare" else official_step(device, sizes, rows)
    step()  # compiles, allocates
    theirs: list[float] = []

    def turn() -> None:
        _wait(device)
        since = time.perf_counter()
        for _ in range(TURN_STEPS):
            step()
        _wait(device)
        theirs.append(time.perf_counter() - since)

    windows = Windows(TURNS, between=turn)
    with measured_on(device), suppress(EnoughError):
        train_worker(paper_job(work, sizes, cfg, f"beside-{peer}", windows), device)
    ours = [TURN_STEPS * cfg.batch / seconds for seconds in windows.seconds[1:]]
    other = [TURN_STEPS * rows / seconds for seconds in theirs]
    return {
        "our_micro_batch": cfg.micro_batch,
        "their_micro_batch": rows if peer == "official" else cfg.micro_batch,
        "ours_rows_per_s": statistics.median(ours),
        "theirs_rows_per_s": statistics.median(other),
        "ours_over_theirs": statistics.median(a / b for a, b in zip(ours, other, strict=True)),
        "least": min(a / b for a, b in zip(ours, other, strict=True)),
        "most": max(a / b for a, b in zip(ours, other, strict=True)),
    }


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _inputs(device: torch.device, arch: Architecture, rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, dict]:
    latent = (rows, arch.latent_channels, arch.latent_px, arch.latent_px)
    conditions = {
        "masked_latent": torch.randn(latent, device=device, dtype=dtype),
        "keep_mask_latent": torch.rand(rows, 1, *latent[2:], device=device, dtype=dtype),
        "exemplar_tokens": torch.randn(rows, 1, arch.backbone_width, device=device, dtype=dtype),
        "drop_condition": torch.rand(rows, device=device) < 0.2,
    }
    return torch.randn(latent, device=device), torch.randint(0, 1000, (rows,), device=device), conditions


def bare_step(device: torch.device, arch: Architecture, cfg: TrainConfig) -> Step:
    """One optimizer step of a plain loop in the precision of `cfg`; bf16 keeps float32 masters of the weights."""
    low = torch.bfloat16 if cfg.precision in ("bf16", "bf16_pure") else torch.float32
    network = _network(device, arch, cfg, low)
    parameters: list[Tensor] = list(network.parameters())
    masters = [parameter.detach().float() for parameter in parameters] if low == torch.bfloat16 else parameters
    optimizer = torch.optim.AdamW(masters, lr=1e-6, fused=cfg.kernels.fused_adamw or None)
    x0, timestep, conditions = _inputs(device, arch, cfg.micro_batch, low)
    alpha_bar = alphas_cumprod(scheduler_config("scaled_linear", "eps")).to(device)

    def step() -> None:
        with float32_products(tf32=cfg.kernels.tf32):
            for _ in range(cfg.accumulation_steps):
                noise = torch.randn_like(x0)
                noisy = add_noise(x0, noise, alpha_bar[timestep]).to(low)
                with torch.autocast(device.type, torch.bfloat16, enabled=cfg.precision == "bf16_autocast"):
                    prediction = network(noisy, timestep, **conditions)
                loss = (prediction.float() - noise).pow(2).mean()
                (loss / cfg.accumulation_steps).backward()
            with torch.no_grad():
                if low == torch.bfloat16:
                    for master, parameter in zip(masters, parameters, strict=True):
                        assert parameter.grad is not None
                        master.grad = parameter.grad.float()
                optimizer.step()
                if low == torch.bfloat16:
                    torch._foreach_copy_(parameters, masters)
            optimizer.zero_grad()
            network.zero_grad()

    return step


def official_step(device: torch.device, sizes: Sizes, rows: int) -> Step:
    """One optimizer step from `rows` photos, masked photos and references, all (rows, 3, side, side) uint8 or float."""
    with device:
        network = new_network(sizes.arch)
    network.use_kernels(sdpa=False, channels_last=False, checkpointed_levels=4)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-6, foreach=False, fused=False)
    codec, backbone = new_kl_codec(device, sizes), new_clip_backbone(device, sizes)
    photos = torch.rand(rows, 3, sizes.image_px, sizes.image_px, device=device) * 2 - 1
    keep_mask = torch.ones(rows, 1, sizes.image_px, sizes.image_px, device=device)
    keep_mask[..., : sizes.image_px // 2, : sizes.image_px // 2] = 0
    references = torch.randint(0, 256, (rows, 3, backbone.input_px, backbone.input_px), device=device).to(torch.uint8)
    alpha_bar = alphas_cumprod(scheduler_config("scaled_linear", "eps")).to(device)
    latent_px = (sizes.arch.latent_px, sizes.arch.latent_px)

    def step() -> None:
        with float32_products(tf32=True):
            with torch.no_grad():
                mean, std = codec.posterior(photos)
                x0 = mean + std * torch.randn_like(mean)
                mean, std = codec.posterior(photos * keep_mask)
                masked = mean + std * torch.randn_like(mean)
                tokens = backbone(references)[:, None]
            noise, timestep = torch.randn_like(x0), torch.randint(0, 1000, (rows,), device=device)
            prediction = network(
                add_noise(x0, noise, alpha_bar[timestep]),
                timestep,
                masked_latent=masked,
                keep_mask_latent=torch.nn.functional.interpolate(keep_mask, latent_px),
                exemplar_tokens=tokens,
                drop_condition=(torch.rand(1, device=device) < 0.2).expand(rows),
            )
            (prediction - noise).pow(2).mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    return step


def _network(device: torch.device, arch: Architecture, cfg: TrainConfig, dtype: torch.dtype) -> ConditionedUNet:
    kernels = cfg.kernels
    with device:
        network = new_network(arch).to(dtype)
    if kernels.channels_last:
        network.unet.to(memory_format=torch.channels_last)
    network.use_kernels(
        sdpa=kernels.sdpa,
        channels_last=kernels.channels_last,
        checkpointed_levels=kernels.checkpointed_levels,
    )
    if kernels.compile and device.type == "cuda":
        network.unet.compile()
    return network
