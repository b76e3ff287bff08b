"""`pbe show triplets`: a contact sheet of given photos, or of random rows."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from pbe.data.contact import triplet_sheet
from pbe.data.files import SourceError
from pbe.data.rng import shard_of
from pbe.data.slots import slot_files
from pbe.store import Manifest, Store


def show_triplets(
    store: Store, manifest: Manifest, *, image_ids: Sequence[str], rows: int, seed: int
) -> tuple[np.ndarray, list[str]]:
    """The sheet as (H, W, 3) uint8, and what each of its columns shows.

    image_ids: show the first slots of these photos, `rows` columns in all; if empty, `rows` random rows of all slots.
    Raises SourceError if there is no such triplet.
    """
    chosen = _of_photos(store, manifest, image_ids, rows) if image_ids else _random(store, manifest, rows, seed)
    if not chosen:
        raise SourceError("materialize has no triplet of " + (", ".join(image_ids) if image_ids else "any photo"))
    names = [f"{row['image_id']} slot {row['slot']}: {row['label_name']}" for row in chosen]
    return triplet_sheet(chosen), names


def _of_photos(store: Store, manifest: Manifest, image_ids: Sequence[str], rows: int) -> list[dict[str, Any]]:
    per_photo = max(1, rows // len(image_ids))
    out: dict[str, list[dict[str, Any]]] = {image_id: [] for image_id in image_ids}
    labels = {f"s{shard_of(image_id, len(manifest.units)):04d}" for image_id in image_ids}  # a unit is a shard
    units = tuple(unit for unit in manifest.units if unit.unit.split("-")[0] in labels)
    for files in slot_files(replace(manifest, units=units))[:per_photo]:
        for file in files:
            for index, image_id in enumerate(store.read_table(file, columns=["image_id"]).column(0).to_pylist()):
                if image_id in out:
                    out[image_id] += store.read_table(file).slice(index, 1).to_pylist()
    missing = [image_id for image_id, found in out.items() if not found]
    if missing:
        raise SourceError(f"materialize has no triplet of {', '.join(missing)}; `pbe rejects` says what was dropped")
    return [row for found in out.values() for row in found]


def _random(store: Store, manifest: Manifest, rows: int, seed: int) -> list[dict[str, Any]]:
    files = [file for slot in slot_files(manifest) for file in slot]
    ends = np.cumsum([file.rows for file in files])
    total = int(ends[-1]) if len(ends) else 0
    picked = np.sort(np.random.default_rng(seed).choice(total, size=min(rows, total), replace=False))
    out = []
    for row in picked:
        number = int(np.searchsorted(ends, row, side="right"))
        offset = int(row) - (int(ends[number - 1]) if number else 0)
        out += store.read_table(files[number]).slice(offset, 1).to_pylist()
    return out
