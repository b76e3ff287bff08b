"""The sampling loop: deterministic DDIM (eta 0) on predicted x_0, with guidance.

Deviation of the sample profile: every predicted x_0 may be projected to valid pixels before the step
(`project`), which keeps a linear codec from leaving the range that images have.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from pbe.diffusion.guidance import guide
from pbe.diffusion.objective import Objective, predicted_x0
from pbe.diffusion.schedule import BetaSchedule, make_scheduler

# (noisy latent (2B, C, h, w), timestep (2B,)) -> prediction; rows 0..B-1 unconditional, B..2B-1 conditional
Denoiser = Callable[[Tensor, Tensor], Tensor]


@torch.no_grad()
def sample(
    denoise: Denoiser,
    noise: Tensor,
    *,
    steps: int,
    guidance_scale: float,
    objective: Objective,
    beta_schedule: BetaSchedule,
    project: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """From noise (B, C, h, w) ~ N(0, I) to a latent x_0 of the same shape."""
    scheduler = make_scheduler(beta_schedule)
    scheduler.set_timesteps(steps)
    latent = noise
    for timestep in scheduler.timesteps:
        doubled = torch.cat([latent, latent])
        times = timestep.expand(len(doubled)).to(latent.device)
        prediction = denoise(doubled, times)
        alpha_bar = scheduler.alphas_cumprod.to(latent.device)[times]
        uncond, cond = predicted_x0(objective, prediction=prediction, noisy=doubled, alpha_bar=alpha_bar).chunk(2)
        x0 = guide(uncond, cond, guidance_scale)
        if project is not None:
            x0 = project(x0)
        latent = scheduler.step(x0, timestep, latent, eta=0.0).prev_sample
    return latent
