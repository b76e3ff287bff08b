"""Noise schedules and samplers from diffusers. Betas are always given: diffusers' defaults are not Stable Diffusion's.

A model has one scheduler config (scheduler/scheduler_config.json in the hub layout): betas, what the network predicts,
and how timesteps are spaced. Every sampler is built from it.
"""

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, PNDMScheduler, UniPCMultistepScheduler
from torch import Tensor

from pbe.diffusion.scheduler_config import PREDICTION_TYPES, TRAIN_TIMESTEPS
from pbe.diffusion.settings import Objective, SamplerName
from pbe.errors import UserError


class Sampler(Protocol):
    """The part of diffusers' schedulers that the sampling loop uses."""

    config: Mapping[str, Any]
    timesteps: Tensor
    alphas_cumprod: Tensor
    init_noise_sigma: float

    def set_timesteps(self, num_inference_steps: int, device: torch.device) -> None: ...
    def scale_model_input(self, sample: Tensor, timestep: Tensor) -> Tensor: ...
    def step(self, model_output: Tensor, timestep: Tensor, sample: Tensor) -> Any: ...


class SamplerError(UserError, ValueError):
    """A scheduler config is not supported, or the sampler does not support the model's prediction type."""


def objective_of(config: Mapping[str, Any]) -> Objective:
    """Return what the network predicts, from a scheduler config. Raises SamplerError."""
    kind = config.get("prediction_type", "epsilon")  # the hub's oldest configs lack the key
    for objective, name in PREDICTION_TYPES.items():
        if name == kind:
            return objective
    raise SamplerError(f"scheduler: unknown prediction_type {kind!r}; known are {', '.join(PREDICTION_TYPES.values())}")


def default_sampler(config: Mapping[str, Any]) -> SamplerName:
    """The sampler that the scheduler config names: pndm, or ddim for any other."""
    return "pndm" if config.get("_class_name") == "PNDMScheduler" else "ddim"


def make_sampler(config: Mapping[str, Any], name: SamplerName) -> Sampler:
    """The named deterministic sampler, with the model's betas and spacing. Raises SamplerError."""
    objective = objective_of(config)
    if name == "pndm":
        if objective == "x0":
            raise SamplerError("sampler pndm: this model predicts x0, pndm needs eps or v; use ddim, dpm++ or unipc")
        # regardless of the config: the PRK steps would cost 9 more forwards, and upstream has none
        return PNDMScheduler.from_config(dict(config), skip_prk_steps=True)
    if name == "ddim":
        return DDIMScheduler.from_config(dict(config))
    if name == "dpm++":
        return DPMSolverMultistepScheduler.from_config(dict(config), algorithm_type="dpmsolver++")
    return UniPCMultistepScheduler.from_config(dict(config))


def timesteps_of(sampler: Sampler, steps: int, *, upstream: bool) -> Tensor:
    """Set the sampler to `steps` and return the timesteps of its forwards, on the CPU; pndm repeats its second one.

    upstream: as make_ddim_timesteps, every 1000 // steps-th timestep of the whole schedule: where `steps` does not
    divide 1000 they are more than asked, 31 for 30. diffusers takes the first `steps` of them, so that sampling begins
    at 958 in place of 991. Upstream fails where its last one is 1000 (at 3, 9, 27, 37 steps ...), which is left out
    here. It has only pndm and ddim, on Stable Diffusion's spacing: others stay as they are.
    """
    sampler.set_timesteps(steps, device=torch.device("cpu"))
    config = sampler.config
    if not upstream or config.get("timestep_spacing") != "leading":
        return sampler.timesteps
    if not isinstance(sampler, PNDMScheduler | DDIMScheduler):
        return sampler.timesteps
    times = list(range(config["steps_offset"], TRAIN_TIMESTEPS, TRAIN_TIMESTEPS // steps))[::-1]
    return torch.tensor(times[:2] + times[1:] if isinstance(sampler, PNDMScheduler) else times)


def alphas_cumprod(config: Mapping[str, Any]) -> Tensor:
    """alpha_bar_t for t = 0 .. 999, float32."""
    return DDIMScheduler.from_config(dict(config)).alphas_cumprod.to(torch.float32)
