"""The training objective.

Forward process:   x_t = sqrt(ab_t) x_0 + sqrt(1 - ab_t) n,     n ~ N(0, I),  ab_t = prod_s (1 - beta_s)
Loss:              L = E || target - f(x_t, t, masked latent, keep mask, c) ||^2, mean over all latent cells,
                   without a mask weight (paper eq. 2; upstream ddpm.py p_losses)
target:            eps -> n                                       (paper, upstream)
                   x0  -> x_0                                     (sample profile: no speckle at small budgets)
                   v   -> sqrt(ab_t) n - sqrt(1 - ab_t) x_0       (Salimans & Ho 2022, eq. 9)

weight (optional):  with snr = ab_t / (1 - ab_t) and a bound g, the loss on x_0 is weighted by min(snr, g), which is
                   min(snr, g) / snr on eps, min(snr, g) / (snr + 1) on v  (min-SNR, Hang et al. 2023; upstream: none)

Only the first C channels of the network's input are noised; the masked latent and the keep mask are given clean.
"""

from torch import Tensor

from pbe.diffusion.settings import Objective


def add_noise(x0: Tensor, noise: Tensor, alpha_bar: Tensor) -> Tensor:
    """x_t for latents (B, C, h, w) and alpha_bar (B,) in (0, 1]."""
    ab = alpha_bar[:, None, None, None]
    return ab.sqrt() * x0 + (1 - ab).sqrt() * noise


def target(objective: Objective, *, x0: Tensor, noise: Tensor, alpha_bar: Tensor) -> Tensor:
    """Return what the network should predict, shaped like x0."""
    if objective == "x0":
        return x0
    if objective == "eps":
        return noise
    ab = alpha_bar[:, None, None, None]
    return ab.sqrt() * noise - (1 - ab).sqrt() * x0


def predicted_x0(objective: Objective, *, prediction: Tensor, noisy: Tensor, alpha_bar: Tensor) -> Tensor:
    """The x_0 that a prediction implies, from the forward process.

    For eps at alpha_bar = 0 (the last step of squaredcos) x_0 is undetermined; alpha_bar is at least 1e-8 here.
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


def min_snr_weight(objective: Objective, *, alpha_bar: Tensor, gamma: float) -> Tensor:
    """(B,) min-SNR weights of the rows' losses, for alpha_bar (B,) in (0, 1)."""
    snr = alpha_bar / (1 - alpha_bar).clamp_min(1e-8)
    bounded = snr.clamp_max(gamma)
    if objective == "x0":
        return bounded
    return bounded / (snr.clamp_min(1e-8) if objective == "eps" else snr + 1)
