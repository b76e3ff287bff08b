"""The noise schedules equal their formulas, computed here in float64; samplers use the model's settings."""

from typing import get_args

import numpy as np
import pytest
import torch

from pbe.diffusion.schedule import SamplerError, alphas_cumprod, make_sampler, objective_of, timesteps_of
from pbe.diffusion.scheduler_config import TRAIN_TIMESTEPS, scheduler_config
from pbe.diffusion.settings import BetaSchedule, Objective, SamplerName

SCHEDULES: tuple[BetaSchedule, ...] = get_args(BetaSchedule)
SAMPLERS: tuple[SamplerName, ...] = get_args(SamplerName)


def test_scaled_linear_is_stable_diffusions() -> None:
    """linspace of sqrt(beta) from 0.00085 to 0.012, squared (upstream's "linear")."""
    betas = np.linspace(np.sqrt(0.00085), np.sqrt(0.012), 1000) ** 2
    config = scheduler_config("scaled_linear", "eps")
    np.testing.assert_allclose(alphas_cumprod(config), np.cumprod(1 - betas), rtol=1e-4)


def test_squaredcos_is_nichol_and_dhariwals() -> None:
    """ab(t) = cos^2((t + 0.008) / 1.008 pi / 2), each beta at most 0.999."""
    t = np.arange(1001) / 1000
    bar = np.cos((t + 0.008) / 1.008 * np.pi / 2) ** 2
    betas = np.minimum(1 - bar[1:] / bar[:-1], 0.999)
    config = scheduler_config("squaredcos_cap_v2", "x0")
    np.testing.assert_allclose(alphas_cumprod(config), np.cumprod(1 - betas), rtol=1e-3)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_has_the_same_betas(name: BetaSchedule, sampler: SamplerName) -> None:
    config = scheduler_config(name, "eps")
    bar = alphas_cumprod(config)
    assert bar.shape == (TRAIN_TIMESTEPS,) and bar.dtype == torch.float32
    assert (bar[1:] < bar[:-1]).all() and bar[0] > 0.999 and 0 < bar[-1] < 0.01
    torch.testing.assert_close(make_sampler(config, sampler).alphas_cumprod, bar)


@pytest.mark.parametrize("steps", [1, 2, 25, 50, 1000])
def test_squaredcos_starts_at_the_noisiest_timestep_in_even_steps(steps: int) -> None:
    """Trailing timesteps: the last one of training is the sampler's first."""
    sampler = make_sampler(scheduler_config("squaredcos_cap_v2", "x0"), "ddim")
    sampler.set_timesteps(steps, torch.device("cpu"))
    assert sampler.timesteps.tolist() == [round(1000 - index * 1000 / steps) - 1 for index in range(steps)]


def test_scaled_linear_has_upstreams_timesteps() -> None:
    """ldm's make_ddim_timesteps: every 20th of 1000, plus 1; PLMS then repeats its second one."""
    config = scheduler_config("scaled_linear", "eps")
    expected = list(range(981, 0, -20))
    ddim, plms = make_sampler(config, "ddim"), make_sampler(config, "pndm")
    for sampler in (ddim, plms):
        sampler.set_timesteps(50, torch.device("cpu"))
    assert ddim.timesteps.tolist() == expected
    assert plms.timesteps.tolist() == [981, 961, 961, *expected[2:]]


@pytest.mark.parametrize(
    ("steps", "first", "count"),
    [(50, 981, 50), (30, 991, 31), (4, 751, 4), (7, 995, 8), (3, 667, 3), (600, 999, 999), (1, 1, 1)],
)
def test_upstream_takes_the_whole_schedule_where_steps_do_not_divide_1000(steps: int, first: int, count: int) -> None:
    """make_ddim_timesteps again; at 3 and at 600 steps upstream fails, because its last timestep is 1000."""
    expected = [time + 1 for time in range(0, 1000, 1000 // steps) if time + 1 < 1000][::-1]
    assert (expected[0], len(expected)) == (first, count)
    config = scheduler_config("scaled_linear", "eps")
    assert timesteps_of(make_sampler(config, "ddim"), steps, upstream=True).tolist() == expected
    plms = timesteps_of(make_sampler(config, "pndm"), steps, upstream=True).tolist()
    assert plms == expected[:2] + expected[1:]
    for name in SAMPLERS:
        sampler = make_sampler(config, name)
        asked = timesteps_of(sampler, steps, upstream=False)
        assert asked is sampler.timesteps and len(set(asked.tolist())) == steps
        if 1000 % steps == 0 or name in ("dpm++", "unipc"):
            assert torch.equal(timesteps_of(sampler, steps, upstream=True), asked)
    trailing = make_sampler(scheduler_config("squaredcos_cap_v2", "x0"), "ddim")
    assert len(timesteps_of(trailing, steps, upstream=True)) == steps


@pytest.mark.parametrize("objective", get_args(Objective))
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samplers_know_what_the_network_predicts(objective: Objective, sampler: SamplerName) -> None:
    config = scheduler_config("scaled_linear", objective)
    assert objective_of(config) == objective
    if (sampler, objective) == ("pndm", "x0"):
        with pytest.raises(SamplerError, match="use ddim"):
            make_sampler(config, sampler)
    else:
        assert objective_of(make_sampler(config, sampler).config) == objective


def test_a_foreign_prediction_type_is_refused() -> None:
    assert objective_of({}) == "eps"
    with pytest.raises(SamplerError, match="flow_prediction"):
        objective_of({"prediction_type": "flow_prediction"})
