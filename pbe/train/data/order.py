"""Sample order: a pure function of (seed, epoch, stream), not of the number of workers.

The row groups of a slot are dealt round robin to a fixed number of *streams*. Each stream runs through its own epochs
without end; epoch e reads slot e mod slots. A global batch takes batch / streams rows from every stream, and rank r
reads the streams congruent to r modulo the world size. So the rows of batch b are the same on 1, 2 or 64 ranks,
and no row is lost when streams are uneven.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from pbe.data.rng import row_rng
from pbe.store import File


@dataclass(frozen=True)
class Share:
    """The share of the rows that one rank reads, from optimizer step `start_step` on."""

    rank: int
    world: int
    start_step: int


@dataclass(frozen=True)
class RowRef:
    """The place of one row in one epoch: file index in the slot, row group, row in the group."""

    epoch: int
    slot: int
    file: int
    group: int
    row: int


def stream_groups(group_rows: list[list[int]], stream: int, streams: int) -> list[tuple[int, int]]:
    """(file, group) pairs of one stream. group_rows[file][group] is that group's row count."""
    flat = [(file, group) for file, groups in enumerate(group_rows) for group in range(len(groups))]
    return flat[stream::streams]


def stream_epoch(
    group_rows: list[list[int]], *, stream: int, streams: int, epoch: int, slots: int, seed: int
) -> list[RowRef]:
    """The rows of one stream in one epoch, shuffled: groups first, then rows inside each group."""
    rng = row_rng(seed, "order", stream, epoch)
    groups = stream_groups(group_rows, stream, streams)
    out = []
    for index in rng.permutation(len(groups)):
        file, group = groups[index]
        rows = rng.permutation(group_rows[file][group])
        out += [RowRef(epoch, epoch % slots, file, group, int(row)) for row in rows]
    return out


def stream_rows(
    group_rows_of_slot: list[list[list[int]]], *, stream: int, streams: int, seed: int, skip: int = 0
) -> Iterator[RowRef]:
    """The rows of one stream, without end, from row number `skip` on. Raises ValueError if the stream has no rows."""
    slots = len(group_rows_of_slot)
    sizes = [
        sum(group_rows[file][group] for file, group in stream_groups(group_rows, stream, streams))
        for group_rows in group_rows_of_slot
    ]
    if not all(sizes):
        raise ValueError(
            f"stream {stream} of {streams} has no rows; lower train.streams or encode.rows_per_group (more row groups)"
        )
    rounds, rest = divmod(skip, sum(sizes))
    epoch = rounds * slots
    while rest >= sizes[epoch % slots]:
        rest -= sizes[epoch % slots]
        epoch += 1
    while True:
        rows = stream_epoch(
            group_rows_of_slot[epoch % slots], stream=stream, streams=streams, epoch=epoch, slots=slots, seed=seed
        )
        yield from rows[rest:]
        rest = 0
        epoch += 1


def rank_rows(
    group_rows_of_slot: list[list[list[int]]],
    *,
    batch: int,
    streams: int,
    seed: int,
    share: Share,
) -> Iterator[list[RowRef]]:
    """One rank's rows of each optimizer step, without end, from step `share.start_step` on.

    A step has batch / streams rows of each of the rank's streams, stream after stream. `batch` is the global batch.
    """
    per_stream = batch // streams
    iterators = [
        stream_rows(group_rows_of_slot, stream=stream, streams=streams, seed=seed, skip=share.start_step * per_stream)
        for stream in range(share.rank, streams, share.world)
    ]
    while True:
        yield [next(iterator) for iterator in iterators for _ in range(per_stream)]


def rows_to_keep(*, batch: int, streams: int, world: int, rows_per_group: int) -> int:
    """Rows that one rank's cache must hold: those of a step, and of the groups that its streams are still reading."""
    return (batch + 2 * streams * rows_per_group) // world


def validation_places(files: Sequence[File], rows: int, *, rows_per_group: int) -> list[tuple[int, int]]:
    """(file, row) of `rows` rows in order, or of all if there are fewer. They fill whole row groups, spread evenly over
    the slot, so that only few groups are read however large it is."""
    starts = [(index, row) for index, file in enumerate(files) for row in range(0, file.rows, rows_per_group)]
    groups = min(-(-rows // rows_per_group), len(starts))
    while True:  # the last group of a file may be short, so more groups may be needed
        chosen = np.linspace(0, len(starts) - 1, groups).round().astype(int)
        places = [
            (file, row)
            for file, start in (starts[index] for index in chosen)
            for row in range(start, min(start + rows_per_group, files[file].rows))
        ]
        if len(places) >= rows or groups == len(starts):
            return places[:rows]
        groups += 1
