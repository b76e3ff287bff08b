"""Guidance: scale 1 is the condition, 0 none of it, and beyond it goes on in the same direction."""

import pytest
import torch

from pbe.diffusion.guidance import guide
from pbe.diffusion.objective import predicted_x0
from pbe.diffusion.settings import Objective

UNCOND, COND = torch.tensor([1.0, 2.0, -3.0]), torch.tensor([2.0, 2.0, 1.0])


@pytest.mark.parametrize(
    ("scale", "expected"), [(0.0, [1, 2, -3]), (1.0, [2, 2, 1]), (3.0, [4, 2, 9]), (5.0, [6, 2, 17])]
)
def test_by_hand(scale: float, expected: list[float]) -> None:
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
