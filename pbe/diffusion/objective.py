"""The training objective.

Forward process:   x_t = sqrt(ab_t) x_0 + sqrt(1 - ab_t) n,     n ~ N(0, I),  ab_t = prod_s (1 - beta_s)
Loss:              L = E || target - f(x_t, t, masked latent, keep mask, c) ||^2, mean over all latent cells,
                   not weighted by the mask (paper eq. 2; upstream ddpm.py p_losses)
target:            eps -> n                                       (paper, upstream)
                   x0  -> x_0                                     (sample profile: no speckle at small budgets)
                   v   -> sqrt(ab_t) n - sqrt(1 - ab_t) x_0       (Salimans & Ho 2022, eq. 9)

Only the first C channels of the network's input are noised; the masked latent and the keep mask are given clean.
"""

from typing import Literal

from torch import Tensor

Objective = Literal["x0", "eps", "v"]


def add_noise(x0: Tensor, noise: Tensor, alpha_bar: Tensor) -> Tensor:
    """x_t for latents (B, C, h, w) and alpha_bar (B,) in (0, 1]."""
    ab = alpha_bar[:, None, None, None]
    return ab.sqrt() * x0 + (1 - ab).sqrt() * noise


def target(objective: Objective, *, x0: Tensor, noise: Tensor, alpha_bar: Tensor) -> Tensor:
    """What the network should predict, shaped like x0."""
    if objective == "x0":
        return x0
    if objective == "eps":
        return noise
    ab = alpha_bar[:, None, None, None]
    return ab.sqrt() * noise - (1 - ab).sqrt() * x0


def predicted_x0(objective: Objective, *, prediction: Tensor, noisy: Tensor, alpha_bar: Tensor) -> Tensor:
    """The x_0 that a prediction means, by solving the forward process for it.

    For eps at alpha_bar = 0 (the last step of squaredcos) x_0 is undetermined; alpha_bar is floored at 1e-8.
    """
    if objective == "x0":
        return prediction
    ab = alpha_bar[:, None, None, None].clamp_min(1e-8)
    if objective == "eps":
        return (noisy - (1 - ab).sqrt() * prediction) / ab.sqrt()
    return ab.sqrt() * noisy - (1 - ab).sqrt() * prediction


def loss_per_row(prediction: Tensor, wanted: Tensor) -> Tensor:
    """(B,) float32 mean squared error of each row."""
    return (prediction.float() - wanted.float()).pow(2).flatten(1).mean(1)
