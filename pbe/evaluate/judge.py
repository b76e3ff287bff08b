"""Scores of a model while it trains, from the evaluate stage's extractors: the `Judge` of pbe/train/scoring.py.

    kid_X             kernel distance of edits to the photos of the same crops, by features of extractor X
    exemplar_gain_X   as in the result table, over the box of the hole

Edits and their pictures are prepared as in evaluate: pasted back with a hard edge, references at the resolution of the
region that they fill. Deviation: kid_X compares with the crops themselves, by pairs, where evaluate compares with other
crops; its expectation is the same, but curves are to be compared with curves.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from pbe.evaluate.features.extractors import Extractor, Preprocessing
from pbe.evaluate.features.weights import Entry, open_extractor
from pbe.evaluate.metrics.paired_kid import paired_kid
from pbe.evaluate.metrics.similarity import exemplar_gain, hole_region, match_resolution
from pbe.model.precision import float32_products
from pbe.store import Store
from pbe.train.scoring import Filled

CPU = torch.device("cpu")
BATCH_ROWS = 16  # pictures per call of the extractor
# names of the features, and how the extractor prepares their pictures
VIEWS: dict[str, Preprocessing] = {
    "photo": "whole",
    "edit": "whole",
    "own_region": "region",
    "foreign_region": "region",
    "own_reference": "reference",
    "foreign_reference": "reference",
}


class FeatureJudge:
    """A `Judge` of one extractor."""

    def __init__(self, extractor: Extractor) -> None:
        self._extractor = extractor

    def features(self, filled: Sequence[Filled]) -> dict[str, np.ndarray]:
        """By the names of VIEWS, (N, d) float32 each; IEEE float32 whatever training computes in."""
        pictures = [self._pictures(item) for item in filled]
        with float32_products(tf32=False):
            return {
                view: self._extractor(
                    [of_item[view] for of_item in pictures], preprocessing=preprocessing, batch_rows=BATCH_ROWS
                ).astype(np.float32)
                for view, preprocessing in VIEWS.items()
            }

    def scores(self, features: Mapping[str, np.ndarray], image_ids: Sequence[str]) -> dict[str, float]:
        name = self._extractor.name
        gains = exemplar_gain(
            features["own_region"],
            features["foreign_region"],
            features["own_reference"],
            features["foreign_reference"],
        )
        return {
            f"kid_{name}": paired_kid(features["edit"], features["photo"], groups=image_ids),
            f"exemplar_gain_{name}": float(gains.both.mean()),
        }

    def _pictures(self, filled: Filled) -> dict[str, np.ndarray]:
        row, hole = filled.row, filled.row.hole_mask
        own, foreign = (np.where(hole[..., None] > 0, fill, row.photo) for fill in (filled.own, filled.foreign))
        own_reference, foreign_reference = row.reference, filled.foreign_reference
        if self._extractor.matches_resolution:
            size = hole_region(row.photo, hole).shape[:2]
            own_reference = match_resolution(own_reference, *size)
            foreign_reference = match_resolution(foreign_reference, *size)
        return {
            "photo": row.photo,
            "edit": own,
            "own_region": hole_region(own, hole),
            "foreign_region": hole_region(foreign, hole),
            "own_reference": own_reference,
            "foreign_reference": foreign_reference,
        }


def open_judge(entry: Entry, store: Store, device: torch.device) -> FeatureJudge:
    """Load the judge's extractor onto `device`. Raises as `open_extractor`."""
    return FeatureJudge(open_extractor(store, entry, device=device))
