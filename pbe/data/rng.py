"""Randomness belongs to the row: one generator per (seed, row identity, purpose).

No draw depends on order, worker or batch, so data and losses are the same on 1, 2 or 64 workers.
"""

import hashlib

import numpy as np


def row_rng(seed: int, *identity: str | int) -> np.random.Generator:
    """A generator for one row and purpose, e.g. row_rng(seed, image_id, slot, "crop").

    The identity is hashed with BLAKE2b (Python's hash() is salted per process).
    """
    text = "\x1f".join([str(seed), *(f"{type(part).__name__}:{part}" for part in identity)])
    entropy = np.frombuffer(hashlib.blake2b(text.encode(), digest_size=16).digest(), "<u4")
    return np.random.Generator(np.random.PCG64(entropy))


def shard_of(image_id: str, shards: int) -> int:
    """Stable shard of an image, the same for all datasets."""
    return int.from_bytes(hashlib.blake2b(image_id.encode(), digest_size=8).digest(), "little") % shards


def unit_interval(image_id: str) -> float:
    """Stable number in [0, 1) of an image, independent of its shard; decides its split."""
    return int.from_bytes(hashlib.blake2b(image_id.encode(), digest_size=8, person=b"split").digest(), "little") / 2**64
