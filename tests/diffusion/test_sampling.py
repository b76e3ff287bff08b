"""The sampling loop: told the true x_0 it returns it; guidance, projection and rows do what their names say."""

from typing import get_args

import pytest
import torch
from torch import Tensor

from pbe.diffusion.objective import Objective, target
from pbe.diffusion.sampling import Denoiser, sample
from pbe.diffusion.schedule import BetaSchedule, alphas_cumprod

SCHEDULES: tuple[BetaSchedule, ...] = get_args(BetaSchedule)
SHAPE = (3, 2, 4, 4)


def _normal(seed: int) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _oracle(objective: Objective, schedule: BetaSchedule, cond: Tensor, uncond: Tensor | None = None) -> Denoiser:
    """Predicts as a network would that knows x_0: `cond` for the second half of the rows, `uncond` for the first."""
    x0 = torch.cat([cond if uncond is None else uncond, cond])

    def denoise(noisy: Tensor, timestep: Tensor) -> Tensor:
        assert noisy.shape == x0.shape and timestep.shape == (len(x0),)
        alpha_bar = alphas_cumprod(schedule).double()[timestep]
        ab = alpha_bar.clamp_min(1e-8)[:, None, None, None]
        noise = (noisy - ab.sqrt() * x0) / (1 - ab).sqrt()
        return target(objective, x0=x0, noise=noise, alpha_bar=ab[:, 0, 0, 0])

    return denoise


def _sample(denoise: Denoiser, **changes) -> Tensor:
    settings = dict(steps=10, guidance_scale=1.0, objective="x0", beta_schedule="squaredcos_cap_v2")
    return sample(denoise, _normal(0), **{**settings, **changes})


@pytest.mark.parametrize("steps", [1, 2, 25])
@pytest.mark.parametrize("objective", get_args(Objective))
def test_told_the_truth_it_returns_the_truth(objective: Objective, steps: int) -> None:
    truth = _normal(1)
    out = _sample(_oracle(objective, "squaredcos_cap_v2", truth), objective=objective, steps=steps)
    torch.testing.assert_close(out, truth, atol=1e-3, rtol=0)


@pytest.mark.parametrize("objective", get_args(Objective))
def test_scaled_linear_ends_at_the_noise_of_its_first_timestep_as_upstream(objective: Objective) -> None:
    """set_alpha_to_one is False there: the result keeps sqrt(1 - alpha_bar_0) = 0.029 of the noise."""
    truth, first = _normal(1), alphas_cumprod("scaled_linear").double()[[0, 999]]
    out = _sample(
        _oracle(objective, "scaled_linear", truth), objective=objective, beta_schedule="scaled_linear", steps=25
    )
    noise = (_normal(0) - first[1].sqrt() * truth) / (1 - first[1]).sqrt()
    torch.testing.assert_close(out, first[0].sqrt() * truth + (1 - first[0]).sqrt() * noise, atol=1e-3, rtol=0)


def test_timesteps_fall_and_all_rows_share_them() -> None:
    seen: list[int] = []

    def denoise(noisy: Tensor, timestep: Tensor) -> Tensor:
        assert (timestep == timestep[0]).all() and torch.equal(*noisy.chunk(2))
        seen.append(int(timestep[0]))
        return noisy

    _sample(denoise, steps=25)
    assert len(seen) == 25 and seen[0] == 999 and seen == sorted(seen, reverse=True)


def test_guidance_scale_one_is_the_conditional_half_and_scale_s_goes_beyond() -> None:
    cond, uncond = _normal(1), _normal(2)
    for scale in (1.0, 0.0, 3.0):
        out = _sample(_oracle("x0", "squaredcos_cap_v2", cond, uncond), guidance_scale=scale)
        torch.testing.assert_close(out, uncond + scale * (cond - uncond), atol=1e-4, rtol=0)


def test_every_predicted_x0_is_projected() -> None:
    calls: list[Tensor] = []

    def project(x0: Tensor) -> Tensor:
        calls.append(x0)
        return x0.clamp(-0.5, 0.5)

    truth = _normal(1)
    out = _sample(_oracle("x0", "squaredcos_cap_v2", truth), project=project, steps=8)
    torch.testing.assert_close(out, truth.clamp(-0.5, 0.5), atol=1e-4, rtol=0)
    assert len(calls) == 8 and all(call.shape == SHAPE for call in calls)


def test_it_is_deterministic_and_rows_do_not_touch_each_other() -> None:
    def denoise(noisy: Tensor, timestep: Tensor) -> Tensor:
        return torch.tanh(noisy) * (1 + timestep[:, None, None, None] / 1000)

    settings = dict(steps=9, guidance_scale=1.0, objective="eps", beta_schedule="scaled_linear")
    noise, state = _normal(0), torch.random.get_rng_state()
    together = sample(denoise, noise, **settings)
    assert torch.equal(together, sample(denoise, noise, **settings))
    assert torch.equal(torch.random.get_rng_state(), state)
    alone = torch.cat([sample(denoise, row[None], **settings) for row in noise])
    torch.testing.assert_close(alone, together)
    assert torch.equal(noise, _normal(0))  # the caller's noise stays


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_without_gradients(schedule: BetaSchedule) -> None:
    weight = torch.ones((), requires_grad=True, dtype=torch.float64)
    assert not _sample(lambda noisy, _: noisy * weight, steps=2, beta_schedule=schedule).requires_grad
