"""All numbers of one method on one bench, from features and pixel counts alone: no picture is opened here.

Holes and references are scored apart; a scope is one of each, such as (box, exemplar), which is what the paper scores.
Names are honest: a metric that is not computed with the paper's extractor carries the extractor's name.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from pbe.evaluate.features.tables import FeatureTable, PixelTable
from pbe.evaluate.metrics.intervals import Estimate, bootstrap_mean, jackknife, over_seeds
from pbe.evaluate.metrics.similarity import Gains, colour_gain, cosine, exemplar_gain
from pbe.evaluate.settings import StatisticsConfig

PSNR_CEILING_DB = 60.0  # equal pictures have an infinite PSNR


@dataclass(frozen=True)
class Edited:
    """Features of one method in one scope by one extractor: one array (N, d) per seed, one row per item.

    edits: whole pictures. regions: the hole's box. reference: (N, d), the given reference.
    """

    edits: Sequence[np.ndarray]
    regions: Sequence[np.ndarray]
    reference: np.ndarray


@dataclass(frozen=True)
class ReferenceSet:
    """Reference statistics of one extractor, computed once from real images and used for all methods.

    frechet, kid: (N, d) features to a number. quality: (N, d) to (N,).
    """

    name: str
    frechet: Callable[[np.ndarray], float]
    kid: Callable[[np.ndarray], float]
    quality: Callable[[np.ndarray], np.ndarray]
    has_mixture: bool  # quality is the paper's qs, not a rank
    upstream_region: bool  # regions lack their last row and column, as upstream's CLIP score


@dataclass(frozen=True)
class Pixels:
    """Pixel metrics of one method's edits in one scope: (S, N), colours (S, N, 3), over S seeds.

    reference_colour: (N, 3), the mean colour of the given reference.
    """

    hole_psnr_db: np.ndarray
    background_psnr_db: np.ndarray
    copy_paste: np.ndarray
    colour: np.ndarray
    reference_colour: np.ndarray


@dataclass(frozen=True)
class Score:
    """One number. per_item: (N,), mean over seeds, where the number is a mean: for paired tests. extractor: "" for
    pixels.
    """

    metric: str
    extractor: str
    estimate: Estimate
    per_item: np.ndarray | None


@dataclass(frozen=True)
class Method:
    """One method's edits with their features and pixel counts.

    edits: keys of EDITS. features, bench_features: tables by extractor name. image_ids: image id by bench id.
    """

    edits: Sequence[Mapping[str, Any]]
    features: Mapping[str, FeatureTable]
    bench_features: Mapping[str, FeatureTable]
    counts: PixelTable
    image_ids: Mapping[str, str]


@dataclass(frozen=True)
class ScopeScores:
    """The scores of one scope and its items, in the bench's order."""

    hole_kind: str
    reference_kind: str
    bench_ids: tuple[str, ...]
    keys_by_seed: tuple[tuple[str, ...], ...]  # keys of EDITS, by noise seed
    scores: tuple[Score, ...]


def score_method(
    method: Method, reference_sets: Mapping[str, ReferenceSet], cfg: StatisticsConfig
) -> list[ScopeScores]:
    """Score every scope of a method; foreign references are not scored themselves, they only serve the gains.

    Raises ValueError naming the scope for too few items or features that cannot be compared.
    """
    by_scope: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in method.edits:
        by_scope.setdefault((row["hole_kind"], row["reference_kind"]), []).append(row)
    out = []
    for (hole_kind, reference_kind), rows in by_scope.items():
        if reference_kind == "foreign":
            continue
        bench_ids = tuple(dict.fromkeys(row["bench_id"] for row in rows))
        try:
            scope = _Scope(method, hole_kind, bench_ids, tuple(sorted({row["seed"] for row in rows})))
            scores = _score_scope(scope, reference_kind, (hole_kind, "foreign") in by_scope, reference_sets, cfg)
        except ValueError as error:
            where = f"{hole_kind} holes, {reference_kind} references, {len(bench_ids)} items"
            raise ValueError(f"{where}: {error}") from None
        out.append(
            ScopeScores(hole_kind, reference_kind, bench_ids, tuple(map(tuple, scope.keys(reference_kind))), scores)
        )
    return out


@dataclass(frozen=True)
class _Scope:
    """The items of one hole kind, with access to their features and pixel counts."""

    method: Method
    hole_kind: str
    bench_ids: tuple[str, ...]
    seeds: tuple[int, ...]

    def keys(self, reference_kind: str) -> list[list[str]]:
        """Return the keys of EDITS, by seed."""
        return [[f"{name}|{self.hole_kind}|{reference_kind}|{seed}" for name in self.bench_ids] for seed in self.seeds]

    def edited(self, extractor: str, reference_kind: str) -> Edited:
        features, keys = self.method.features[extractor], self.keys(reference_kind)
        reference = self.method.bench_features[extractor].of(self.bench_ids, f"{self.hole_kind}/{reference_kind}")
        return Edited([features.of(of, "whole") for of in keys], [features.of(of, "region") for of in keys], reference)

    def pixels(self, reference_kind: str) -> Pixels:
        keys = self.keys(reference_kind)

        def of(*columns: str) -> np.ndarray:
            return np.stack([self.method.counts.of(of_seed, *columns) for of_seed in keys])

        return Pixels(
            hole_psnr_db=of("hole_psnr_db"),
            background_psnr_db=of("background_psnr_db"),
            copy_paste=of("copy_paste"),
            colour=of("colour_r", "colour_g", "colour_b"),
            reference_colour=of("reference_r", "reference_g", "reference_b")[0],
        )


