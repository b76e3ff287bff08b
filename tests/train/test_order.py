"""Sample order: streams share out every row, each stream runs through its own epochs, and any step can be resumed."""

from collections import Counter
from itertools import islice

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pbe.train.data.order import RowRef, stream_epoch, stream_groups, stream_rows

# slots of files of row groups: the row count of each group
GROUPS = st.lists(st.lists(st.integers(1, 4), max_size=4), min_size=1, max_size=4)
SLOTS = st.lists(GROUPS, min_size=1, max_size=3)
UNEVEN = [[[2, 2, 1], [], [3]], [[2, 2, 1], [2], [3, 1]]]  # two slots of three files


def _all_rows(groups: list[list[int]]) -> set[tuple[int, int, int]]:
    return {(f, g, row) for f, file in enumerate(groups) for g, rows in enumerate(file) for row in range(rows)}


def _take(slots: list[list[list[int]]], count: int, **where: int) -> list[RowRef]:
    return list(islice(stream_rows(slots, **where), count))


def _stream_size(groups: list[list[int]], stream: int, streams: int) -> int:
    return sum(groups[file][group] for file, group in stream_groups(groups, stream, streams))


@given(groups=GROUPS, streams=st.integers(1, 6))
def test_every_row_group_is_in_one_stream_and_streams_differ_by_at_most_one_group(
    groups: list[list[int]], streams: int
) -> None:
    shares = [stream_groups(groups, stream, streams) for stream in range(streams)]
    dealt = [pair for share in shares for pair in share]
    assert sorted(dealt) == [(f, g) for f, file in enumerate(groups) for g in range(len(file))]
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@given(groups=GROUPS, streams=st.integers(1, 4), epoch=st.integers(0, 7), slots=st.integers(1, 3))
def test_an_epoch_of_all_streams_is_every_row_once(
    groups: list[list[int]], streams: int, epoch: int, slots: int
) -> None:
    refs = [
        ref
        for stream in range(streams)
        for ref in stream_epoch(groups, stream=stream, streams=streams, epoch=epoch, slots=slots, seed=1)
    ]
    rows = [(ref.file, ref.group, ref.row) for ref in refs]
    assert len(rows) == len(set(rows)) and set(rows) == _all_rows(groups)
    assert {(ref.epoch, ref.slot) for ref in refs} <= {(epoch, epoch % slots)}


@settings(max_examples=60)
@given(slots=SLOTS, streams=st.integers(1, 3), stream=st.integers(0, 2))
def test_a_stream_loses_no_row_and_repeats_none_within_its_epochs(
    slots: list[list[list[int]]], streams: int, stream: int
) -> None:
    assume(stream < streams)
    sizes = [_stream_size(groups, stream, streams) for groups in slots]
    assume(all(sizes))
    refs = _take(slots, 2 * sum(sizes), stream=stream, streams=streams, seed=3)
    for epoch in range(2 * len(slots)):
        size = sizes[epoch % len(slots)]
        now, refs = refs[:size], refs[size:]
        assert {(ref.epoch, ref.slot) for ref in now} == {(epoch, epoch % len(slots))}
        assert len({(ref.file, ref.group, ref.row) for ref in now}) == size
        assert {(ref.file, ref.group) for ref in now} == set(stream_groups(slots[epoch % len(slots)], stream, streams))
    assert not refs


@settings(max_examples=60)
@given(slots=SLOTS, streams=st.integers(1, 3), skip=st.integers(0, 60), seed=st.integers(0, 3))
def test_skipping_is_the_same_stream_from_that_row_on(
    slots: list[list[list[int]]], streams: int, skip: int, seed: int
) -> None:
    for stream in range(streams):
        assume(all(_stream_size(groups, stream, streams) for groups in slots))
        whole = _take(slots, skip + 20, stream=stream, streams=streams, seed=seed)
        assert _take(slots, 20, stream=stream, streams=streams, seed=seed, skip=skip) == whole[skip:]


def test_a_far_skip_costs_no_walk() -> None:
    """A resume after 10^12 rows: the epoch is found by division. Rows of stream 0 per round of two slots: 3 + 3 + 1."""
    sizes = [_stream_size(groups, 0, 2) for groups in UNEVEN]
    (ref,) = _take(UNEVEN, 1, stream=0, streams=2, seed=0, skip=10**12 * sum(sizes) + sizes[0])
    assert (ref.epoch, ref.slot) == (2 * 10**12 + 1, 1)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_the_rows_of_a_step_do_not_depend_on_the_number_of_ranks(world: int) -> None:
    """Rank r serves the streams congruent r modulo world: together always all streams."""
    streams, per_stream, steps = 4, 3, 12

    def step_rows(ranks: int) -> list[Counter[RowRef]]:
        iterators = [
            stream_rows(UNEVEN, stream=stream, streams=streams, seed=5)
            for rank in range(ranks)
            for stream in range(rank, streams, ranks)
        ]
        return [Counter(ref for iterator in iterators for ref in islice(iterator, per_stream)) for _ in range(steps)]

    assert step_rows(world) == step_rows(1)


def test_order_is_shuffled_anew_by_epoch_stream_and_seed() -> None:
    groups = [[2] * 10, [1] * 10]

    def rows(stream: int = 0, epoch: int = 0, seed: int = 0) -> list[tuple[int, int, int]]:
        refs = stream_epoch(groups, stream=stream, streams=2, epoch=epoch, slots=1, seed=seed)
        return [(ref.file, ref.group // 2, ref.row) for ref in refs]  # comparable between the two streams

    orders = [rows(), rows(epoch=1), rows(stream=1), rows(seed=1)]
    assert all(sorted(order) == sorted(orders[0]) for order in orders)
    assert len({tuple(order) for order in orders}) == 4 and sorted(orders[0]) not in orders
    assert rows() == orders[0]


def test_every_row_is_equally_likely_to_come_first() -> None:
    firsts = Counter(
        (ref.group, ref.row)
        for epoch in range(3000)
        for ref in stream_epoch([[2, 2, 2]], stream=0, streams=1, epoch=epoch, slots=1, seed=0)[:1]
    )
    assert set(firsts) == {(group, row) for group in range(3) for row in range(2)}
    assert all(abs(count - 500) < 80 for count in firsts.values())


def test_a_stream_without_rows_is_an_error_that_says_what_to_change() -> None:
    with pytest.raises(ValueError, match=r"stream 2 of 3 has no rows; lower train\.streams or encode\.rows_per_group"):
        next(stream_rows([[[1, 1]]], stream=2, streams=3, seed=0))
    with pytest.raises(ValueError, match="stream 0 of 1"):
        next(stream_rows([[[1]], [[]]], stream=0, streams=1, seed=0))  # one empty slot is enough
