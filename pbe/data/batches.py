"""Encoded Parquet rows to training batches, in the order of `order`, with all randomness per row.

A step's loss does not depend on the number of workers beyond float summation: noise, timestep, dropout, hole
choice and posterior sample of a row come from (seed, image_id, epoch).
"""

import queue
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Generic, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from pbe.data.order import RowRef, rank_rows
from pbe.data.rng import row_rng
from pbe.data.schema import HoleKind, array_value
from pbe.data.slots import group_rows, slot_files
from pbe.store import File, Manifest, Store

CACHE_BYTES = 256 << 20  # row groups that one rank keeps
T = TypeVar("T")
FOOTER_BYTES = 64 << 20  # footers, of 10 to 50 kB each


@dataclass(frozen=True)
class DrawConfig:
    """What is drawn per row; probabilities in [0, 1]."""

    seed: int
    timesteps: int
    bezier_prob: float
    condition_dropout_prob: float
    context_dropout_prob: float
    reference_augmentation: bool  # False: always draw 0, the clean reference
    class_token_only: bool  # the first of the stored tokens; False: all of them


@dataclass(frozen=True)
class Batch:
    """One batch, float32 unless noted. B rows, C latent channels, h x w latent pixels."""

    x0: Tensor  # (B, C, h, w) a sample of the source's posterior
    masked_latent: Tensor  # (B, C, h, w)
    keep_mask_latent: Tensor  # (B, 1, h, w) in [0, 1], 1 = known
    exemplar_tokens: Tensor  # (B, T, width)
    noise: Tensor  # (B, C, h, w)
    timestep: Tensor  # (B,) int64
    drop_condition: Tensor  # (B,) bool: use the unconditional vector
    drop_context: Tensor  # (B,) bool: hide the whole photo (sample profile)
    rows: tuple[str, ...]  # who they are, for messages

    def to(self, device: torch.device) -> "Batch":
        """Without waiting for the device when the batch is pinned."""
        tensors = {name: value.to(device, non_blocking=True) for name, value in vars(self).items() if name != "rows"}
        return Batch(**tensors, rows=self.rows)

    def pinned(self) -> "Batch":
        """In page-locked memory: a copy to a GPU from any other stops that GPU's stream first."""
        tensors = {name: value.pin_memory() for name, value in vars(self).items() if name != "rows"}
        return Batch(**tensors, rows=self.rows)

    def take(self, indices: Sequence[int]) -> "Batch":
        """The rows at `indices`, in that order."""
        tensors = {name: value[list(indices)] for name, value in vars(self).items() if name != "rows"}
        return Batch(**tensors, rows=tuple(self.rows[index] for index in indices))


@dataclass(frozen=True)
class Draws:
    """What chance decides about one row at one visit. C latent channels, h x w latent pixels."""

    hole_kind: HoleKind
    stored_reference: int  # index of one of the stored reference draws
    drop_condition: bool
    drop_context: bool
    timestep: int
    noise: np.ndarray  # (C, h, w) float32, as the two below
    source_normal: np.ndarray  # of the source's posterior
    masked_normal: np.ndarray


