"""What the fills of scored rows are compared with: pictures of the triplets that the rows were encoded from."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pbe.data import images
from pbe.data.masks import hole_of
from pbe.data.slots import InputError, slot_files
from pbe.store import Manifest, Store
from pbe.train.data.reader import Place, RowReader


@dataclass(frozen=True, eq=False)
class ScoreRow:
    """A scored row before encoding."""

    image_id: str
    photo: np.ndarray  # (S, S, 3) uint8, the crop before the edit
    hole_mask: np.ndarray  # (S, S) uint8, 1 = hole: the box
    reference: np.ndarray  # (R, R, 3) uint8, not augmented


def score_rows(store: Store, triplets: Manifest, places: Sequence[Place], *, pairs: bool) -> list[ScoreRow]:
    """The rows at `places`. pairs: a row with a pair has it as its reference. Raises StoreError."""
    reader = RowReader(store, slot_files(triplets), cache_bytes=0)
    out = []
    for slot, file, number in places:
        stored = reader.read(slot=slot, file=file, row=number)
        row = stored.values()
        photo = images.decode(row["source"])
        reference = row["pair_reference" if pairs and stored.has_pair else "reference"]
        out.append(ScoreRow(row["image_id"], photo, hole_of(row, "box", photo), images.decode(reference)))
    return out


def foreign_rows(image_ids: Sequence[str]) -> list[int]:
    """For each row the next one that is of another photo, after the last the first. Raises InputError if all rows are
    of one photo."""
    if len(set(image_ids)) < 2:
        raise InputError("train.score_every: scores need rows of two photos; add photos, or set it to 0")
    count = len(image_ids)
    out = []
    for row, image_id in enumerate(image_ids):
        later = ((row + step) % count for step in range(1, count))
        out.append(next(other for other in later if image_ids[other] != image_id))
    return out
