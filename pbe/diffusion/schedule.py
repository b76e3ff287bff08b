"""Noise schedules, by diffusers. beta values are passed explicitly: diffusers' defaults are not SD's."""

from typing import Literal

import torch
from diffusers import DDIMScheduler
from torch import Tensor

BetaSchedule = Literal["squaredcos_cap_v2", "scaled_linear"]
TRAIN_TIMESTEPS = 1000  # upstream configs/v1.yaml


def make_scheduler(beta_schedule: BetaSchedule) -> DDIMScheduler:
    """DDIM on predicted x0 (`sampling` converts every objective to x0 first), trailing timesteps.

    scaled_linear with 0.00085 .. 0.012 is upstream's "linear" schedule (its v1.yaml).
    """
    return DDIMScheduler(
        num_train_timesteps=TRAIN_TIMESTEPS,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule=beta_schedule,
        clip_sample=False,
        set_alpha_to_one=beta_schedule != "scaled_linear",
        prediction_type="sample",
        timestep_spacing="trailing",
    )


def alphas_cumprod(beta_schedule: BetaSchedule) -> Tensor:
    """alpha_bar_t for t = 0 .. 999, float32."""
    return make_scheduler(beta_schedule).alphas_cumprod.to(torch.float32)
