"""Near-duplicate photos: bursts, re-compressed, resized, slightly cropped or re-exposed copies.

A photo of the training split that shows what a held-out photo shows makes every score on "unseen" photos too good. The
similarity of two photos is the cosine of their descriptors (pbe/data/descriptor.py), -1 to 1. Measured on 1,670 VOC
photos and 1,700 of shelves, whose 3 million pairs were looked at from the top: copies are at 0.94 to 1.00, other photos
at 0.87 and below. At least 95 % of copies come out at 0.99 when re-compressed at quality 30, halved or 15 % brighter,
at 0.97 when cropped by 3 %, 0.90 by 6 %, 0.78 by 10 %. Mirrored copies are not found.
"""

import hashlib
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from pbe.data.schema import DESCRIPTOR_BYTES

_CHUNK = 1 << 22  # cosines at a time


class Nearest(NamedTuple):
    """The most similar of the photos compared with."""

    similarity: float
    image_id: str


class HeldOut:
    """The held-out photos, to find the nearest of. ids: of those that are not flat. digest: of ids and descriptors."""

    def __init__(self, photos: Iterable[tuple[str, bytes]]) -> None:
        """photos: image id and descriptor. Flat ones are left out."""
        found = sorted((image_id, data) for image_id, data in photos if any(data))
        self.ids = [image_id for image_id, _ in found]
        self.digest = hashlib.sha256(repr(found).encode()).hexdigest()
        self._vectors = _vectors(data for _, data in found)
        self._norms = _norms(self._vectors)

    def nearest(self, descriptors: Iterable[bytes]) -> Iterator[Nearest | None]:
        """The nearest photo of each descriptor; None for a flat one, or without held-out photos.

        Products of int8 are exact in float32 here, so that every machine finds the same.
        """
        vectors = _vectors(descriptors)
        norms = _norms(vectors)
        rows = max(1, _CHUNK // max(1, len(self.ids)))
        for start in range(0, len(vectors), rows):
            chunk, lengths = vectors[start : start + rows], norms[start : start + rows]
            if not self.ids:
                yield from [None] * len(chunk)
                continue
            dots = (chunk @ self._vectors.T).astype(np.float64)
            cosines = dots / np.maximum(lengths, 1)[:, None] / self._norms
            best = cosines.argmax(axis=1)
            for row, column in enumerate(best):
                yield Nearest(float(cosines[row, column]), self.ids[column]) if lengths[row] else None


def _vectors(descriptors: Iterable[bytes]) -> np.ndarray:
    """(N, DESCRIPTOR_BYTES) float32."""
    return np.frombuffer(b"".join(descriptors), np.int8).reshape(-1, DESCRIPTOR_BYTES).astype(np.float32)


def _norms(vectors: np.ndarray) -> np.ndarray:
    """(N,) float64, of sums of whole numbers."""
    return np.sqrt((vectors.astype(np.float64) ** 2).sum(axis=1))
