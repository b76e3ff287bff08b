"""The objective: one example by hand for each target, from which x_0 is recovered."""

from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pbe.diffusion.objective import add_noise, loss_per_row, min_snr_weight, predicted_x0, target
from pbe.diffusion.schedule import alphas_cumprod
from pbe.diffusion.scheduler_config import scheduler_config
from pbe.diffusion.settings import Objective

OBJECTIVES: tuple[Objective, ...] = get_args(Objective)


def _cell(value: float) -> torch.Tensor:
    return torch.full((1, 1, 1, 1), value)


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        ("x0", 2.0),
        ("eps", -1.0),
        ("v", -2.2),  # 0.6 * -1 - 0.8 * 2
    ],
)
def test_by_hand(objective: Objective, expected: float) -> None:
    """x_0 = 2, n = -1, alpha_bar = 0.36: x_t = 0.6 * 2 + 0.8 * -1 = 0.4."""
    x0, noise, alpha_bar = _cell(2.0), _cell(-1.0), torch.tensor([0.36])
    noisy = add_noise(x0, noise, alpha_bar)
    assert noisy.item() == pytest.approx(0.4, abs=1e-6)
    wanted = target(objective, x0=x0, noise=noise, alpha_bar=alpha_bar)
    assert wanted.item() == pytest.approx(expected, abs=1e-6)
    assert loss_per_row(wanted + 0.5, wanted).item() == pytest.approx(0.25, abs=1e-6)
    again = predicted_x0(objective, prediction=wanted, noisy=noisy, alpha_bar=alpha_bar)
    assert again.item() == pytest.approx(2.0, abs=1e-6)


@pytest.mark.parametrize(
    ("objective", "gamma", "expected"),
    [
        ("x0", 0.5, 0.5),  # snr = 0.36 / 0.64 = 0.5625, above the bound
        ("eps", 0.5, 0.5 / 0.5625),
        ("v", 0.5, 0.5 / 1.5625),
        ("x0", 5.0, 0.5625),
        ("eps", 5.0, 1.0),
        ("v", 5.0, 0.36),
    ],
)
def test_min_snr_by_hand(objective: Objective, gamma: float, expected: float) -> None:
    weight = min_snr_weight(objective, alpha_bar=torch.tensor([0.36]), gamma=gamma)
    assert weight.item() == pytest.approx(expected, abs=1e-6)


def test_min_snr_weighs_one_error_of_x0_alike_whatever_is_predicted() -> None:
    """The three losses are the same loss on x_0, each in other units."""
    generator = torch.Generator().manual_seed(0)
    bars = torch.tensor([0.01, 0.3, 0.9, 0.999], dtype=torch.float64)
    x0, noise, error = (torch.randn(4, 2, 3, 3, generator=generator, dtype=torch.float64) for _ in range(3))
    noisy = add_noise(x0, noise, bars)
    losses = []
    for objective in OBJECTIVES:
        wrong_noise = (noisy - bars.sqrt()[:, None, None, None] * (x0 + error)) / (1 - bars).sqrt()[:, None, None, None]
        prediction = target(objective, x0=x0 + error, noise=wrong_noise, alpha_bar=bars)
        loss = loss_per_row(prediction, target(objective, x0=x0, noise=noise, alpha_bar=bars))
        losses.append(loss * min_snr_weight(objective, alpha_bar=bars, gamma=5.0))
    for other in losses[1:]:
        torch.testing.assert_close(other, losses[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("objective", OBJECTIVES)
@settings(max_examples=50)
@given(bars=st.lists(st.floats(1e-4, 1), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_predicted_x0_inverts_the_target(objective: Objective, bars: list[float], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x0, noise = (torch.randn(len(bars), 2, 3, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    alpha_bar = torch.tensor(bars, dtype=torch.float64)
    noisy = add_noise(x0, noise, alpha_bar)
    wanted = target(objective, x0=x0, noise=noise, alpha_bar=alpha_bar)
    assert wanted.shape == x0.shape
    again = predicted_x0(objective, prediction=wanted, noisy=noisy, alpha_bar=alpha_bar)
    torch.testing.assert_close(again, x0, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_at_no_signal_at_all_the_answer_is_finite(objective: Objective) -> None:
    for bar in (0.0, alphas_cumprod(scheduler_config("squaredcos_cap_v2", "x0"))[-1].item()):
        out = predicted_x0(objective, prediction=_cell(0.3), noisy=_cell(0.4), alpha_bar=torch.tensor([bar]))
        assert torch.isfinite(out).all()


def test_noising_keeps_unit_variance_and_ends_in_pure_signal_or_noise() -> None:
    generator = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(4, 8, 32, 32, generator=generator) for _ in range(2))
    noisy = add_noise(x0, noise, torch.tensor([1.0, 0.7, 0.2, 0.0]))
    assert torch.equal(noisy[0], x0[0]) and torch.equal(noisy[3], noise[3])
    torch.testing.assert_close(noisy.var((1, 2, 3)), torch.ones(4), atol=0.05, rtol=0)


def test_each_row_has_its_own_alpha_bar_and_its_own_loss() -> None:
    x0, noise = torch.ones(2, 1, 2, 2), torch.zeros(2, 1, 2, 2)
    noisy = add_noise(x0, noise, torch.tensor([0.25, 0.81]))
    assert noisy[:, 0, 0, 0].tolist() == pytest.approx([0.5, 0.9])
    prediction = torch.tensor([[[[1.0, 1.0], [1.0, 3.0]]], [[[1.0, 1.0], [1.0, 1.0]]]])
    loss = loss_per_row(prediction.bfloat16(), x0)
    assert loss.dtype == torch.float32 and loss.tolist() == [1.0, 0.0]
