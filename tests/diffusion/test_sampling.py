"""The sampling loop: a network that knows x_0 gets it back; guidance, projection and row order are right."""

from functools import partial
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from pbe.diffusion.objective import predicted_x0, target
from pbe.diffusion.sampling import Condition, Denoiser, Sampling, guide, sample
from pbe.diffusion.schedule import alphas_cumprod
from pbe.diffusion.scheduler_config import scheduler_config
from pbe.diffusion.settings import BetaSchedule, Objective, SamplerName

SCHEDULES: tuple[BetaSchedule, ...] = get_args(BetaSchedule)
SAMPLERS: tuple[SamplerName, ...] = get_args(SamplerName)
SHAPE = (3, 2, 4, 4)
UNCOND, COND = torch.tensor([1.0, 2.0, -3.0]), torch.tensor([2.0, 2.0, 1.0])


def _normal(seed: int) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _oracle(objective: Objective, schedule: BetaSchedule, cond: Tensor, uncond: Tensor | None = None) -> Denoiser:
    """A network that knows x_0: predicts `cond`, or with twice as many rows `uncond` for the first half."""

    def denoise(noisy: Tensor, timestep: Tensor) -> Tensor:
        x0 = cond if len(noisy) == len(cond) else torch.cat([cond if uncond is None else uncond, cond])
        assert noisy.shape == x0.shape and timestep.shape == (len(x0),)
        alpha_bar = alphas_cumprod(scheduler_config(schedule, objective)).double()[timestep]
        ab = alpha_bar.clamp_min(1e-8)[:, None, None, None]
        noise = (noisy - ab.sqrt() * x0) / (1 - ab).sqrt()
        return target(objective, x0=x0, noise=noise, alpha_bar=ab[:, 0, 0, 0])

    return denoise


def _sample(
    denoise: Denoiser,
    *,
    objective: Objective = "x0",
    beta_schedule: BetaSchedule = "squaredcos_cap_v2",
    sampler: SamplerName = "ddim",
    noise: Tensor | None = None,
    steps: int = 10,
    guidance_scale: float = 1.0,
    **more: Any,
) -> Tensor:
    scheduler, noise = scheduler_config(beta_schedule, objective), _normal(0) if noise is None else noise
    return sample(denoise, noise, scheduler=scheduler, sampling=Sampling(guidance_scale, steps, sampler), **more)


@pytest.mark.parametrize("steps", [1, 2, 25])
@pytest.mark.parametrize("objective", get_args(Objective))
def test_told_the_truth_it_returns_the_truth(objective: Objective, steps: int) -> None:
    if (objective, steps) == ("eps", 1):
        pytest.skip("at the noisiest timestep, alpha_bar 2e-9, eps says nothing of x_0")
    truth = _normal(1)
    out = _sample(_oracle(objective, "squaredcos_cap_v2", truth), objective=objective, steps=steps)
    torch.testing.assert_close(out, truth, atol=1e-3, rtol=0)


@pytest.mark.parametrize("objective", get_args(Objective))
def test_scaled_linear_ends_at_the_noise_of_its_first_timestep_as_upstream(objective: Objective) -> None:
    """With set_alpha_to_one False the result keeps sqrt(1 - alpha_bar_0) = 0.029 of the noise."""
    bars = alphas_cumprod(scheduler_config("scaled_linear", objective)).double()
    truth, first = _normal(1), bars[[0, 961]]  # 25 steps: 961, 921 .. 1
    out = _sample(
        _oracle(objective, "scaled_linear", truth), objective=objective, beta_schedule="scaled_linear", steps=25
    )
    noise = (_normal(0) - first[1].sqrt() * truth) / (1 - first[1]).sqrt()
    torch.testing.assert_close(out, first[0].sqrt() * truth + (1 - first[0]).sqrt() * noise, atol=1e-3, rtol=0)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("objective", ["eps", "v"])
def test_every_sampler_finds_the_truth_at_the_papers_settings(sampler: SamplerName, objective: Objective) -> None:
    truth, spent = _normal(1), []
    out = _sample(
        _oracle(objective, "scaled_linear", truth), objective=objective, beta_schedule="scaled_linear", steps=50,
        sampler=sampler, guidance_scale=5.0, on_step=lambda: spent.append(1),
    )  # fmt: skip
    assert (out - truth).abs().max() < 0.25 and len(spent) == (51 if sampler == "pndm" else 50)


def test_timesteps_fall_and_all_rows_share_them() -> None:
    seen: list[int] = []

    def denoise(noisy: Tensor, timestep: Tensor) -> Tensor:
        assert len(noisy) == 2 * SHAPE[0] and (timestep == timestep[0]).all() and torch.equal(*noisy.chunk(2))
        seen.append(int(timestep[0]))
        return noisy

    _sample(denoise, steps=25, guidance_scale=2.0)
    assert len(seen) == 25 and seen[0] == 999 and seen == sorted(seen, reverse=True)


def test_guidance_scale_one_is_the_conditional_half_and_scale_s_goes_beyond() -> None:
    cond, uncond = _normal(1), _normal(2)
    for scale in (1.0, 0.0, 3.0):  # 1: the conditional rows alone
        out = _sample(_oracle("x0", "squaredcos_cap_v2", cond, uncond), guidance_scale=scale)
        torch.testing.assert_close(out, uncond + scale * (cond - uncond), atol=1e-4, rtol=0)