class RowReader:
    """Reads single rows of a manifest's files; keeps recent row groups and footers, in bounded memory.

    Of row groups at most `cache_bytes`, but always those of the newest `keep_rows` rows: lanes take turns, and come
    back to a group until it is done. A small data set is then read once in all, a large one once per visit.
    """

    def __init__(
        self,
        store: Store,
        files: Sequence[Sequence[File]],
        cache_bytes: int = CACHE_BYTES,
        *,
        keep_rows: int = 1,
        footer_bytes: int = FOOTER_BYTES,
    ) -> None:
        self._store = store
        self._files = files
        self._cache_bytes = cache_bytes
        self._keep_rows = keep_rows
        self._footer_bytes = footer_bytes
        self._groups: OrderedDict[tuple[int, int, int], pa.Table] = OrderedDict()
        self._held_bytes = 0
        self._held_rows = 0
        self._footers: OrderedDict[tuple[int, int], _Footer] = OrderedDict()
        self._held_footer_bytes = 0

    def read(self, ref: RowRef) -> dict[str, np.ndarray]:
        """One row: array columns as float32 arrays, the rest as 0-d objects."""
        return _row_arrays(self._group((ref.slot, ref.file, ref.group)), ref.row)

    def read_at(self, *, slot: int, file: int, row: int) -> dict[str, Any]:
        """Row number `row` of a file, values as stored, however the file is cut into row groups."""
        group, inner = divmod(row, self._footer(slot, file).rows_per_group)
        return self._group((slot, file, group)).slice(inner, 1).to_pylist()[0]

    def _group(self, key: tuple[int, int, int]) -> pa.Table:
        if key in self._groups:
            self._groups.move_to_end(key)
            return self._groups[key]
        table = self._read_group(key)
        self._groups[key] = table
        self._held_bytes += table.nbytes
        self._held_rows += table.num_rows
        while len(self._groups) > 1 and self._held_bytes > self._cache_bytes:
            oldest = next(iter(self._groups.values()))
            if self._held_rows - oldest.num_rows < self._keep_rows:
                break
            self._groups.popitem(last=False)
            self._held_bytes -= oldest.nbytes
            self._held_rows -= oldest.num_rows
        return table

    def _read_group(self, key: tuple[int, int, int]) -> pa.Table:
        slot, file, group = key
        parquet = self._store.open_parquet(self._files[slot][file], self._footer(slot, file).data)
        try:
            return parquet.read_row_group(group)
        finally:
            parquet.close(force=True)

    def _footer(self, slot: int, file: int) -> "_Footer":
        """Kept, as a file has many row groups and lanes ask for them in any order."""
        if (slot, file) in self._footers:
            self._footers.move_to_end((slot, file))
            return self._footers[slot, file]
        data = self._store.read_footer(self._files[slot][file])
        # all groups but the last are equal: `Store.write_unit` cuts them
        footer = _Footer(data, pq.read_metadata(pa.BufferReader(data)).row_group(0).num_rows)
        self._footers[slot, file] = footer
        self._held_footer_bytes += len(data)
        while len(self._footers) > 1 and self._held_footer_bytes > self._footer_bytes:
            self._held_footer_bytes -= len(self._footers.popitem(last=False)[1].data)
        return footer


@dataclass(frozen=True)
class _Footer:
    data: bytes  # as stored: parsed, it takes 14 times the memory
    rows_per_group: int


def _row_arrays(table: pa.Table, row: int) -> dict[str, np.ndarray]:
    out: dict[str, np.ndarray] = {}
    for field in table.schema:
        value = table.column(field.name)[row].as_py()
        if field.metadata:
            out[field.name] = array_value(field, value)
        else:
            out[field.name] = np.array(value)
    return out


def draw(
    image_id: str, slot: int, *, epoch: int, latent_shape: tuple[int, ...], stored_references: int, cfg: DrawConfig
) -> Draws:
    """A pure function of its arguments. All is drawn always and in one order, so that ablations share the rest."""
    rng = row_rng(cfg.seed, image_id, slot, "train", epoch)
    hole_kind: HoleKind = "bezier" if rng.random() < cfg.bezier_prob else "box"
    augmented = int(rng.integers(1, stored_references)) if stored_references > 1 else 0
    return Draws(
        hole_kind=hole_kind,
        stored_reference=augmented if cfg.reference_augmentation else 0,
        drop_condition=bool(rng.random() < cfg.condition_dropout_prob),
        drop_context=bool(rng.random() < cfg.context_dropout_prob),
        timestep=int(rng.integers(0, cfg.timesteps)),
        noise=rng.standard_normal(latent_shape, dtype=np.float32),
        source_normal=rng.standard_normal(latent_shape, dtype=np.float32),
        masked_normal=rng.standard_normal(latent_shape, dtype=np.float32),
    )


