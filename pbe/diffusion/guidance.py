"""Classifier-free guidance (paper eq. 4; upstream plms.py)."""

from torch import Tensor


def guide(uncond: Tensor, cond: Tensor, scale: float) -> Tensor:
    """uncond + scale * (cond - uncond). Scale 1 is the conditional prediction."""
    return uncond + scale * (cond - uncond)
