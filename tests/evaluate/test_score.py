"""From features and counts to named numbers: the right rows together, whatever the order; names that are honest."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pbe.data.rng import row_rng
from pbe.data.schema import FEATURES, PIXELS, is_optional
from pbe.evaluate.features.crops import edit_key
from pbe.evaluate.features.tables import FeatureTable, PixelTable
from pbe.evaluate.metrics.cmmd import cmmd
from pbe.evaluate.metrics.frechet import feature_statistics, frechet_distance
from pbe.evaluate.metrics.kid import kid
from pbe.evaluate.metrics.mixture import Mixture
from pbe.evaluate.metrics.retrieval import candidates_of
from pbe.evaluate.metrics.similarity import cosine
from pbe.evaluate.number import Score
from pbe.evaluate.reference_set import make_reference_set
from pbe.evaluate.score import Method, numbers_of, score_method
from pbe.evaluate.score_features import ReferenceSet, metric_names
from pbe.evaluate.settings import StatisticsConfig
from pipelines.reporting.metric_glossary import how_to_read

ITEMS, WIDTH, SEEDS, WITH_MASK = 24, 10, (5, 9), 9
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


def _method(order: int = 0, lpips: Sequence[str] = ()) -> Method:
    """order: how the rows lie in their tables. lpips: optional columns of PIXELS."""
    edits = [
        {"bench_id": name, "hole_kind": hole, "reference_kind": kind, "seed": seed}
        for name in BENCH_IDS
        for hole, kind in SCOPES
        for seed in SEEDS
    ]
    looked = [(edit_key(edit), view) for edit in edits for view in ("whole", "region")]
    looked += [(edit_key(edit), "masked") for edit in edits if edit["hole_kind"] == "bezier"]
    bench = [(name, f"{hole}/{kind}") for name in BENCH_IDS for hole, kind in SCOPES]
    bench += [(name, "bezier/exemplar/masked") for name in BENCH_IDS[:WITH_MASK]]
    numbers = [field.name for field in PIXELS if field.name not in edits[0] and not is_optional(field)]
    pixels: list[dict[str, Any]] = [
        {**edit, **{name: 50 * float(_vector(edit_key(edit), name)[0]) for name in (*numbers, *lpips)}}
        for edit in edits
    ]
    rng = np.random.default_rng(order)
    for rows in (looked, bench, pixels):
        rng.shuffle(rows)
    counts = PixelTable([pa.Table.from_pylist(pixels, schema=PIXELS)])
    return Method(edits, {"lite": _looks(looked)}, {"lite": _looks(bench)}, counts, PHOTOS)


def _stacked(*identities: tuple[object, ...]) -> np.ndarray:
    return np.stack([_vector(*identity) for identity in identities]).astype(float)


def _photo_holes(view: str) -> np.ndarray:
    return _stacked(*((view, name) for name in BENCH_IDS))


def _scale(**changes: Any) -> ReferenceSet:
    real_images = _stacked(*(("real", i) for i in range(30)))
    photos = _stacked(*(("photo", i) for i in range(30)))
    views = ("box/region", "bezier/region", "bezier/masked")
    settings: dict[str, Any] = {
        "mixture": None,
        "upstream_region": False,
        "cmmds_network": False,
        "photo_holes": {view: _photo_holes(view) for view in views},
        "exemplars": candidates_of(BENCH_IDS, _stacked(*(("exemplar", name) for name in BENCH_IDS))),
    } | changes
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
    cmmds = [cmmd(seen("exemplar", seed, "whole"), _stacked(*(("real", i) for i in range(30)))) for seed in SEEDS]
    assert found["cmmd_lite"].estimate.value == pytest.approx(np.mean(cmmds))
    crops = np.mean([frechet_distance(seen("exemplar", seed, "region"), _photo_holes("box/region")) for seed in SEEDS])
    assert found["frechet_fg_lite"].estimate.value == pytest.approx(crops)


def test_influence_is_counted_by_item_and_seed_with_its_chance_beside_it() -> None:
    scope = score_method(_method(), {"lite": _scale()}, CFG)[0]
    found = _by_name(scope.scores)
    wins, ranks, first = [], [], []
    exemplars = {name: _vector("exemplar", name).astype(float) for name in BENCH_IDS}
    for name in BENCH_IDS:
        own, foreign = (_vector(name, f"box/{kind}").astype(float)[None] for kind in ("exemplar", "foreign"))
        for seed in SEEDS:
            fill, other = (
                _vector(f"{name}|box|{kind}|{seed}", "region").astype(float)[None] for kind in ("exemplar", "foreign")
            )
            right = cosine(fill, own) + cosine(other, foreign)
            wins.append(float(right[0] > (cosine(other, own) + cosine(fill, foreign))[0]))
            cosines = {key: float(cosine(fill, vector[None])[0]) for key, vector in exemplars.items()}
            ranks.append(1 + sum(value > cosines[name] for value in cosines.values()))
            first.append(ranks[-1] == 1)
    assert found["exemplar_win_rate_lite"].estimate.value == pytest.approx(np.mean(wins))
    assert found["retrieval_rank_lite"].estimate.value == pytest.approx(np.mean(ranks))
    assert found["retrieval_r1_lite"].estimate.value == pytest.approx(np.mean(first))
    numbers = numbers_of(scope)
    chances = {metric: number["chance"] for metric, number in numbers.items() if "chance" in number}
    assert chances == {"exemplar_win_rate_lite": 0.5, "retrieval_rank_lite": 12.5, "retrieval_r1_lite": 1 / 24}


def test_through_the_mask_only_holes_that_are_no_boxes_are_scored() -> None:
    box, bezier = (_by_name(scope.scores) for scope in score_method(_method(), {"lite": _scale()}, CFG))
    assert bezier.keys() - box.keys() == {"similarity_masked_lite", "frechet_masked_lite", "kid_masked_lite"}
    views = ["bezier/exemplar/masked" if i < WITH_MASK else "bezier/exemplar" for i in range(ITEMS)]
    reference = _stacked(*zip(BENCH_IDS, views, strict=True))
    sets = [_stacked(*((f"{name}|bezier|exemplar|{seed}", "masked") for name in BENCH_IDS)) for seed in SEEDS]
    similarity = bezier["similarity_masked_lite"].per_item
    assert similarity is not None
    np.testing.assert_allclose(similarity, np.mean([cosine(masked, reference) for masked in sets], 0))
    kids = [kid(masked, _photo_holes("bezier/masked")) for masked in sets]
    assert bezier["kid_masked_lite"].estimate.value == pytest.approx(np.mean(kids))


def test_pixel_metrics_are_the_means_of_their_columns_and_lpips_is_there_with_its_weights_alone() -> None:
    lpips = ("background_lpips_alex", "hole_lpips_alex")
    plain, measured = (_by_name(score_method(_method(0, of), {}, CFG)[0].scores) for of in ((), lpips))
    assert measured.keys() - plain.keys() == set(lpips)
    for metric in ("background_max_error", "background_ssim", "seam", "copy_paste", *lpips):
        keys = [[f"{name}|box|exemplar|{seed}" for name in BENCH_IDS] for seed in SEEDS]
        expected = np.mean([[50 * _vector(key, metric)[0] for key in of_seed] for of_seed in keys], 0)
        found = measured[metric]
        assert found.per_item is not None and found.extractor == ""
        np.testing.assert_allclose(found.per_item, expected, rtol=1e-6)
        assert found.estimate.low < found.estimate.value < found.estimate.high
        assert how_to_read(metric)[0]


def test_only_the_papers_extractors_give_the_papers_names() -> None:
    scale, mixture = _scale(), Mixture(np.ones(1), np.zeros((1, WIDTH)), np.ones(1), "spherical")
    own = {"frechet_lite", "kid_lite", "cmmd_lite", "qs_rank_lite", "similarity_lite"}
    assert set(metric_names(scale).values()) == own
    clip = replace(_scale(mixture=mixture, upstream_region=True), name="clip")
    assert metric_names(clip) == {
        "frechet": "clip_fid",
        "kid": "kid_clip",
        "cmmd": "cmmd_clip",
        "quality": "qs",
        "similarity": "clip_score",
    }
    assert metric_names(replace(clip, upstream_region=False))["similarity"] == "clip_score_whole"
    assert metric_names(replace(clip, cmmds_network=True))["cmmd"] == "cmmd"
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
            photo_holes={},
            exemplars=candidates_of(["a"], np.ones((1, WIDTH))),
            mixture=None,
            upstream_region=False,
            cmmds_network=False,
            components=components,
            pca_dims=3,
            seed=0,
        )

    with pytest.raises(ValueError, match="all the same"):
        scale(np.ones((30, WIDTH)), 2)
    with pytest.raises(ValueError, match="cannot fit 40 components"):
        scale(np.random.default_rng(0).random((30, WIDTH)), 40)
