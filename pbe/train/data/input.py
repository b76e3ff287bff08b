"""The input of training: micro-batches of one rank, the validation rows, and the rows that are scored.

Two sources give the same rows in the same order with the same draws: `EncodedRows` reads what the encode stage stored,
`PixelRows` encodes the triplets at every step. For a text-conditioned model, `CaptionedRows` puts captions in the
exemplars' place.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Any, Generic, Protocol, TypeVar

import torch

from pbe.data.slots import TRIPLETS_PER_GROUP, InputError, group_rows
from pbe.model.codec import Codec
from pbe.model.text import TextEncoder
from pbe.model.weight_store import open_backbone
from pbe.store import File, Manifest, Store
from pbe.train.data.batch import Batch, joined
from pbe.train.data.captioned import CaptionedRows
from pbe.train.data.draws import Draw, Draws, draw, score_draw, validation_draw
from pbe.train.data.encoded import EncodedRows
from pbe.train.data.order import Share, rank_rows, rows_to_keep, validation_places
from pbe.train.data.pixels import PixelRows
from pbe.train.data.prefetch import Prefetched
from pbe.train.data.processes import Turn, in_processes
from pbe.train.data.reader import Place, RowReader, StoredRow
from pbe.train.data.scored import ScoreRow, score_rows
from pbe.train.settings import TrainConfig

PREFETCHED_BATCHES = 4
CACHE_SHARE = 0.25  # of train.per_worker.memory_gib, for row groups; what fits is read once, not in every epoch
ALL = Turn()
P = TypeVar("P")


class RowSource(Protocol[P]):
    """Makes batches of stored rows in two steps; P is what `prepare` passes to `finish`."""

    files: list[list[File]]  # by slot, then by shard
    rows_per_group: int  # of the encode stage; streams are made of these groups
    stored_per_group: int  # rows per Parquet row group of these files
    columns: Sequence[str] | None  # of these files, to read; None: all

    def prepare(self, rows: Sequence[tuple[StoredRow, Draw]]) -> P:
        """Runs in the prefetch thread, or in an input process."""
        ...

    def pin(self, prepared: P) -> P:
        """Runs in the prefetch thread, after `prepare`."""
        ...

    def finish(self, prepared: P) -> Batch:
        """Runs in the training thread; the batch is on its device."""
        ...


def micro_batches(
    store: Store, source: RowSource[P], *, cfg: TrainConfig, seed: int, share: Share, turn: Turn = ALL
) -> Iterator[P]:
    """Prepared micro-batches of one rank, without end, from optimizer step `share.start_step` on; those of this turn.

    Each step takes batch / streams rows of every stream; this rank reads its streams one after another. Raises
    ValueError if a stream has no rows, and StoreError.
    """
    per_group = source.rows_per_group
    group_rows_of_slot = [[group_rows(file, per_group) for file in slot] for slot in source.files]
    order = rank_rows(group_rows_of_slot, batch=cfg.batch, streams=cfg.streams, seed=seed, share=share)
    keep_rows = _rows_to_keep(cfg, share, max(per_group, source.stored_per_group))
    cache_bytes = int(cfg.per_worker.memory_gib * CACHE_SHARE * 2**30 / turn.of)
    reader = RowReader(store, source.files, cache_bytes, keep_rows=keep_rows, columns=source.columns)
    micro = (refs[start : start + cfg.micro_batch] for refs in order for start in range(0, len(refs), cfg.micro_batch))
    for refs in islice(micro, turn.first, None, turn.of):
        yield source.prepare(
            [
                _with_draw(
                    reader.read(slot=ref.slot, file=ref.file, row=ref.group * per_group + ref.row),
                    partial(draw, epoch=ref.epoch, cfg=cfg, seed=seed),
                )
                for ref in refs
            ]
        )


def validation_batches(store: Store, source: RowSource[P], *, cfg: TrainConfig, seed: int) -> Iterator[P]:
    """Prepared micro-batches of `train.validation_rows` rows of slot 0, the same for every call and rank."""
    found = validation_places(source.files[0], cfg.validation_rows, rows_per_group=source.rows_per_group)
    draws = [
        partial(validation_draw, number=number, count=len(found), cfg=cfg, seed=seed) for number in range(len(found))
    ]
    return _fixed_batches(store, source, [(0, *place) for place in found], draws, size=cfg.micro_batch)


def score_places(source: RowSource[P], cfg: TrainConfig) -> list[Place]:
    """`train.score_rows` rows, or all if there are fewer: as many as possible of slot 0, then of slot 1, and so on."""
    places: list[Place] = []
    for slot, files in enumerate(source.files):
        if len(places) == cfg.score_rows:
            break
        found = validation_places(files, cfg.score_rows - len(places), rows_per_group=source.rows_per_group)
        places += [(slot, *place) for place in found]
    return places


def _fixed_batches(
    store: Store, source: RowSource[P], places: Sequence[Place], draws: Sequence[Callable[..., Draws]], *, size: int
) -> Iterator[P]:
    """Prepared micro-batches of up to `size` of these rows, one draw each, in order."""
    # rows are read in order, so one group at a time is enough
    reader = RowReader(store, source.files, cache_bytes=0, columns=source.columns)
    rows = list(zip(places, draws, strict=True))
    for start in range(0, len(rows), size):
        yield source.prepare(
            [
                _with_draw(reader.read(slot=slot, file=file, row=row), draw)
                for (slot, file, row), draw in rows[start : start + size]
            ]
        )


def _rows_to_keep(cfg: TrainConfig, share: Share, rows_per_group: int) -> int:
    return rows_to_keep(batch=cfg.batch, streams=cfg.streams, world=share.world, rows_per_group=rows_per_group)


def _with_draw(row: StoredRow, draw_of: Callable[..., Draws]) -> tuple[StoredRow, Draw]:
    return row, partial(draw_of, row.group.image_ids[row.index], row.group.slots[row.index])


class TrainInput(Generic[P]):
    """Micro-batches of one rank, float32 and on the training device, prepared ahead: by a thread, or by
    `train.input_processes` processes, from which the thread takes them."""

    def __init__(self, store: Store, source: RowSource[P], *, cfg: TrainConfig, seed: int, share: Share) -> None:
        self._store, self._source, self._cfg, self._seed = store, source, cfg, seed
        make = partial(micro_batches, store, source, cfg=cfg, seed=seed, share=share)
        prepared = in_processes(make, cfg.input_processes) if cfg.input_processes else make()
        self._prepared = Prefetched(map(source.pin, prepared), depth=PREFETCHED_BATCHES)

    def next(self) -> Batch:
        return self._source.finish(self._prepared.next())

    def validation(self) -> Batch:
        """The validation rows in one batch, on the CPU."""
        return self._on_cpu(validation_batches(self._store, self._source, cfg=self._cfg, seed=self._seed))

    def scored(self, triplets: Manifest) -> tuple[Batch, list[ScoreRow]]:
        """The rows that are scored, in one batch on the CPU, and what their fills are compared with.

        triplets: those that the rows were made from. Raises InputError if not, or if all rows are of one photo.
        """
        places, cfg = score_places(self._source, self._cfg), self._cfg
        draws = [partial(score_draw, cfg=cfg, seed=self._seed)] * len(places)
        batch = self._on_cpu(_fixed_batches(self._store, self._source, places, draws, size=cfg.micro_batch))
        return batch, score_rows(self._store, triplets, places, pairs=cfg.pair_prob > 0)

    def _on_cpu(self, batches: Iterator[P]) -> Batch:
        return joined([self._source.finish(prepared).to(torch.device("cpu")) for prepared in batches])

    def close(self) -> None:
        self._prepared.close()


def open_input(
    store: Store,
    encoded: Manifest,
    triplets: Manifest | None,
    *,
    cfg: TrainConfig,
    seed: int,
    share: Share,
    codec: Codec,
    text: TextEncoder | None = None,
    device: torch.device,
) -> TrainInput[Any]:
    """The input that `train.input` and `train.condition` name.

    triplets: None for encoded rows of exemplars. codec: the one that encoded the rows. text: for captions. What runs at
    every step is moved to `device`.

    Raises InputError, BackboneError, StoreError, WeightsError.
    """
    tokens = cfg.exemplar.tokens
    if cfg.input == "encoded":
        rows = EncodedRows(encoded, tokens=tokens, device=device)
        source: RowSource[Any] = rows
        if text is not None:
            if triplets is None:
                raise InputError("train.condition: text needs the triplets' manifest")
            source = CaptionedRows(
                rows, store, encoded, triplets,
                encoder=text.to(device), forms=cfg.text.captions, seed=seed,
                keep_rows=_rows_to_keep(cfg, share, max(rows.rows_per_group, TRIPLETS_PER_GROUP)),
            )  # fmt: skip
    elif triplets is None:
        raise InputError("train.input: pixels needs the triplets' manifest")
    else:
        backbone = open_backbone(store, encoded.config["backbone"]).to(device)
        source = PixelRows(encoded, triplets, codec=codec.to(device), backbone=backbone, tokens=tokens, device=device)
    return TrainInput(store, source, cfg=cfg, seed=seed, share=share)
