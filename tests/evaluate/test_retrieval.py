"""Ranks of exemplars worked out by hand: what equal pictures and equal cosines count."""

import numpy as np
import pytest

from pbe.evaluate.metrics import retrieval as module
from pbe.evaluate.metrics.retrieval import candidates_of, retrieval_ranks

EAST, NORTH, WEST = (1.0, 0.0), (0.0, 2.0), (-3.0, 0.0)


@pytest.mark.parametrize("block", [1, 1024])
def test_one_picture_for_several_items_is_one_candidate(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second is the first to float32's last bits, as batches differ."""
    monkeypatch.setattr(module, "BLOCK_ROWS", block)
    found = candidates_of(["a", "b", "c"], np.array([EAST, (1.0, 1e-7), NORTH]))
    assert len(found.vectors) == 2 and found.own["a"] == found.own["b"] != found.own["c"]
    assert (found.chance_rank, found.chance_first) == (1.5, 0.5)
    ranks, first = retrieval_ranks(np.array([EAST, EAST, EAST]), ["a", "b", "c"], found)
    assert ranks.tolist() == [1, 1, 2] and first.tolist() == [1, 1, 0]


def test_ranks_are_among_all_exemplars_also_those_of_items_that_were_not_filled() -> None:
    found = candidates_of(["a", "b", "c"], np.array([EAST, NORTH, WEST]))
    ranks, first = retrieval_ranks(np.array([(2.0, 1.0), (3.0, 0.1)]), ["a", "c"], found)
    assert ranks.tolist() == [1, 3] and first.tolist() == [1, 0]


def test_a_fill_that_tells_nothing_has_the_values_of_chance() -> None:
    found = candidates_of(["a", "b", "c"], np.array([(1.0, 0, 0), (0, 1.0, 0), (0, 0, 1.0)]))
    ranks, first = retrieval_ranks(np.ones((3, 3)), ["a", "b", "c"], found)
    assert set(ranks) == {found.chance_rank} and set(first) == {found.chance_first}


def test_a_row_of_zeros_has_no_cosine() -> None:
    with pytest.raises(ValueError, match="all zeros"):
        candidates_of(["a"], np.zeros((1, 2)))
    with pytest.raises(ValueError, match="all zeros"):
        retrieval_ranks(np.zeros((1, 2)), ["a"], candidates_of(["a"], np.ones((1, 2))))