def draw_row(row: dict[str, np.ndarray], *, epoch: int, cfg: DrawConfig) -> dict[str, np.ndarray]:
    """One training example from one stored row; a pure function of the row, the epoch and the seed."""
    drawn = draw(
        str(row["image_id"]),
        int(row["slot"]),
        epoch=epoch,
        latent_shape=row["source_mean"].shape,
        stored_references=len(row["exemplar_tokens"]),
        cfg=cfg,
    )
    return _example(row, drawn, epoch=epoch, cfg=cfg)


def _example(row: dict[str, np.ndarray], drawn: Draws, *, epoch: int, cfg: DrawConfig) -> dict[str, np.ndarray]:
    kind = drawn.hole_kind
    return {
        "rows": np.array(row_name(str(row["image_id"]), int(row["slot"]), epoch)),
        "drop_condition": np.array(drawn.drop_condition),
        "drop_context": np.array(drawn.drop_context),
        "timestep": np.array(drawn.timestep, np.int64),
        "noise": drawn.noise,
        "x0": row["source_mean"] + row["source_std"] * drawn.source_normal,
        "masked_latent": row[f"{kind}_masked_mean"] + row[f"{kind}_masked_std"] * drawn.masked_normal,
        "keep_mask_latent": 1.0 - row[f"{kind}_hole_mask_latent"],
        "exemplar_tokens": row["exemplar_tokens"][drawn.stored_reference, : 1 if cfg.class_token_only else None],
    }


def row_name(image_id: str, slot: int, epoch: int) -> str:
    """For messages."""
    return f"{image_id} slot {slot} epoch {epoch}"


def collate(examples: Sequence[dict[str, np.ndarray]]) -> Batch:
    names = [f.name for f in fields(Batch) if f.name != "rows"]
    tensors = {name: torch.from_numpy(np.stack([example[name] for example in examples])) for name in names}
    return Batch(**tensors, rows=tuple(str(example["rows"]) for example in examples))


def joined(batches: Sequence[Batch]) -> Batch:
    """The rows of all, in order."""
    names = [f.name for f in fields(Batch) if f.name != "rows"]
    tensors = {name: torch.cat([getattr(batch, name) for batch in batches]) for name in names}
    return Batch(**tensors, rows=tuple(row for batch in batches for row in batch.rows))


