"""Encoded Parquet rows to training batches, in the order of `order`, with all randomness per row.

A step's loss does not depend on the number of workers beyond float summation: noise, timestep, dropout, hole
choice and posterior sample of a row come from (seed, image_id, epoch).
"""

import queue
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from pbe.data.order import RowRef, rank_rows
from pbe.data.rng import row_rng
from pbe.data.schema import array_value
from pbe.data.slots import group_rows, slot_files
from pbe.store import File, Manifest, Store

CACHE_BYTES = 256 << 20  # row groups that one rank keeps
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
    """One batch on the CPU, float32 unless noted. B rows, C latent channels, h x w latent pixels."""

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
        tensors = {name: value.to(device, non_blocking=True) for name, value in vars(self).items() if name != "rows"}
        return Batch(**tensors, rows=self.rows)


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
        self._footers: OrderedDict[tuple[int, int], bytes] = OrderedDict()
        self._held_footer_bytes = 0

    def read(self, ref: RowRef) -> dict[str, np.ndarray]:
        """One row: array columns as float32 arrays, the rest as 0-d objects."""
        return _row_arrays(self._group((ref.slot, ref.file, ref.group)), ref.row)

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
        parquet = self._store.open_parquet(self._files[slot][file], self._footer(slot, file))
        try:
            return parquet.read_row_group(group)
        finally:
            parquet.close(force=True)

    def _footer(self, slot: int, file: int) -> bytes:
        """A file has many row groups, and lanes ask for them in any order."""
        if (slot, file) in self._footers:
            self._footers.move_to_end((slot, file))
            return self._footers[slot, file]
        footer = self._store.read_footer(self._files[slot][file])
        self._footers[slot, file] = footer
        self._held_footer_bytes += len(footer)
        while len(self._footers) > 1 and self._held_footer_bytes > self._footer_bytes:
            self._held_footer_bytes -= len(self._footers.popitem(last=False)[1])
        return footer


def _row_arrays(table: pa.Table, row: int) -> dict[str, np.ndarray]:
    out: dict[str, np.ndarray] = {}
    for field in table.schema:
        value = table.column(field.name)[row].as_py()
        if field.metadata:
            out[field.name] = array_value(field, value)
        else:
            out[field.name] = np.array(value)
    return out


def draw_row(row: dict[str, np.ndarray], *, epoch: int, cfg: DrawConfig) -> dict[str, np.ndarray]:
    """One training example from one stored row; a pure function of the row, the epoch and the seed."""
    rng = row_rng(cfg.seed, str(row["image_id"]), int(row["slot"]), "train", epoch)
    kind = "bezier" if rng.random() < cfg.bezier_prob else "box"
    draws = len(row["exemplar_tokens"])
    augmented = int(rng.integers(1, draws)) if draws > 1 else 0  # drawn always, so that ablations share the rest
    draw = augmented if cfg.reference_augmentation else 0
    shape = row["source_mean"].shape

    def normal() -> np.ndarray:
        return rng.standard_normal(shape, dtype=np.float32)

    return {
        "rows": np.array(f"{row['image_id']} slot {int(row['slot'])} epoch {epoch}"),
        "drop_condition": np.array(rng.random() < cfg.condition_dropout_prob),
        "drop_context": np.array(rng.random() < cfg.context_dropout_prob),
        "timestep": np.array(rng.integers(0, cfg.timesteps), np.int64),
        "noise": normal(),
        "x0": row["source_mean"] + row["source_std"] * normal(),
        "masked_latent": row[f"{kind}_masked_mean"] + row[f"{kind}_masked_std"] * normal(),
        "keep_mask_latent": 1.0 - row[f"{kind}_hole_mask_latent"],
        "exemplar_tokens": row["exemplar_tokens"][draw, : 1 if cfg.class_token_only else None],
    }


def collate(examples: Sequence[dict[str, np.ndarray]]) -> Batch:
    names = [f.name for f in fields(Batch) if f.name != "rows"]
    tensors = {name: torch.from_numpy(np.stack([example[name] for example in examples])) for name in names}
    return Batch(**tensors, rows=tuple(str(example["rows"]) for example in examples))


def validation_rows(store: Store, manifest: Manifest, *, cfg: DrawConfig, rows: int) -> list[dict[str, np.ndarray]]:
    """Examples for `collate`: rows spread evenly over slot 0, or all of it if it has fewer; the same at every call.

    Timesteps are spread evenly over all, hole kinds alternate, the reference is the clean one, nothing is dropped.
    """
    files = slot_files(manifest)
    refs = [(index, row) for index, file in enumerate(files[0]) for row in range(file.rows)]
    chosen = np.linspace(0, len(refs) - 1, min(rows, len(refs))).round().astype(int)
    tables: dict[int, pa.Table] = {}
    out = []
    for number, index in enumerate(chosen):
        file, row = refs[index]
        if file not in tables:
            tables = {file: store.read_table(files[0][file])}  # in order, so one at a time is enough
        even = replace(
            cfg,
            bezier_prob=float(number % 2),
            condition_dropout_prob=0.0,
            context_dropout_prob=0.0,
            reference_augmentation=False,
        )
        example = draw_row(_row_arrays(tables[file], row), epoch=0, cfg=even)
        example["timestep"] = np.array(int((number + 0.5) * cfg.timesteps / len(chosen)), np.int64)
        out.append(example)
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


class Prefetched:
    """Runs an iterator in one thread, at most `depth` items ahead; errors surface in the consumer."""

    def __init__(self, items: Iterator[Batch], depth: int) -> None:
        self._queue: queue.Queue[Batch | BaseException] = queue.Queue(depth)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._fill, args=(items,), daemon=True, name="pbe-prefetch")
        self._thread.start()

    def _fill(self, items: Iterator[Batch]) -> None:
        try:
            for item in items:
                if not self._put(item):
                    return
            self._put(StopIteration())
        except BaseException as error:  # handed to the consumer, who raises it
            self._put(error)

    def _put(self, item: Batch | BaseException) -> bool:
        while not self._stop.is_set():
            try:
                self._queue.put(item, timeout=0.2)
            except queue.Full:
                continue
            return True
        return False

    def next(self) -> Batch:
        item = self._queue.get()
        if isinstance(item, BaseException):
            raise item
        return item

    def close(self) -> None:
        self._stop.set()
        self._thread.join(timeout=10)