def _score_scope(
    scope: _Scope,
    reference_kind: str,
    has_foreign: bool,
    reference_sets: Mapping[str, ReferenceSet],
    cfg: StatisticsConfig,
) -> tuple[Score, ...]:
    image_ids = [scope.method.image_ids[name] for name in scope.bench_ids]
    foreign = scope.pixels("foreign") if has_foreign else None
    found = score_pixels(scope.pixels(reference_kind), foreign, image_ids=image_ids, cfg=cfg)
    for extractor, reference_set in reference_sets.items():
        other = scope.edited(extractor, "foreign") if has_foreign else None
        found += score_features(
            scope.edited(extractor, reference_kind), other, reference_set, image_ids=image_ids, cfg=cfg
        )
    return tuple(found)


def numbers_of(scope: ScopeScores) -> dict[str, dict[str, Any]]:
    """Return a scope's entries of metrics.json: by metric, the estimate's fields and the extractor."""
    return {score.metric: asdict(score.estimate) | {"extractor": score.extractor} for score in scope.scores}


def score_pixels(
    given: Pixels, foreign: Pixels | None, *, image_ids: Sequence[str], cfg: StatisticsConfig
) -> list[Score]:
    """Score the pixel metrics of one scope.

    image_ids: image id of each item, because items of one photo are correlated. foreign: fills of the same holes from
    foreign references, for the colour gain; None leaves it out.
    """
    columns = {
        "hole_psnr_db": np.minimum(given.hole_psnr_db, PSNR_CEILING_DB).mean(0),
        "background_psnr_db": np.minimum(given.background_psnr_db, PSNR_CEILING_DB).mean(0),
        "copy_paste": given.copy_paste.mean(0),
    }
    if foreign is not None:
        gains = [
            colour_gain(own, other, given.reference_colour, foreign.reference_colour)
            for own, other in zip(given.colour, foreign.colour, strict=True)
        ]
        columns["colour_gain"] = _over_seeds(gains).both
    return [_mean(name, "", values, image_ids, cfg) for name, values in columns.items()]


def score_features(
    given: Edited,
    foreign: Edited | None,
    reference_set: ReferenceSet,
    *,
    image_ids: Sequence[str],
    cfg: StatisticsConfig,
) -> list[Score]:
    """Score the metrics of one extractor for one scope.

    foreign: fills of the same holes from foreign references, for the exemplar gains; None leaves them out.
    """
    names, extractor = metric_names(reference_set), reference_set.name
    out = [
        Score(names["frechet"], extractor, _of_sets(reference_set.frechet, given.edits, image_ids, cfg), None),
        Score(names["kid"], extractor, _of_sets(reference_set.kid, given.edits, image_ids, cfg), None),
    ]
    qualities = [reference_set.quality(edits) for edits in given.edits]
    quality = _of_sets(lambda values: float(values.mean()), qualities, image_ids, cfg)
    out.append(Score(names["quality"], extractor, quality, np.mean(qualities, 0)))
    percent = 100.0 if extractor == "clip" else 1.0
    similarity = np.mean([cosine(regions, given.reference) for regions in given.regions], 0)
    out.append(_mean(names["similarity"], extractor, percent * similarity, image_ids, cfg))
    if foreign is not None:
        gains = _over_seeds(
            [
                exemplar_gain(own, other, given.reference, foreign.reference)
                for own, other in zip(given.regions, foreign.regions, strict=True)
            ]
        )
        for name, values in (("", gains.both), ("_given", gains.own), ("_swap", gains.swap)):
            out.append(_mean(f"exemplar_gain{name}_{extractor}", extractor, values, image_ids, cfg))
    return out


def metric_names(reference_set: ReferenceSet) -> dict[str, str]:
    """Return the names of an extractor's metrics. Only the paper's extractors use the paper's names."""
    name = reference_set.name
    return {
        "frechet": {"inception": "fid", "clip": "clip_fid"}.get(name, f"frechet_{name}"),
        "kid": "kid" if name == "inception" else f"kid_{name}",
        "quality": "qs" if reference_set.has_mixture else f"qs_rank_{name}",
        "similarity": f"similarity_{name}"
        if name != "clip"
        else f"clip_score{'' if reference_set.upstream_region else '_whole'}",
    }


def _mean(metric: str, extractor: str, values: np.ndarray, image_ids: Sequence[str], cfg: StatisticsConfig) -> Score:
    estimate = bootstrap_mean(values, groups=image_ids, resamples=cfg.resamples, seed=cfg.seed)
    return Score(metric, extractor, estimate, values)


def _of_sets(
    statistic: Callable[[np.ndarray], float],
    sets: Sequence[np.ndarray],
    image_ids: Sequence[str],
    cfg: StatisticsConfig,
) -> Estimate:
    """Estimate a statistic of a whole set of features, such as a Frechet distance: per seed, then over seeds."""

    def of_one(features: np.ndarray) -> Estimate:
        return jackknife(
            lambda rows: statistic(features[rows]),
            len(features),
            groups=image_ids,
            resamples=cfg.subsets,
            seed=cfg.seed,
        )

    return over_seeds([of_one(features) for features in sets])


def _over_seeds(gains: Sequence[Gains]) -> Gains:
    return Gains(*(np.mean([getattr(gain, part) for gain in gains], 0) for part in ("own", "swap", "both")))
