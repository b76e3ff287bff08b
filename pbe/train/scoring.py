"""Scores of edits while a model trains: do they look more like photos, and do they follow their references?

The rows are training rows, as only photos of the train split are materialized: the curves show whether a run learns,
and which of two learns faster; they say nothing about unseen photos. The bench, which does, is scored after training.
Each hole is filled twice from the same noise, by the row's own reference and by a foreign one, that of the next row of
another photo. In a text-conditioned model, captions stand in the references' place.

No score is a Frechet distance: its bias at so few rows is larger than what training changes.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from pbe.model.card import ModelCard
from pbe.model.codec import Codec
from pbe.track import SCORES
from pbe.train.data.batch import Batch
from pbe.train.data.scored import ScoreRow, foreign_rows
from pbe.train.fill import codec_on, fill_holes, pictures_of
from pbe.train.loss import Diffusion
from pbe.train.ranks import Ranks


@dataclass(frozen=True, eq=False)
class Filled:
    """A row with both its fills, each (S, S, 3) uint8, as decoded: outside the hole they differ from the photo."""

    row: ScoreRow
    own: np.ndarray
    foreign: np.ndarray
    foreign_reference: np.ndarray  # (R, R, 3) uint8


class Judge(Protocol):
    """What scores are made of. In pbe/evaluate/judge.py, which training does not import: the spec brings it."""

    def features(self, filled: Sequence[Filled]) -> dict[str, np.ndarray]:
        """Features of N rows, (N, d) float32 each, by name. Each rank calls it for its own rows."""
        ...

    def scores(self, features: Mapping[str, np.ndarray], image_ids: Sequence[str]) -> dict[str, float]:
        """Scores of all rows, by name, from their features and photos."""
        ...


@dataclass(frozen=True, eq=False)
class _Chunk:
    """The rows of one call of the network."""

    first: int  # number of its first row
    is_spare: bool  # another rank has it too; this one only keeps step
    batch: Batch
    foreign_tokens: Tensor  # (B, T, width)
    rows: Sequence[ScoreRow]
    foreign_references: Sequence[np.ndarray]


class Scoring:
    """Holds this rank's share of `train.score_rows` rows; the scores are the same for any number of ranks."""

    def __init__(
        self,
        card: ModelCard,
        codec: Codec,
        diffusion: Diffusion,
        batch: Batch,
        rows: Sequence[ScoreRow],
        judge: Judge,
        ranks: Ranks,
    ) -> None:
        """batch: all rows, on the CPU. Raises InputError if all rows are of one photo."""
        self._card, self._codec, self._diffusion = card, codec, diffusion
        self._judge, self._ranks = judge, ranks
        self._image_ids = [row.image_id for row in rows]
        foreign = foreign_rows(self._image_ids)
        size = diffusion.cfg.micro_batch
        chunks = [range(len(rows))[start : start + size] for start in range(0, len(rows), size)]
        rounds = -(-len(chunks) // ranks.world)  # equally many on every rank, as ZeRO 3 requires
        self._chunks = []
        for number in range(ranks.rank, rounds * ranks.world, ranks.world):
            members = chunks[number % len(chunks)]
            others = [foreign[row] for row in members]
            self._chunks.append(
                _Chunk(
                    first=members[0],
                    is_spare=number >= len(chunks),
                    batch=batch.take(members),
                    foreign_tokens=batch.exemplar_tokens[others],
                    rows=[rows[row] for row in members],
                    foreign_references=[rows[row].reference for row in others],
                )
            )

    @torch.no_grad()
    def __call__(self, network: Any) -> dict[str, float]:
        """The judge's scores, the number of rows and the seconds that this took, by name. Collective."""
        began = time.perf_counter()
        found = []
        for chunk in self._chunks:
            filled = self._filled(network, chunk)
            if not chunk.is_spare:
                found.append((chunk.first, self._judge.features(filled)))
        parts = [part for of_rank in self._ranks.all_gather(found) for part in of_rank]
        in_order = [features for _, features in sorted(parts, key=lambda part: part[0])]
        features = {name: np.concatenate([part[name] for part in in_order]) for name in in_order[0]}
        scores = self._judge.scores(features, self._image_ids)
        scores |= {"rows": float(len(self._image_ids)), "seconds": time.perf_counter() - began}
        return {f"{SCORES}{name}": value for name, value in scores.items()}

    def _filled(self, network: Any, chunk: _Chunk) -> list[Filled]:
        device = self._diffusion.device
        own = chunk.batch.to(device)
        foreign = replace(own, exemplar_tokens=chunk.foreign_tokens.to(device))
        pictures = []
        with codec_on(device, self._codec, self._diffusion.cfg) as codec:
            for batch in (own, foreign):
                latent = fill_holes(network, batch, card=self._card, codec=codec, diffusion=self._diffusion)
                pictures.append(pictures_of(latent, codec))
        return [Filled(*row) for row in zip(chunk.rows, *pictures, chunk.foreign_references, strict=True)]
