"""Sample order: lanes share out every row, each lane runs through its own epochs, and any step can be resumed."""

from collections import Counter
from itertools import islice

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pbe.train.data.order import RowRef, lane_epoch, lane_groups, lane_stream

# slots of files of row groups: the row count of each group
GROUPS = st.lists(st.lists(st.integers(1, 4), max_size=4), min_size=1, max_size=4)
SLOTS = st.lists(GROUPS, min_size=1, max_size=3)
UNEVEN = [[[2, 2, 1], [], [3]], [[2, 2, 1], [2], [3, 1]]]  # two slots of three files


def _all_rows(groups: list[list[int]]) -> set[tuple[int, int, int]]:
    return {(f, g, row) for f, file in enumerate(groups) for g, rows in enumerate(file) for row in range(rows)}


def _take(slots: list[list[list[int]]], count: int, **where: int) -> list[RowRef]:
    return list(islice(lane_stream(slots, **where), count))


def _lane_size(groups: list[list[int]], lane: int, lanes: int) -> int:
    return sum(groups[file][group] for file, group in lane_groups(groups, lane, lanes))


@given(groups=GROUPS, lanes=st.integers(1, 6))
def test_every_row_group_is_in_one_lane_and_lanes_differ_by_at_most_one_group(
    groups: list[list[int]], lanes: int
) -> None:
    shares = [lane_groups(groups, lane, lanes) for lane in range(lanes)]
    dealt = [pair for share in shares for pair in share]
    assert sorted(dealt) == [(f, g) for f, file in enumerate(groups) for g in range(len(file))]
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@given(groups=GROUPS, lanes=st.integers(1, 4), epoch=st.integers(0, 7), slots=st.integers(1, 3))
def test_an_epoch_of_all_lanes_is_every_row_once(groups: list[list[int]], lanes: int, epoch: int, slots: int) -> None:
    refs = [
        ref
        for lane in range(lanes)
        for ref in lane_epoch(groups, lane=lane, lanes=lanes, epoch=epoch, slots=slots, seed=1)
    ]
    rows = [(ref.file, ref.group, ref.row) for ref in refs]
    assert len(rows) == len(set(rows)) and set(rows) == _all_rows(groups)
    assert {(ref.epoch, ref.slot) for ref in refs} <= {(epoch, epoch % slots)}


@settings(max_examples=60)
@given(slots=SLOTS, lanes=st.integers(1, 3), lane=st.integers(0, 2))
def test_a_lane_loses_no_row_and_repeats_none_within_its_epochs(
    slots: list[list[list[int]]], lanes: int, lane: int
) -> None:
    assume(lane < lanes)
    sizes = [_lane_size(groups, lane, lanes) for groups in slots]
    assume(all(sizes))
    refs = _take(slots, 2 * sum(sizes), lane=lane, lanes=lanes, seed=3)
    for epoch in range(2 * len(slots)):
        size = sizes[epoch % len(slots)]
        now, refs = refs[:size], refs[size:]
        assert {(ref.epoch, ref.slot) for ref in now} == {(epoch, epoch % len(slots))}
        assert len({(ref.file, ref.group, ref.row) for ref in now}) == size
        assert {(ref.file, ref.group) for ref in now} == set(lane_groups(slots[epoch % len(slots)], lane, lanes))
    assert not refs


@settings(max_examples=60)
@given(slots=SLOTS, lanes=st.integers(1, 3), skip=st.integers(0, 60), seed=st.integers(0, 3))
def test_skipping_is_the_same_stream_from_that_row_on(
    slots: list[list[list[int]]], lanes: int, skip: int, seed: int
) -> None:
    for lane in range(lanes):
        assume(all(_lane_size(groups, lane, lanes) for groups in slots))
        whole = _take(slots, skip + 20, lane=lane, lanes=lanes, seed=seed)
        assert _take(slots, 20, lane=lane, lanes=lanes, seed=seed, skip=skip) == whole[skip:]


def test_a_far_skip_costs_no_walk() -> None:
    """A resume after 10^12 rows: the epoch is found by division. Rows of lane 0 per round of two slots: 3 + 3 + 1."""
    sizes = [_lane_size(groups, 0, 2) for groups in UNEVEN]
    (ref,) = _take(UNEVEN, 1, lane=0, lanes=2, seed=0, skip=10**12 * sum(sizes) + sizes[0])
    assert (ref.epoch, ref.slot) == (2 * 10**12 + 1, 1)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_the_rows_of_a_step_do_not_depend_on_the_number_of_ranks(world: int) -> None:
    """Rank r serves the lanes congruent r modulo world: together always all lanes."""
    lanes, per_lane, steps = 4, 3, 12

    def step_rows(ranks: int) -> list[Counter[RowRef]]:
        streams = [
            lane_stream(UNEVEN, lane=lane, lanes=lanes, seed=5)
            for rank in range(ranks)
            for lane in range(rank, lanes, ranks)
        ]
        return [Counter(ref for stream in streams for ref in islice(stream, per_lane)) for _ in range(steps)]

    assert step_rows(world) == step_rows(1)


def test_order_is_shuffled_anew_by_epoch_lane_and_seed() -> None:
    groups = [[2] * 10, [1] * 10]

    def rows(lane: int = 0, epoch: int = 0, seed: int = 0) -> list[tuple[int, int, int]]:
        refs = lane_epoch(groups, lane=lane, lanes=2, epoch=epoch, slots=1, seed=seed)
        return [(ref.file, ref.group // 2, ref.row) for ref in refs]  # comparable between the two lanes

    orders = [rows(), rows(epoch=1), rows(lane=1), rows(seed=1)]
    assert all(sorted(order) == sorted(orders[0]) for order in orders)
    assert len({tuple(order) for order in orders}) == 4 and sorted(orders[0]) not in orders
    assert rows() == orders[0]


def test_every_row_is_equally_likely_to_come_first() -> None:
    firsts = Counter(
        (ref.group, ref.row)
        for epoch in range(3000)
        for ref in lane_epoch([[2, 2, 2]], lane=0, lanes=1, epoch=epoch, slots=1, seed=0)[:1]
    )
    assert set(firsts) == {(group, row) for group in range(3) for row in range(2)}
    assert all(abs(count - 500) < 80 for count in firsts.values())


def test_a_lane_without_rows_is_an_error_that_says_what_to_change() -> None:
    with pytest.raises(ValueError, match=r"lane 2 of 3 has no rows; lower train\.lanes or encode\.rows_per_group"):
        next(lane_stream([[[1, 1]]], lane=2, lanes=3, seed=0))
    with pytest.raises(ValueError, match="lane 0 of 1"):
        next(lane_stream([[[1]], [[]]], lane=0, lanes=1, seed=0))  # one empty slot is enough
