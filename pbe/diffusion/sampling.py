"""The sampling loop, with classifier-free guidance, on any of diffusers' deterministic samplers.

Deviation of the sample profile: every predicted x_0 may be projected to valid pixels before the step
(`project`), which keeps a linear codec from leaving the range that images have.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from pbe.diffusion.guidance import guide
from pbe.diffusion.objective import predicted_x0, target
from pbe.diffusion.schedule import Sampler, objective_of
from pbe.diffusion.settings import Objective

# (noisy latent, timestep) -> prediction. Rows: with guidance B unconditional, then B conditional ones; without, B
# conditional ones.
Denoiser = Callable[[Tensor, Tensor], Tensor]
Project = Callable[[Tensor], Tensor]


def forwards_per_step(guidance_scale: float) -> int:
    """Rows that the denoiser gets, per row of noise: at scale 1 the unconditional prediction has no say."""
    return 1 if guidance_scale == 1 else 2


@torch.no_grad()
def sample(
    denoise: Denoiser,
    noise: Tensor,
    *,
    sampler: Sampler,
    steps: int,
    guidance_scale: float,
    project: Project | None = None,
    on_step: Callable[[], object] | None = None,
) -> Tensor:
    """From noise (B, C, h, w) ~ N(0, I) to a latent x_0 of the same shape. on_step is called after each forward.

    diffusers' samplers look timesteps up and compare them, so these stay on the CPU: on a GPU each look would wait for
    the forward before it.
    """
    sampler.set_timesteps(steps, device=torch.device("cpu"))
    objective = objective_of(sampler.config)
    alpha_bar = sampler.alphas_cumprod.to(noise.device)
    times_on_device = sampler.timesteps.to(noise.device)
    latent = noise * sampler.init_noise_sigma
    for index, timestep in enumerate(sampler.timesteps):
        rows = torch.cat([latent] * forwards_per_step(guidance_scale))
        times = times_on_device[index].expand(len(rows))
        prediction = denoise(sampler.scale_model_input(rows, timestep), times)
        if len(rows) > len(latent):
            uncond, cond = prediction.chunk(2)
            prediction = guide(uncond, cond, guidance_scale)
        if project is not None:
            prediction = _projected(objective, prediction, latent, alpha_bar[times[: len(latent)]], project)
        latent = sampler.step(prediction, timestep, latent).prev_sample
        if on_step is not None:
            on_step()
    return latent


def _projected(objective: Objective, prediction: Tensor, noisy: Tensor, alpha_bar: Tensor, project: Project) -> Tensor:
    """The prediction that means the projected x_0."""
    x0 = project(predicted_x0(objective, prediction=prediction, noisy=noisy, alpha_bar=alpha_bar))
    if objective == "x0":
        return x0
    ab = alpha_bar[:, None, None, None]
    noise = (noisy - ab.sqrt() * x0) / (1 - ab).sqrt()
    return target(objective, x0=x0, noise=noise, alpha_bar=alpha_bar)