def validation_places(files: Sequence[File], rows: int, *, rows_per_group: int) -> list[tuple[int, int]]:
    """(file, row) of `rows` rows, or of all if there are fewer, in order: whole row groups spread evenly over a slot,
    so that few groups are read however large the slot is."""
    starts = [(index, row) for index, file in enumerate(files) for row in range(0, file.rows, rows_per_group)]
    groups = min(-(-rows // rows_per_group), len(starts))
    while True:  # groups at the ends of files are short
        chosen = np.linspace(0, len(starts) - 1, groups).round().astype(int)
        places = [
            (file, row)
            for file, start in (starts[index] for index in chosen)
            for row in range(start, min(start + rows_per_group, files[file].rows))
        ]
        if len(places) >= rows or groups == len(starts):
            return places[:rows]
        groups += 1


def validation_draw(
    image_id: str,
    slot: int,
    *,
    number: int,
    count: int,
    latent_shape: tuple[int, ...],
    stored_references: int,
    cfg: DrawConfig,
) -> Draws:
    """Of row `number` of `count`: timesteps are spread evenly over all, hole kinds alternate, the reference is the
    clean one, nothing is dropped."""
    even = replace(
        cfg,
        bezier_prob=float(number % 2),
        condition_dropout_prob=0.0,
        context_dropout_prob=0.0,
        reference_augmentation=False,
    )
    drawn = draw(image_id, slot, epoch=0, latent_shape=latent_shape, stored_references=stored_references, cfg=even)
    return replace(drawn, timestep=int((number + 0.5) * cfg.timesteps / count))


def validation_rows(
    store: Store, manifest: Manifest, *, cfg: DrawConfig, rows: int, rows_per_group: int
) -> list[dict[str, np.ndarray]]:
    """Examples for `collate`: `validation_draw` of `validation_places` in slot 0; the same at every call."""
    files = slot_files(manifest)[0]
    places = validation_places(files, rows, rows_per_group=rows_per_group)
    reader = RowReader(store, [files], cache_bytes=0)  # in order, so one group at a time is enough
    out = []
    for number, (file, index) in enumerate(places):
        group, inner = divmod(index, rows_per_group)
        row = reader.read(RowRef(0, 0, file, group, inner))
        drawn = validation_draw(
            str(row["image_id"]),
            int(row["slot"]),
            number=number,
            count=len(places),
            latent_shape=row["source_mean"].shape,
            stored_references=len(row["exemplar_tokens"]),
            cfg=cfg,
        )
        out.append(_example(row, drawn, epoch=0, cfg=cfg))
    return out


def rank_batches(
    store: Store,
    manifest: Manifest,
    *,
    cfg: DrawConfig,
    batch: int,
    micro_batch: int,
    lanes: int,
    rank: int,
    world: int,
    rows_per_group: int,
    start_step: int,
) -> Iterator[Batch]:
    """Micro-batches of one rank from optimizer step `start_step` on, endlessly.

    `batch` is the global batch. Each step takes batch / lanes rows of every lane; this rank serves the lanes
    congruent to `rank` modulo `world`, lane after lane.
    """
    files = slot_files(manifest)
    rows_of_slot = [[group_rows(file, rows_per_group) for file in slot] for slot in files]
    order = rank_rows(
        rows_of_slot, batch=batch, lanes=lanes, rank=rank, world=world, seed=cfg.seed, start_step=start_step
    )
    keep_rows = rows_kept(batch=batch, lanes=lanes, world=world, rows_per_group=rows_per_group)
    reader = RowReader(store, files, keep_rows=keep_rows)
    for refs in order:
        examples = [draw_row(reader.read(ref), epoch=ref.epoch, cfg=cfg) for ref in refs]
        for start in range(0, len(examples), micro_batch):
            yield collate(examples[start : start + micro_batch])


def rows_kept(*, batch: int, lanes: int, world: int, rows_per_group: int) -> int:
    """Rows of one rank's step, and of the groups that its lanes have begun and will come back to."""
    return (batch + 2 * lanes * rows_per_group) // world


def pinned_batches(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """The same batches, pinned for copies to `device`, a GPU."""
    torch.cuda.set_device(device)  # of the thread that runs this: else pinning would open a context on the first GPU
    for batch in batches:
        yield batch.pinned()


class Prefetched(Generic[T]):
    """Runs an iterator in one thread, at most `depth` items ahead; errors surface in the consumer."""

    def __init__(self, items: Iterator[T], depth: int) -> None:
        self._queue: queue.Queue[T | BaseException] = queue.Queue(depth)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._fill, args=(items,), daemon=True, name="pbe-prefetch")
        self._thread.start()

    def _fill(self, items: Iterator[T]) -> None:
        try:
            for item in items:
                if not self._put(item):
                    return
            self._put(StopIteration())
        except BaseException as error:  # handed to the consumer, who raises it
            self._put(error)

    def _put(self, item: T | BaseException) -> bool:
        while not self._stop.is_set():
            try:
                self._queue.put(item, timeout=0.2)
            except queue.Full:
                continue
            return True
        return False

    def next(self) -> T:
        item = self._queue.get()
        if isinstance(item, BaseException):
            raise item
        return item

    def close(self) -> None:
        self._stop.set()
        self._thread.join(timeout=10)