@pytest.mark.parametrize("objective", get_args(Objective))
def test_every_predicted_x0_is_projected(objective: Objective) -> None:
    calls: list[Tensor] = []

    def project(x0: Tensor) -> Tensor:
        calls.append(x0)
        return x0.clamp(-0.5, 0.5)

    truth = _normal(1)
    out = _sample(_oracle(objective, "squaredcos_cap_v2", truth), project=project, steps=8, objective=objective)
    torch.testing.assert_close(out, truth.clamp(-0.5, 0.5), atol=1e-3, rtol=0)
    assert len(calls) == 8 and all(call.shape == SHAPE for call in calls)


def test_it_is_deterministic_and_rows_do_not_touch_each_other() -> None:
    def denoise(noisy: Tensor, timestep: Tensor) -> Tensor:
        return torch.tanh(noisy) * (1 + timestep[:, None, None, None] / 1000)

    run = partial(_sample, denoise, steps=9, objective="eps", beta_schedule="scaled_linear")
    noise, state = _normal(0), torch.random.get_rng_state()
    for sampler in SAMPLERS:
        together = run(noise=noise, sampler=sampler)
        assert torch.equal(together, run(noise=noise, sampler=sampler))
        assert torch.equal(torch.random.get_rng_state(), state)
    alone = torch.cat([run(noise=row[None], sampler=sampler) for row in noise])
    torch.testing.assert_close(alone, together)
    assert torch.equal(noise, _normal(0))  # the caller's noise is unchanged


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_without_gradients(schedule: BetaSchedule) -> None:
    weight = torch.ones((), requires_grad=True, dtype=torch.float64)
    assert not _sample(lambda noisy, _: noisy * weight, steps=2, beta_schedule=schedule).requires_grad


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_no_sampler_reads_a_value_of_the_device(sampler: SamplerName) -> None:
    """On a GPU each read would wait for the previous forward. Reading a meta tensor, which has no values, raises."""
    noise = torch.empty(SHAPE, device="meta")
    out = sample(
        lambda noisy, timestep: noisy * timestep[:, None, None, None],
        noise,
        scheduler=scheduler_config("scaled_linear", "eps"),
        sampling=Sampling(guidance_scale=3.0, steps=10, sampler=sampler),
        project=lambda latent: latent.clamp(-1, 1),
    )
    assert out.device.type == "meta" and out.shape == SHAPE


# -- guidance and settings ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scale", "expected"), [(0.0, [1, 2, -3]), (1.0, [2, 2, 1]), (3.0, [4, 2, 9]), (5.0, [6, 2, 17])]
)
def test_guidance_by_hand(scale: float, expected: list[float]) -> None:
    assert guide(UNCOND, COND, scale).tolist() == expected


@pytest.mark.parametrize("scale", [0.0, 1.0, 7.5])
def test_equal_predictions_need_no_scale(scale: float) -> None:
    assert torch.equal(guide(COND, COND, scale), COND)


@pytest.mark.parametrize("objective", ["x0", "eps", "v"])
def test_guiding_x0_is_guiding_the_prediction(objective: Objective) -> None:
    """We guide x_0, upstream guides eps: the same, because x_0 is affine in the prediction."""
    generator = torch.Generator().manual_seed(0)
    noisy, uncond, cond = (torch.randn(4, 2, 3, 3, generator=generator, dtype=torch.float64) for _ in range(3))
    alpha_bar = torch.tensor([0.9, 0.5, 0.1, 0.01], dtype=torch.float64)

    def x0(prediction: torch.Tensor) -> torch.Tensor:
        return predicted_x0(objective, prediction=prediction, noisy=noisy, alpha_bar=alpha_bar)

    torch.testing.assert_close(guide(x0(uncond), x0(cond), 5.0), x0(guide(uncond, cond, 5.0)))


@pytest.mark.parametrize(
    "changes", [{"steps": 0}, {"steps": -1}, {"steps": 1001}, {"guidance_scale": float("nan")}], ids=str
)
def test_settings_without_a_meaning_are_refused(changes: dict[str, Any]) -> None:
    """With PRK steps PNDM would take more steps than there are timesteps, and repeat some."""
    (value,) = changes.values()
    with pytest.raises(ValueError, match=str(value)):
        Sampling(**changes)


@pytest.mark.parametrize(("scale", "drop"), [(1.0, [False] * 2), (3.0, [True] * 2 + [False] * 2)])
def test_with_guidance_the_unconditional_rows_come_first(scale: float, drop: list[bool]) -> None:
    latent, keep, tokens = torch.randn(2, 4, 3, 3), torch.rand(2, 1, 3, 3), torch.randn(2, 5, 7)
    given = Condition.of_rows(latent, keep, tokens, sampling=Sampling(scale), dtype=torch.bfloat16)
    assert given.drop_condition.tolist() == drop
    for value, rows in ((given.masked_latent, latent), (given.keep_mask_latent, keep), (given.exemplar_tokens, tokens)):
        assert len(value) == len(drop) and all(torch.equal(part, rows.bfloat16()) for part in value.split(2))
