"""The judge sees edits and references as evaluate does, so that its gains are the table's."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from pbe.data.images import encode_png
from pbe.data.masks import pack_mask
from pbe.evaluate.bench.scopes import Scope
from pbe.evaluate.features.crops import Crop, bench_crops, edited_crops
from pbe.evaluate.features.extractors import Preprocessing
from pbe.evaluate.judge import VIEWS, FeatureJudge
from pbe.train.data.scored import ScoreRow
from pbe.train.scoring import Filled

SIDE = 16


class _Seen:
    """An extractor that keeps what it is given; a feature is the mean colour."""

    name, digest, resize_rule = "seen", "", ""
    paper = cmmds_network = False

    def __init__(self, *, matches_resolution: bool) -> None:
        self.matches_resolution = matches_resolution
        self.pictures: list[tuple[Preprocessing, np.ndarray]] = []

    def __call__(
        self, images: Sequence[np.ndarray], *, preprocessing: Preprocessing = "whole", batch_rows: int
    ) -> np.ndarray:
        self.pictures += [(preprocessing, picture) for picture in images]
        return np.stack([picture.mean((0, 1), dtype=np.float64) for picture in images])


def _filled(seed: int) -> Filled:
    rng = np.random.default_rng(seed)

    def picture(side: int) -> np.ndarray:
        return rng.integers(0, 256, (side, side, 3)).astype(np.uint8)

    hole_mask = np.zeros((SIDE, SIDE), np.uint8)
    hole_mask[3 + seed : 9, 5:15] = 1
    row = ScoreRow(f"photo{seed}", picture(SIDE), hole_mask, picture(32))
    return Filled(row, own=picture(SIDE), foreign=picture(SIDE), foreign_reference=picture(32))


@pytest.mark.parametrize("matched", [True, False])
def test_pictures_are_those_of_evaluate(matched: bool) -> None:
    filled = _filled(1)
    row, hole = filled.row, filled.row.hole_mask[..., None] > 0
    extractor = _Seen(matches_resolution=matched)
    features = FeatureJudge(extractor).features([filled])
    assert list(features) == list(VIEWS) and features["edit"].dtype == np.float32
    identity = {"bench_id": "a", "hole_kind": "box", "reference_kind": "own", "seed": 1}
    bench: dict[str, Any] = {
        "bench_id": "a",
        "source": encode_png(row.photo),
        "box_hole_mask": pack_mask(row.hole_mask),
        "own": encode_png(row.reference),
        "exemplar": encode_png(row.reference),
        "foreign": encode_png(filled.foreign_reference),
    }
    crops: list[Crop] = []
    for fill in (filled.own, filled.foreign):
        edit = encode_png(np.where(hole, fill, row.photo))
        crops += edited_crops([identity | {"edit": edit}], {"a": bench}, region="whole")
    own, own_region, _, foreign_region = crops
    scopes: list[Scope] = [("box", "own"), ("box", "foreign")]
    views = {c.view: c for c in bench_crops([bench], scopes, matched=matched, median_px=8, region="whole")}
    expected = [views["source"], own, own_region, foreign_region, views["box/own"], views["box/foreign"]]
    for (preprocessing, picture), crop in zip(extractor.pictures, expected, strict=True):
        assert preprocessing == crop.preprocessing
        np.testing.assert_array_equal(picture, crop.picture)


def test_a_fill_that_follows_its_reference_gains_and_the_photo_itself_is_no_distance_away() -> None:
    judge = FeatureJudge(_Seen(matches_resolution=True))
    rows, follows, keeps = [], [], []
    for seed in range(4):
        row = _filled(seed).row
        own, foreign = (np.full((32, 32, 3), colour, np.uint8) for colour in ([200, 20, 20], [20, 20, 200]))
        rows.append(row.image_id)
        row = ScoreRow(row.image_id, row.photo, row.hole_mask, own)
        follows.append(Filled(row, own[:SIDE, :SIDE], foreign[:SIDE, :SIDE], foreign))
        keeps.append(Filled(row, row.photo, row.photo, foreign))
    followed, kept = (judge.scores(judge.features(filled), rows) for filled in (follows, keeps))
    assert followed["exemplar_gain_seen"] > 0.5 and abs(kept["exemplar_gain_seen"]) < 1e-12
    assert kept["kid_seen"] == 0 and followed["kid_seen"] != 0
