"""Reads single rows of a manifest's Parquet files, through a cache of row groups."""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pbe.data.masks import HOLE_KINDS
from pbe.data.schema import HoleKind, array_column, holds_array
from pbe.store import File, Store

FOOTER_BYTES = 64 << 20  # of footers, 10 to 50 kB each
K = TypeVar("K", bound=Hashable)
V = TypeVar("V")
Place = tuple[int, int, int]  # slot, file and row: the same in encoded rows and in their triplets


class Group:
    """One row group. Names and arrays are taken from it once, not for each row."""

    def __init__(self, table: pa.Table) -> None:
        self.table = table
        self.image_ids: list[str] = table.column("image_id").to_pylist()
        self.slots: list[int] = table.column("slot").to_pylist()
        # by column, views (rows, *shape) in the stored type
        self.arrays = {field.name: array_column(table, field.name) for field in table.schema if holds_array(field)}
        having = [self._having(f"{kind}_hole_mask", f"{kind}_hole_mask_latent") for kind in HOLE_KINDS]
        self.hole_kinds = [
            [kind for kind, is_there in zip(HOLE_KINDS, row, strict=True) if is_there]
            for row in zip(*having, strict=True)
        ]  # of each row
        self.has_pair = self._having("pair_reference", "pair_tokens")

    def _having(self, *columns: str) -> list[bool]:
        """Whether each row has a value in the first of these columns that is there, in triplets or in encoded rows."""
        found = next((name for name in columns if name in self.table.schema.names), None)
        return self.table.column(found).is_valid().to_pylist() if found else [False] * self.table.num_rows


@dataclass(frozen=True)
class StoredRow:
    """One row of a group."""

    group: Group
    index: int
    place: Place

    def array(self, column: str) -> np.ndarray:
        """A view in the stored type."""
        return self.group.arrays[column][self.index]

    @property
    def hole_kinds(self) -> list[HoleKind]:
        return self.group.hole_kinds[self.index]

    @property
    def has_pair(self) -> bool:
        return self.group.has_pair[self.index]

    def values(self) -> dict[str, Any]:
        """All columns."""
        return self.group.table.slice(self.index, 1).to_pylist()[0]


class RowReader:
    """Reads rows and caches recent row groups and footers, in bounded memory.

    Row groups take at most `cache_bytes`, but those of the newest `keep_rows` rows always stay: streams take turns and
    return to a group until they have read it all. A small data set is then read once, a large one once per epoch.
    """

    def __init__(
        self,
        store: Store,
        files: Sequence[Sequence[File]],
        cache_bytes: int,
        *,
        keep_rows: int = 1,
        footer_bytes: int = FOOTER_BYTES,
        columns: Sequence[str] | None = None,
    ) -> None:
        """files: by slot, then by shard. columns: those to read, image_id and slot among them; None: all."""
        self._store = store
        self._files = files
        self._columns = columns
        self.groups = Recent(
            self._read_group, lambda group: (group.table.nbytes, group.table.num_rows), cache_bytes, keep_rows
        )
        self.footers = Recent(self._read_footer, lambda footer: (len(footer.data), 1), footer_bytes, 1)

    def read(self, *, slot: int, file: int, row: int) -> StoredRow:
        """Row number `row` of a file. Raises StoreError if the file is missing or damaged."""
        group, inner = divmod(row, self.footers.get((slot, file)).rows_per_group)
        return StoredRow(self.groups.get((slot, file, group)), inner, (slot, file, row))

    def _read_group(self, key: tuple[int, int, int]) -> Group:
        slot, file, group = key
        footer = self.footers.get((slot, file)).data
        return Group(self._store.read_row_group(self._files[slot][file], group, footer, self._columns))

    def _read_footer(self, key: tuple[int, int]) -> "Footer":
        slot, file = key
        data = self._store.read_footer(self._files[slot][file])
        # `Store.write_unit` makes all groups but the last the same size
        return Footer(data, pq.read_metadata(pa.BufferReader(data)).row_group(0).num_rows)


@dataclass(frozen=True)
class Footer:
    data: bytes  # as stored, because it takes 14 times the memory when parsed
    rows_per_group: int


class Recent(Generic[K, V]):
    """A cache of the most recently used values: at most `max_bytes`, but at least `keep_rows` rows once it has them."""

    def __init__(
        self, load: Callable[[K], V], size: Callable[[V], tuple[int, int]], max_bytes: int, keep_rows: int
    ) -> None:
        """size: bytes and rows of a value."""
        self._load, self._size, self._max_bytes, self._keep_rows = load, size, max_bytes, keep_rows
        self.values: OrderedDict[K, V] = OrderedDict()
        self.held_bytes = self._held_rows = 0

    def get(self, key: K) -> V:
        if key in self.values:
            self.values.move_to_end(key)
            return self.values[key]
        value = self._load(key)
        self.values[key] = value
        size_bytes, rows = self._size(value)
        self.held_bytes, self._held_rows = self.held_bytes + size_bytes, self._held_rows + rows
        while self.held_bytes > self._max_bytes:
            size_bytes, rows = self._size(next(iter(self.values.values())))
            if self._held_rows - rows < self._keep_rows:
                break
            self.values.popitem(last=False)
            self.held_bytes, self._held_rows = self.held_bytes - size_bytes, self._held_rows - rows
        return value
