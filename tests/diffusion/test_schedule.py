"""The noise schedules equal their formulas, computed here in float64."""

import numpy as np
import pytest
import torch

from pbe.diffusion.schedule import TRAIN_TIMESTEPS, BetaSchedule, alphas_cumprod, make_scheduler

SCHEDULES: tuple[BetaSchedule, ...] = ("squaredcos_cap_v2", "scaled_linear")


def test_scaled_linear_is_stable_diffusions() -> None:
    """linspace of sqrt(beta) from 0.00085 to 0.012, squared (upstream's "linear")."""
    betas = np.linspace(np.sqrt(0.00085), np.sqrt(0.012), 1000) ** 2
    np.testing.assert_allclose(alphas_cumprod("scaled_linear"), np.cumprod(1 - betas), rtol=1e-4)


def test_squaredcos_is_nichol_and_dhariwals() -> None:
    """ab(t) = cos^2((t + 0.008) / 1.008 pi / 2), each beta at most 0.999."""
    t = np.arange(1001) / 1000
    bar = np.cos((t + 0.008) / 1.008 * np.pi / 2) ** 2
    betas = np.minimum(1 - bar[1:] / bar[:-1], 0.999)
    np.testing.assert_allclose(alphas_cumprod("squaredcos_cap_v2"), np.cumprod(1 - betas), rtol=1e-3)


@pytest.mark.parametrize("name", SCHEDULES)
def test_alpha_bar_falls_from_almost_one_towards_zero(name: BetaSchedule) -> None:
    bar = alphas_cumprod(name)
    assert bar.shape == (TRAIN_TIMESTEPS,) and bar.dtype == torch.float32
    assert (bar[1:] < bar[:-1]).all() and bar[0] > 0.999 and 0 < bar[-1] < 0.01


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 2, 25, 50, 1000])
def test_sampling_starts_at_the_noisiest_timestep_in_even_steps(name: BetaSchedule, steps: int) -> None:
    """Trailing timesteps: training's last one is the sampler's first."""
    scheduler = make_scheduler(name)
    scheduler.set_timesteps(steps)
    times = scheduler.timesteps.tolist()
    assert times == [round(1000 - index * 1000 / steps) - 1 for index in range(steps)]
