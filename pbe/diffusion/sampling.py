"""The sampling loop, with classifier-free guidance, for diffusers' deterministic samplers.

Deviation of the sample profile: `project` may map every predicted x_0 to valid pixels before the step, which keeps a
linear codec within the range of images.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pbe.diffusion.objective import predicted_x0, target
from pbe.diffusion.schedule import default_sampler, make_sampler, objective_of, timesteps_of
from pbe.diffusion.scheduler_config import TRAIN_TIMESTEPS
from pbe.diffusion.settings import Objective, SamplerName

# (noisy latent, timestep) -> prediction, for the rows of a Condition
Denoiser = Callable[[Tensor, Tensor], Tensor]
Project = Callable[[Tensor], Tensor]
# (latent after a step, alpha_bar () of its noise, 1 after the last) -> the latent that the next step takes
Blend = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Sampling:
    """Sampling settings. Raises ValueError for steps outside 1 to 1000 and for a scale that is not finite."""

    guidance_scale: float = 5.0  # as in upstream's commands; 1 = no guidance. The sample profile uses 3
    steps: int = 50  # upstream
    sampler: SamplerName | None = None  # None: the model's own

    def __post_init__(self) -> None:
        if not 1 <= self.steps <= TRAIN_TIMESTEPS or not math.isfinite(self.guidance_scale):
            settings = f"steps {self.steps}, guidance scale {self.guidance_scale}"
            raise ValueError(f"{settings}: steps must be 1 to {TRAIN_TIMESTEPS}, the scale finite")

    @property
    def forwards_per_step(self) -> int:
        """Denoiser rows per row of noise: 2, or 1 at scale 1, which ignores the unconditional prediction."""
        return 1 if self.guidance_scale == 1 else 2


@dataclass(frozen=True)
class Condition:
    """The network's inputs besides B noisy latents, in R rows.

    With guidance R = 2 B: B unconditional rows, then B conditional ones. Without, R = B conditional rows.
    """

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
        """The condition of B rows, repeated for guidance and cast to the network's dtype."""
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
    upstream_timesteps: bool = False,
    project: Project | None = None,
    blend: Blend | None = None,
    on_step: Callable[[], object] | None = None,
) -> Tensor:
    """Denoise (B, C, h, w) ~ N(0, I) to latents x_0 of the same shape.

    scheduler: the model's scheduler config. upstream_timesteps: as `timesteps_of` says. blend: called after each step,
    as blended diffusion puts the noised photo back. on_step: called after each forward. Timesteps stay on the CPU,
    because diffusers' samplers compare them, which on a GPU would wait for the previous forward. Raises SamplerError.
    """
    sampler = make_sampler(scheduler, sampling.sampler or default_sampler(scheduler))
    timesteps = timesteps_of(sampler, sampling.steps, upstream=upstream_timesteps)
    objective = objective_of(sampler.config)
    alpha_bar = sampler.alphas_cumprod.to(noise.device)
    times_on_device = timesteps.to(noise.device)
    latent = noise * sampler.init_noise_sigma
    for index, timestep in enumerate(timesteps):
        rows = torch.cat([latent] * sampling.forwards_per_step)
        times = times_on_device[index].expand(len(rows))
        prediction = denoise(sampler.scale_model_input(rows, timestep), times)
        if len(rows) > len(latent):
            uncond, cond = prediction.chunk(2)
            prediction = guide(uncond, cond, sampling.guidance_scale)
        if project is not None:
            prediction = _projected(objective, prediction, latent, alpha_bar[times[: len(latent)]], project)
        latent = sampler.step(prediction, timestep, latent).prev_sample
        if blend is not None:
            is_last = index + 1 == len(timesteps)
            latent = blend(latent, alpha_bar.new_ones(()) if is_last else alpha_bar[times_on_device[index + 1]])
        if on_step is not None:
            on_step()
    return latent


def guide(uncond: Tensor, cond: Tensor, scale: float) -> Tensor:
    """uncond + scale * (cond - uncond) (paper eq. 4; upstream plms.py). Scale 1 is the conditional prediction."""
    return uncond + scale * (cond - uncond)


def _projected(objective: Objective, prediction: Tensor, noisy: Tensor, alpha_bar: Tensor, project: Project) -> Tensor:
    """The prediction that implies the projected x_0."""
    x0 = project(predicted_x0(objective, prediction=prediction, noisy=noisy, alpha_bar=alpha_bar))
    if objective == "x0":
        return x0
    ab = alpha_bar[:, None, None, None]
    noise = (noisy - ab.sqrt() * x0) / (1 - ab).sqrt()
    return target(objective, x0=x0, noise=noise, alpha_bar=alpha_bar)
