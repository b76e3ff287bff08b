"""The sampling loop, with classifier-free guidance, on any of diffusers' deterministic samplers.

Deviation of the sample profile: every predicted x_0 may be projected to valid pixels before the step
(`project`), which keeps a linear codec from leaving the range that images have.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pbe.diffusion.objective import predicted_x0, target
from pbe.diffusion.schedule import TRAIN_TIMESTEPS, default_sampler, make_sampler, objective_of
from pbe.diffusion.settings import Objective, SamplerName

# (noisy latent, timestep) -> prediction, for the rows of a Condition
Denoiser = Callable[[Tensor, Tensor], Tensor]
Project = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Sampling:
    """How fills are sampled. Raises ValueError for steps outside 1 to 1000 and for a scale that is not finite."""

    guidance_scale: float = 5.0  # upstream's published commands; 1 = no guidance. The sample profile is evaluated at 3
    steps: int = 50  # upstream
    sampler: SamplerName | None = None  # None: the one that the model names

    def __post_init__(self) -> None:
        if not 1 <= self.steps <= TRAIN_TIMESTEPS or not math.isfinite(self.guidance_scale):
            settings = f"steps {self.steps}, guidance scale {self.guidance_scale}"
            raise ValueError(f"{settings}: 1 to {TRAIN_TIMESTEPS} steps, a finite scale")

    @property
    def forwards_per_step(self) -> int:
        """Rows that the denoiser gets, per row of noise: at scale 1 the unconditional prediction has no say."""
        return 1 if self.guidance_scale == 1 else 2


@dataclass(frozen=True)
class Condition:
    """What the network sees beside B noisy latents: R rows, with guidance B unconditional, then B conditional ones;
    without, B conditional ones."""

    masked_latent: Tensor  # (R, C, h, w)
    keep_mask_latent: Tensor  # (R, 1, h, w) in [0, 1], 1 = known
    exemplar_tokens: Tensor  # (R, T, width)
    drop_condition: Tensor  # (R,) bool: use the unconditional vector

    @classmethod
    def of_rows(
        cls,
        masked_latent: Tensor,
        keep_mask_latent: Tensor,
        exemplar_tokens: Tensor,
        *,
        sampling: Sampling,
        dtype: torch.dtype,
    ) -> "Condition":
        """From B rows, in the network's dtype."""
        rows, copies = len(masked_latent), sampling.forwards_per_step
        return cls(
            masked_latent.to(dtype).repeat(copies, 1, 1, 1),
            keep_mask_latent.to(dtype).repeat(copies, 1, 1, 1),
            exemplar_tokens.to(dtype).repeat(copies, 1, 1),
            torch.arange(copies * rows, device=masked_latent.device) < (copies - 1) * rows,
        )


@torch.no_grad()
def sample(
    denoise: Denoiser,
    noise: Tensor,
    *,
    scheduler: Mapping[str, Any],
    sampling: Sampling,
    project: Project | None = None,
    on_step: Callable[[], object] | None = None,
) -> Tensor:
    """From noise (B, C, h, w) ~ N(0, I) to a latent x_0 of the same shape. scheduler: the model's config.

    on_step is called after each forward. Raises SamplerError. diffusers' samplers look timesteps up and compare them,
    so these stay on the CPU: on a GPU each look would wait for the forward before it.
    """
    sampler = make_sampler(scheduler, sampling.sampler or default_sampler(scheduler))
    sampler.set_timesteps(sampling.steps, device=torch.device("cpu"))
    objective = objective_of(sampler.config)
    alpha_bar = sampler.alphas_cumprod.to(noise.device)
    times_on_device = sampler.timesteps.to(noise.device)
    latent = noise * sampler.init_noise_sigma
    for index, timestep in enumerate(sampler.timesteps):
        rows = torch.cat([latent] * sampling.forwards_per_step)
        times = times_on_device[index].expand(len(rows))
        prediction = denoise(sampler.scale_model_input(rows, timestep), times)
        if len(rows) > len(latent):
            uncond, cond = prediction.chunk(2)
            prediction = guide(uncond, cond, sampling.guidance_scale)
        if project is not None:
            prediction = _projected(objective, prediction, latent, alpha_bar[times[: len(latent)]], project)
        latent = sampler.step(prediction, timestep, latent).prev_sample
        if on_step is not None:
            on_step()
    return latent


def guide(uncond: Tensor, cond: Tensor, scale: float) -> Tensor:
    """uncond + scale * (cond - uncond) (paper eq. 4; upstream plms.py). Scale 1 is the conditional prediction."""
    return uncond + scale * (cond - uncond)


def _projected(objective: Objective, prediction: Tensor, noisy: Tensor, alpha_bar: Tensor, project: Project) -> Tensor:
    """The prediction that means the projected x_0."""
    x0 = project(predicted_x0(objective, prediction=prediction, noisy=noisy, alpha_bar=alpha_bar))
    if objective == "x0":
        return x0
    ab = alpha_bar[:, None, None, None]
    noise = (noisy - ab.sqrt() * x0) / (1 - ab).sqrt()
    return target(objective, x0=x0, noise=noise, alpha_bar=alpha_bar)
