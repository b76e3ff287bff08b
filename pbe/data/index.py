"""Split annotations and photo lists by shard: one streaming pass, bounded memory, the same tables on every machine.

OpenImages has 14.6 million boxes of 1.7 million photos. Rows are sorted into shards block by block; beyond
`SPILL_BYTES` they spill to Arrow files on local disk, and each shard is assembled from its pieces at the end.
"""

import tempfile
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pbe.data.rng import shard_of, unit_interval
from pbe.data.schema import SPLITS

SPILL_BYTES = 256 << 20


@dataclass(frozen=True)
class Selection:
    """Which annotations to keep; None keeps all. limit: photos per split, the first in file order."""

    splits: Collection[str]
    limit: int | None
    classes: Collection[str] | None
    image_ids: Collection[str] | None
    val_frac: float


@dataclass
class Selector:
    """Applies a Selection block by block; remembers the photos taken so far, for `limit`."""

    selection: Selection
    class_ids: Collection[str] | None  # labels as they stand in the files
    taken: dict[int, set[str]] = field(default_factory=dict)
    left_out: int = 0
    found_ids: set[str] = field(default_factory=set)  # of the selection's image_ids

    def __call__(self, annotations: pa.Table) -> pa.Table:
        """The selected rows, with the split that val_frac gives them. Invalid lines are kept regardless of class."""
        chosen = self.selection
        encoded = pc.dictionary_encode(annotations.column("image_id").combine_chunks())
        ids, index = encoded.dictionary.to_pylist(), encoded.indices.to_numpy()
        split = annotations.column("split").to_numpy()
        if chosen.val_frac:
            by_hash = np.array([unit_interval(image_id) < chosen.val_frac for image_id in ids], bool)
            split = np.where(by_hash[index], SPLITS.index("validation"), SPLITS.index("train")).astype(np.int8)
        keep = np.isin(split, [SPLITS.index(name) for name in chosen.splits])
        if chosen.image_ids is not None:
            self.found_ids.update(image_id for image_id in ids if image_id in chosen.image_ids)
            keep &= np.array([image_id in chosen.image_ids for image_id in ids], bool)[index]
        if self.class_ids is not None:
            labels = pc.is_in(annotations.column("label"), pa.array(sorted(self.class_ids), pa.string()))
            keep &= labels.to_numpy() | annotations.column("reason").is_valid().to_numpy()
        if chosen.limit is not None:
            keep &= self._within_limit(ids, index, split, keep)
        self.left_out += int(len(keep) - keep.sum())
        column = annotations.schema.get_field_index("split")
        return annotations.set_column(column, annotations.schema.field("split"), pa.array(split)).filter(pa.array(keep))

    def _within_limit(self, ids: list[str], index: np.ndarray, split: np.ndarray, keep: np.ndarray) -> np.ndarray:
        assert self.selection.limit is not None
        within = np.zeros(len(index), bool)
        rows = np.flatnonzero(keep)
        _, first = np.unique(split[rows].astype(np.int64) * len(ids) + index[rows], return_index=True)
        for row in rows[np.sort(first)]:  # each photo of each split once, in file order
            taken = self.taken.setdefault(int(split[row]), set())
            if len(taken) < self.selection.limit:
                taken.add(ids[index[row]])
        for name, taken in self.taken.items():
            allowed = np.array([image_id in taken for image_id in ids], bool)
            within |= (split == name) & allowed[index]
        return within


class ShardSorter:
    """Sorts tables with an image_id column into one table per shard; rows keep their order."""

    def __init__(self, schema: pa.Schema, shards: int, folder: Path) -> None:
        self._schema, self._shards, self._folder = schema, shards, folder
        self._held: list[tuple[np.ndarray, pa.Table]] = []
        self._held_bytes = 0
        self._spills: list[tuple[Path, dict[int, int]]] = []

    def add(self, table: pa.Table) -> None:
        if not table.num_rows:
            return
        self._held.append((shards_of(table.column("image_id"), self._shards), table))
        self._held_bytes += table.nbytes
        if self._held_bytes >= SPILL_BYTES:
            self._spill()

    def tables(self) -> Iterator[pa.Table]:
        """Yield one table per shard, also for empty ones. Call it once, after the last `add`."""
        held = dict(self._sorted_pieces())
        self._held = []
        # read, not memory-mapped: mapped pages stay with the process until the whole file is in memory
        sources = [(pa.OSFile(str(path)), places) for path, places in self._spills]
        readers = [(pa.ipc.open_file(source), places) for source, places in sources]
        for shard in range(self._shards):
            pieces = [pa.table(reader.get_batch(places[shard])) for reader, places in readers if shard in places]
            if shard in held:
                pieces.append(held.pop(shard))
            yield pa.concat_tables(pieces) if pieces else self._schema.empty_table()
        for source, _ in sources:
            source.close()

    def _spill(self) -> None:
        path = self._folder / f"spill-{len(self._spills)}.arrow"
        places: dict[int, int] = {}
        with pa.ipc.new_file(str(path), self._schema) as writer:
            for number, (shard, piece) in enumerate(self._sorted_pieces()):
                writer.write_batch(piece.combine_chunks().to_batches()[0])
                places[shard] = number
        self._spills.append((path, places))
        self._held, self._held_bytes = [], 0

    def _sorted_pieces(self) -> Iterator[tuple[int, pa.Table]]:
        """The rows held in memory, by shard."""
        if not self._held:
            return
        shards = np.concatenate([shard for shard, _ in self._held])
        table = pa.concat_tables([table for _, table in self._held]).combine_chunks()
        order = np.argsort(shards, kind="stable")
        table = table.take(pa.array(order))
        present, starts = np.unique(shards[order], return_index=True)
        for shard, start, end in zip(present, starts, [*starts[1:], len(order)], strict=True):
            yield int(shard), table.slice(start, end - start)


def shards_of(image_ids: pa.ChunkedArray | pa.Array, shards: int) -> np.ndarray:
    """(N,) int64 shard of each id; each distinct id is hashed once."""
    combined = image_ids.combine_chunks() if isinstance(image_ids, pa.ChunkedArray) else image_ids
    encoded = pc.dictionary_encode(combined)
    by_id = np.array([shard_of(image_id, shards) for image_id in encoded.dictionary.to_pylist()], np.int64)
    return by_id[encoded.indices.to_numpy()] if len(by_id) else np.empty(0, np.int64)


@contextmanager
def by_shard(tables: Iterable[pa.Table], schema: pa.Schema, shards: int) -> Iterator[Iterator[pa.Table]]:
    """Read all `tables`, then iterate over their rows as one table per shard."""
    with tempfile.TemporaryDirectory(prefix="pbe-index-") as folder:
        sorter = ShardSorter(schema, shards, Path(folder))
        for table in tables:
            sorter.add(table)
        yield sorter.tables()
