"""Which exemplar was a fill made from? The rank of its own among all exemplars of the bench, by cosine.

A similarity rewards what the photo around the hole gives away; a rank does so only where it tells the exemplars apart.
Items that were given one and the same picture have one candidate, so that no copy of an own exemplar counts as wrong.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

SAME = 1e-9  # of 1 - cosine: float32 features of one picture differ by less between batches
BLOCK_ROWS = 1024


@dataclass(frozen=True, eq=False)
class Candidates:
    """Different exemplars. vectors: (C, d), of length 1. own: by bench id, the row of its item's exemplar."""

    vectors: np.ndarray
    own: dict[str, int]

    @property
    def chance_rank(self) -> float:
        """Mean rank if every order is as likely."""
        return (len(self.vectors) + 1) / 2

    @property
    def chance_first(self) -> float:
        return 1 / len(self.vectors)


def candidates_of(bench_ids: Sequence[str], exemplars: np.ndarray) -> Candidates:
    """Merge equal rows of the items' exemplars (N, d). Raises ValueError for a row of zeros."""
    vectors = _directions(exemplars)
    first = np.concatenate(
        [
            np.argmax(vectors[start : start + BLOCK_ROWS] @ vectors.T >= 1 - SAME, axis=1)
            for start in range(0, len(vectors), BLOCK_ROWS)
        ]
    )
    kept, own = np.unique(first, return_inverse=True)
    return Candidates(vectors[kept], dict(zip(bench_ids, own.tolist(), strict=True)))


def retrieval_ranks(
    fills: np.ndarray, bench_ids: Sequence[str], candidates: Candidates
) -> tuple[np.ndarray, np.ndarray]:
    """(N, d) features of fills to (N,) ranks of their own exemplars, 1 is best, and (N,) shares of rank 1.

    Exemplars at the same cosine share their ranks: each has the middle one, and of k at the top each is first with 1/k.
    So both have their chance value for a fill that tells nothing. Raises ValueError for a row of zeros.
    """
    cosines = _directions(fills) @ candidates.vectors.T
    own = cosines[np.arange(len(fills)), [candidates.own[name] for name in bench_ids]][:, None]
    closer, level = (cosines > own).sum(1), (cosines == own).sum(1)  # level includes the own one
    return 1 + closer + (level - 1) / 2, np.where(closer == 0, 1 / level, 0.0)


def _directions(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64)
    lengths = np.linalg.norm(x, axis=1, keepdims=True)
    if not lengths.all():
        raise ValueError("a feature row is all zeros: its cosine is not defined")
    return x / lengths
