"""Tables of features and pixel counts, and reading them back as arrays."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from pbe.data import images
from pbe.data.masks import hole_of
from pbe.data.schema import FEATURES, PIXELS, is_optional, without_empty
from pbe.evaluate.bench.scopes import picture_column
from pbe.evaluate.features.crops import Crop, Decode, edit_key
from pbe.evaluate.features.extractors import Extractor, Preprocessing
from pbe.evaluate.features.lpips import Lpips
from pbe.evaluate.metrics.background import background_max_error, background_ssim
from pbe.evaluate.metrics.copy_paste import copy_paste_score
from pbe.evaluate.metrics.seam import seam
from pbe.evaluate.metrics.similarity import background_psnr, hole_psnr, mean_colour

Row = Mapping[str, Any]


class Features:
    """Rows of a FEATURES table, one per crop. Equal pictures are run once: some baselines fill a hole alike from every
    reference. At most `batch_rows` pictures per kind of preprocessing wait to be run.
    """

    def __init__(self, extractor: Extractor, *, batch_rows: int) -> None:
        self._extractor, self._batch_rows = extractor, batch_rows
        self._rows: list[dict[str, Any]] = []
        self._vectors: dict[tuple[Preprocessing, bytes], bytes] = {}  # by the picture's digest
        self._waiting: dict[Preprocessing, dict[bytes, list[Crop]]] = {}

    def add(self, crops: Iterable[Crop]) -> None:
        for crop in crops:
            picture = hashlib.sha256(repr(crop.picture.shape).encode())
            picture.update(np.ascontiguousarray(crop.picture).data)
            content = picture.digest()
            if (vector := self._vectors.get((crop.preprocessing, content))) is not None:
                self._append(crop, vector)
                continue
            waiting = self._waiting.setdefault(crop.preprocessing, {})
            waiting.setdefault(content, []).append(crop)
            if len(waiting) == self._batch_rows:
                self._run(crop.preprocessing)

    def table(self) -> pa.Table:
        """Run what waits, and return the table of all crops."""
        for preprocessing in tuple(self._waiting):
            self._run(preprocessing)
        return pa.Table.from_pylist(self._rows, schema=FEATURES)

    def _run(self, preprocessing: Preprocessing) -> None:
        batch = self._waiting.pop(preprocessing)
        vectors = self._extractor(
            [crops[0].picture for crops in batch.values()], preprocessing=preprocessing, batch_rows=self._batch_rows
        ).astype("<f4")
        for (content, crops), vector in zip(batch.items(), vectors, strict=True):
            if not np.isfinite(vector).all():
                raise ValueError(
                    f"{self._extractor.name} gives values that are not finite for {crops[0].key} ({crops[0].view})"
                )
            self._vectors[preprocessing, content] = vector.tobytes()
            for crop in crops:
                self._append(crop, vector.tobytes())

    def _append(self, crop: Crop, vector: bytes) -> None:
        self._rows.append({"key": crop.key, "view": crop.view, "vector": vector})


def extract(crops: Iterable[Crop], extractor: Extractor, *, batch_rows: int) -> pa.Table:
    """Return a FEATURES table, one row per crop."""
    features = Features(extractor, batch_rows=batch_rows)
    features.add(crops)
    return features.table()


def count_pixels(
    edits: Sequence[Row], bench: Mapping[str, Row], *, lpips: Lpips | None = None, decode: Decode = images.decode
) -> pa.Table:
    """Return a PIXELS table for rows of EDITS. bench: rows of BENCH by id. PSNR is inf where pictures are equal.

    lpips: measures its two optional columns too.
    """
    rows = []
    for row in edits:
        item = bench[row["bench_id"]]
        edit, source = decode(row["edit"]), decode(item["source"])
        reference = decode(item[picture_column(row["reference_kind"])])
        hole_mask = hole_of(item, row["hole_kind"], source)
        rows.append(
            {
                **{name: row[name] for name in ("bench_id", "hole_kind", "reference_kind", "seed")},
                "hole_psnr_db": hole_psnr(edit, source, hole_mask),
                "background_psnr_db": background_psnr(edit, source, hole_mask),
                "background_max_error": background_max_error(edit, source, hole_mask),
                "background_ssim": background_ssim(edit, source, hole_mask),
                "seam": seam(edit, source, hole_mask),
                "copy_paste": copy_paste_score(edit, hole_mask, reference),
                **dict(zip(("colour_r", "colour_g", "colour_b"), mean_colour(edit, hole_mask), strict=True)),
                **dict(zip(("reference_r", "reference_g", "reference_b"), mean_colour(reference, None), strict=True)),
            }
        )
        if lpips is not None:
            of_parts = lpips.of_edit(edit, source, hole_mask)
            names = (f"background_lpips_{lpips.net}", f"hole_lpips_{lpips.net}")
            rows[-1] |= dict(zip(names, of_parts, strict=True))
    return without_empty(pa.Table.from_pylist(rows, schema=PIXELS))


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

    def of_first(self, keys: Sequence[str], views: Sequence[str]) -> np.ndarray:
        """Like `of`, of the first view that each key has. Raises KeyError for a key with none of them."""
        found = [next((view for view in views if (key, view) in self._at), views[-1]) for key in keys]
        return self._vectors[[self._at[pair] for pair in zip(keys, found, strict=True)]].astype(np.float64)

    def keys_of(self, view: str) -> list[str]:
        """Return the keys of `all_of`'s rows."""
        return [key for key, name in self._at if name == view]

    def all_of(self, view: str) -> np.ndarray:
        """Return (N, d) float64 in the order of the tables."""
        return self._vectors[[index for (_, name), index in self._at.items() if name == view]].astype(np.float64)


class PixelTable:
    """PIXELS tables as arrays. lpips: names of the optional columns that they have."""

    def __init__(self, tables: Sequence[pa.Table]) -> None:
        table = pa.concat_tables(tables)
        self._at = {edit_key(row): index for index, row in enumerate(table.select(_KEY).to_pylist())}
        names = [name for name in PIXELS.names if name not in _KEY and not table.column(name).null_count]
        self._columns = {name: table.column(name).to_numpy() for name in names}
        self.lpips = [field.name for field in PIXELS if is_optional(field) and field.name in names]

    def of(self, keys: Sequence[str], *columns: str) -> np.ndarray:
        """Return (N,) for one column, (N, C) for several, in the order of `keys`."""
        index = [self._at[key] for key in keys]
        values = np.stack([self._columns[column][index] for column in columns], axis=-1)
        return values[:, 0] if len(columns) == 1 else values


_KEY = ["bench_id", "hole_kind", "reference_kind", "seed"]
