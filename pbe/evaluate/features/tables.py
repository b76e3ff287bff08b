"""Tables of features and pixel counts, and reading them back as arrays."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from pbe.data import images
from pbe.data.masks import hole_of
from pbe.data.schema import FEATURES, PIXELS
from pbe.evaluate.features.crops import Crop, edit_key
from pbe.evaluate.features.extractors import Extractor, Preprocessing
from pbe.evaluate.metrics.copy_paste import copy_paste_score
from pbe.evaluate.metrics.similarity import background_psnr, hole_psnr, mean_colour

Row = Mapping[str, Any]


def extract(crops: Iterable[Crop], extractor: Extractor, *, batch_rows: int) -> pa.Table:
    """Return a FEATURES table, one row per crop, holding at most `batch_rows` crops per kind of preprocessing."""
    rows: list[dict[str, Any]] = []
    waiting: dict[Preprocessing, list[Crop]] = {}

    def run(preprocessing: Preprocessing) -> None:
        batch = waiting.pop(preprocessing)
        vectors = extractor(
            [crop.picture for crop in batch], preprocessing=preprocessing, batch_rows=batch_rows
        ).astype("<f4")
        for crop, vector in zip(batch, vectors, strict=True):
            if not np.isfinite(vector).all():
                raise ValueError(f"{extractor.name} gives values that are not finite for {crop.key} ({crop.view})")
            rows.append({"key": crop.key, "view": crop.view, "vector": vector.tobytes()})

    for crop in crops:
        waiting.setdefault(crop.preprocessing, []).append(crop)
        if len(waiting[crop.preprocessing]) == batch_rows:
            run(crop.preprocessing)
    for preprocessing in tuple(waiting):
        run(preprocessing)
    return pa.Table.from_pylist(rows, schema=FEATURES)


def count_pixels(edits: Sequence[Row], bench: Mapping[str, Row]) -> pa.Table:
    """Return a PIXELS table for rows of EDITS. bench: rows of BENCH by id. PSNR is inf where pictures are equal."""
    rows = []
    for row in edits:
        item = bench[row["bench_id"]]
        edit, source = images.decode(row["edit"]), images.decode(item["source"])
        reference = images.decode(item[row["reference_kind"]])
        hole_mask = hole_of(item, row["hole_kind"], source)
        rows.append(
            {
                **{name: row[name] for name in ("bench_id", "hole_kind", "reference_kind", "seed")},
                "hole_psnr_db": hole_psnr(edit, source, hole_mask),
                "background_psnr_db": background_psnr(edit, source, hole_mask),
                "copy_paste": copy_paste_score(edit, hole_mask, reference),
                **dict(zip(("colour_r", "colour_g", "colour_b"), mean_colour(edit, hole_mask), strict=True)),
                **dict(zip(("reference_r", "reference_g", "reference_b"), mean_colour(reference, None), strict=True)),
            }
        )
    return pa.Table.from_pylist(rows, schema=PIXELS)


class FeatureTable:
    """FEATURES tables as arrays, by view."""

    def __init__(self, tables: Sequence[pa.Table]) -> None:
        table = pa.concat_tables(tables)
        keys, views = table.column("key").to_pylist(), table.column("view").to_pylist()
        self._at = {pair: index for index, pair in enumerate(zip(keys, views, strict=True))}
        if len(self._at) < len(keys):
            raise ValueError(
                f"{len(keys) - len(self._at)} rows repeat the key and view of another; each must be unique"
            )
        flat = np.frombuffer(b"".join(table.column("vector").to_pylist()), "<f4")
        self._vectors = flat.reshape(len(keys), -1)

    def of(self, keys: Sequence[str], view: str) -> np.ndarray:
        """Return (N, d) float64 in the order of `keys`. Raises KeyError for a key without features."""
        return self._vectors[[self._at[key, view] for key in keys]].astype(np.float64)

    def all_of(self, view: str) -> np.ndarray:
        """Return (N, d) float64 in the order of the tables."""
        return self._vectors[[index for (_, name), index in self._at.items() if name == view]].astype(np.float64)


class PixelTable:
    """PIXELS tables as arrays."""

    def __init__(self, tables: Sequence[pa.Table]) -> None:
        table = pa.concat_tables(tables)
        self._at = {edit_key(row): index for index, row in enumerate(table.select(_KEY).to_pylist())}
        names = [name for name in PIXELS.names if name not in _KEY]
        self._columns = {name: table.column(name).to_numpy() for name in names}

    def of(self, keys: Sequence[str], *columns: str) -> np.ndarray:
        """Return (N,) for one column, (N, C) for several, in the order of `keys`."""
        index = [self._at[key] for key in keys]
        values = np.stack([self._columns[column][index] for column in columns], axis=-1)
        return values[:, 0] if len(columns) == 1 else values


_KEY = ["bench_id", "hole_kind", "reference_kind", "seed"]
