"""From features and counts to named numbers: the right rows together, whatever the order; names that are honest."""

from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pbe.data.rng import row_rng
from pbe.data.schema import FEATURES, PIXELS
from pbe.evaluate.features.crops import edit_key
from pbe.evaluate.features.tables import FeatureTable, PixelTable
from pbe.evaluate.metrics.frechet import feature_statistics
from pbe.evaluate.metrics.mixture import Mixture
from pbe.evaluate.metrics.similarity import cosine
from pbe.evaluate.reference_set import make_reference_set
from pbe.evaluate.score import Method, ReferenceSet, Score, metric_names, score_method
from pbe.evaluate.settings import StatisticsConfig

ITEMS, WIDTH, SEEDS = 24, 10, (5, 9)
BENCH_IDS = [f"p{i // 2}#{i}" for i in range(ITEMS)]
PHOTOS = {name: name.split("#")[0] for name in BENCH_IDS}
CFG = StatisticsConfig(resamples=100, subsets=20, seed=0)
SCOPES = [(hole, kind) for hole in ("box", "bezier") for kind in ("exemplar", "foreign")]


def _vector(*identity: object) -> np.ndarray:
    """Another vector for every identity, the same at every call."""
    return row_rng(0, *map(str, identity)).random(WIDTH).astype(np.float32)


def _looks(rows: list[tuple[str, str]]) -> FeatureTable:
    table = [{"key": key, "view": view, "vector": _vector(key, view).tobytes()} for key, view in rows]
    return FeatureTable([pa.Table.from_pylist(table, schema=FEATURES)])


def _method(order: int = 0) -> Method:
    """order: how the rows lie in their tables."""
    edits = [
        {"bench_id": name, "hole_kind": hole, "reference_kind": kind, "seed": seed}
        for name in BENCH_IDS
        for hole, kind in SCOPES
        for seed in SEEDS
    ]
    looked = [(edit_key(edit), view) for edit in edits for view in ("whole", "region")]
    bench = [(name, f"{hole}/{kind}") for name in BENCH_IDS for hole, kind in SCOPES]
    numbers = [name for name in PIXELS.names if name not in edits[0]]
    pixels: list[dict[str, Any]] = [
        {**edit, **dict(zip(numbers, (50 * _vector(edit_key(edit), "pixels")).tolist(), strict=False))}
        for edit in edits
    ]
    rng = np.random.default_rng(order)
    for rows in (looked, bench, pixels):
        rng.shuffle(rows)
    counts = PixelTable([pa.Table.from_pylist(pixels, schema=PIXELS)])
    return Method(edits, {"lite": _looks(looked)}, {"lite": _looks(bench)}, counts, PHOTOS)


def _scale(**changes: Any) -> ReferenceSet:
    real_images = np.stack([_vector("real", i) for i in range(30)]).astype(float)
    photos = np.stack([_vector("photo", i) for i in range(30)]).astype(float)
    settings: dict[str, Any] = {"mixture": None, "upstream_region": False} | changes
    settings |= {"real_images": real_images, "statistics": feature_statistics(real_images), "bench_photos": photos}
    return make_reference_set("lite", components=2, pca_dims=3, seed=0, **settings)


def _by_name(scores: tuple[Score, ...]) -> dict[str, Score]:
    return {score.metric: score for score in scores}


def test_numbers_belong_to_their_items_whatever_the_order_of_the_tables() -> None:
    first, second = (score_method(_method(order), {"lite": _scale()}, CFG) for order in (0, 1))
    assert [(s.hole_kind, s.reference_kind) for s in first] == [("box", "exemplar"), ("bezier", "exemplar")]
    for a, b in zip(first, second, strict=True):
        assert a.bench_ids == tuple(BENCH_IDS)
        for x, y in zip(a.scores, b.scores, strict=True):
            assert x.metric == y.metric
            assert y.estimate.value == pytest.approx(x.estimate.value, rel=1e-6)


def test_each_number_is_what_its_name_says() -> None:
    found = _by_name(score_method(_method(), {"lite": _scale()}, CFG)[0].scores)
    reference = np.stack([_vector(name, "box/exemplar") for name in BENCH_IDS]).astype(float)
    foreign = np.stack([_vector(name, "box/foreign") for name in BENCH_IDS]).astype(float)

    def seen(kind: str, seed: int, view: str) -> np.ndarray:
        return np.stack([_vector(f"{name}|box|{kind}|{seed}", view) for name in BENCH_IDS]).astype(float)

    similarity = np.mean([cosine(seen("exemplar", seed, "region"), reference) for seed in SEEDS], 0)
    similarity_of = found["similarity_lite"].per_item
    assert similarity_of is not None
    np.testing.assert_allclose(similarity_of, similarity)
    assert found["similarity_lite"].estimate.clusters == 12
    given = np.mean(
        [
            cosine(seen("exemplar", seed, "region"), reference) - cosine(seen("foreign", seed, "region"), reference)
            for seed in SEEDS
        ]
    )
    swap = np.mean(
        [
            cosine(seen("foreign", seed, "region"), foreign) - cosine(seen("exemplar", seed, "region"), foreign)
            for seed in SEEDS
        ]
    )
    assert found["exemplar_gain_given_lite"].estimate.value == pytest.approx(given)
    assert found["exemplar_gain_swap_lite"].estimate.value == pytest.approx(swap)
    assert found["exemplar_gain_lite"].estimate.value == pytest.approx((given + swap) / 2)
    scale = _scale()
    frechet = np.mean([scale.frechet(seen("exemplar", seed, "whole")) for seed in SEEDS])
    assert found["frechet_lite"].estimate.value == pytest.approx(frechet)
    assert "2 seeds" in found["frechet_lite"].estimate.method
    assert found["kid_lite"].per_item is None and "12 photos" in found["kid_lite"].estimate.method


def test_only_the_papers_extractors_give_the_papers_names() -> None:
    scale, mixture = _scale(), Mixture(np.ones(1), np.zeros((1, WIDTH)), np.ones(1), "spherical")
    assert set(metric_names(scale).values()) == {"frechet_lite", "kid_lite", "qs_rank_lite", "similarity_lite"}
    clip = replace(_scale(mixture=mixture, upstream_region=True), name="clip")
    assert metric_names(clip) == {
        "frechet": "clip_fid",
        "kid": "kid_clip",
        "quality": "qs",
        "similarity": "clip_score",
    }
    assert metric_names(replace(clip, upstream_region=False))["similarity"] == "clip_score_whole"
    assert metric_names(replace(scale, name="inception"))["frechet"] == "fid"


def test_too_few_items_name_the_scope() -> None:
    method = _method()
    few = replace(method, edits=[edit for edit in method.edits if edit["bench_id"] in BENCH_IDS[:4]])
    with pytest.raises(ValueError, match="box holes, exemplar references, 4 items: 2 photos: a delete-half jackknife"):
        score_method(few, {"lite": _scale()}, CFG)


def test_reals_that_measure_nothing_are_refused() -> None:
    def scale(real_images: np.ndarray, components: int) -> ReferenceSet:
        return make_reference_set(
            "lite",
            real_images=real_images,
            statistics=feature_statistics(real_images),
            bench_photos=np.ones((30, WIDTH)),
            mixture=None,
            upstream_region=False,
            components=components,
            pca_dims=3,
            seed=0,
        )

    with pytest.raises(ValueError, match="all the same"):
        scale(np.ones((30, WIDTH)), 2)
    with pytest.raises(ValueError, match="cannot fit 40 components"):
        scale(np.random.default_rng(0).random((30, WIDTH)), 40)
