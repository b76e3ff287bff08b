"""Notices a loss that jumps. Training that diverged raises no error: it would run for hours to a useless model."""

from collections.abc import Sequence

POINTS = 10  # of the loss curve, before the last
FACTOR = 2.0


def jump(losses: Sequence[float]) -> float | None:
    """The mean of the POINTS losses before the last if the last is the first above FACTOR times it; else None.

    losses: of the curve's points so far, positive.
    """
    before = _exceeded(losses)
    return before if before is not None and _exceeded(losses[:-1]) is None else None


def _exceeded(losses: Sequence[float]) -> float | None:
    if len(losses) <= POINTS:
        return None
    before = sum(losses[-POINTS - 1 : -1]) / POINTS
    return before if losses[-1] > FACTOR * before else None
