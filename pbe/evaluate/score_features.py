"""The numbers of one extractor for one scope, from features alone: the exemplar's influence, and how real edits look.

Names are honest: a metric that is not computed with the paper's extractor carries the extractor's name. Metrics that
the paper does not have carry it always: frechet_fg_clip is no published FID of foregrounds, whose photos are others.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pbe.evaluate.metrics.frechet import frechet_to_features
from pbe.evaluate.metrics.intervals import SetStatistic
from pbe.evaluate.metrics.kid import kid_to_reference
from pbe.evaluate.metrics.retrieval import Candidates, retrieval_ranks
from pbe.evaluate.metrics.similarity import Gains, cosine, exemplar_gain, wins
from pbe.evaluate.number import Score, mean_score, of_rows, set_estimate
from pbe.evaluate.settings import StatisticsConfig


@dataclass(frozen=True)
class Edited:
    """Features of one method in one scope by one extractor: one array (N, d) per seed, one row per item.

    edits: whole pictures; none of fills from foreign references. regions: the hole's box. reference: (N, d), the given
    reference. masked: what is in the hole alone, masked_reference: the reference's object alone; both None for box
    holes.
    """

    edits: Sequence[np.ndarray]
    regions: Sequence[np.ndarray]
    reference: np.ndarray
    masked: Sequence[np.ndarray] | None = None
    masked_reference: np.ndarray | None = None


@dataclass(frozen=True)
class ReferenceSet:
    """Reference statistics of one extractor, computed once from real images and used for all methods.

    frechet, kid, cmmd: (N, d) features, or some of their rows, to a number. quality: (N, d) to (N,).
    photo_holes: (M, d) features of what lies in the holes of the bench's unedited photos, by the view of it in
    features/crops.py. exemplars: those of the bench, for retrieval.
    """

    name: str
    frechet: SetStatistic
    kid: SetStatistic
    cmmd: SetStatistic
    quality: Callable[[np.ndarray], np.ndarray]
    has_mixture: bool  # quality is the paper's qs, not a rank
    upstream_region: bool  # regions lack their last row and column, as upstream's CLIP score
    cmmds_network: bool  # the network of the published CMMD
    photo_holes: Mapping[str, np.ndarray]
    exemplars: Candidates


@dataclass(frozen=True)
class Items:
    """The items of one scope. bench_ids, image_ids: of each. own_exemplar: it was filled from its bench exemplar."""

    hole_kind: str
    own_exemplar: bool
    bench_ids: Sequence[str]
    image_ids: Sequence[str]


def score_features(
    items: Items, given: Edited, foreign: Edited | None, reference_set: ReferenceSet, cfg: StatisticsConfig
) -> list[Score]:
    """Score the metrics of one extractor for one scope.

    foreign: fills of the same holes from foreign references, for the gains; None leaves them out. Raises ValueError for
    too few items.
    """
    out = _realism(items, given, reference_set, cfg) + _similarity(items, given, reference_set, cfg)
    if foreign is not None:
        out += _gains(items, given, foreign, reference_set.name, cfg)
    return out + (_retrieval(items, given, reference_set, cfg) if items.own_exemplar else [])


def metric_names(reference_set: ReferenceSet) -> dict[str, str]:
    """Return the names of an extractor's metrics. Only the paper's extractors use the paper's names."""
    name = reference_set.name
    return {
        "frechet": {"inception": "fid", "clip": "clip_fid"}.get(name, f"frechet_{name}"),
        "kid": "kid" if name == "inception" else f"kid_{name}",
        "cmmd": "cmmd" if reference_set.cmmds_network else f"cmmd_{name}",
        "quality": "qs" if reference_set.has_mixture else f"qs_rank_{name}",
        "similarity": f"similarity_{name}"
        if name != "clip"
        else f"clip_score{'' if reference_set.upstream_region else '_whole'}",
    }


def _realism(items: Items, given: Edited, reference_set: ReferenceSet, cfg: StatisticsConfig) -> list[Score]:
    """Whole edits against the real images; hole crops, and what is in the hole alone, against those of the photos."""
    names, name = metric_names(reference_set), reference_set.name
    measured = [
        (names["frechet"], reference_set.frechet.of_rows, given.edits),
        (names["kid"], reference_set.kid.of_rows, given.edits),
        (names["cmmd"], reference_set.cmmd.of_rows, given.edits),
    ]
    for word, view, pictures in (("fg", "region", given.regions), ("masked", "masked", given.masked)):
        if pictures is not None:
            photos = reference_set.photo_holes[f"{items.hole_kind}/{view}"]
            measured.append((f"frechet_{word}_{name}", frechet_to_features(photos).of_rows, pictures))
            measured.append((f"kid_{word}_{name}", kid_to_reference(photos).of_rows, pictures))
    out = [
        Score(metric, name, set_estimate(statistic, sets, items.image_ids, cfg), None)
        for metric, statistic, sets in measured
    ]
    qualities = [reference_set.quality(edits) for edits in given.edits]
    quality = set_estimate(of_rows(lambda values: float(values.mean())), qualities, items.image_ids, cfg)
    return [*out, Score(names["quality"], name, quality, np.mean(qualities, 0))]


def _similarity(items: Items, given: Edited, reference_set: ReferenceSet, cfg: StatisticsConfig) -> list[Score]:
    names, name = metric_names(reference_set), reference_set.name
    percent = 100.0 if name == "clip" else 1.0
    similarity = np.mean([cosine(regions, given.reference) for regions in given.regions], 0)
    out = [mean_score(names["similarity"], name, percent * similarity, items.image_ids, cfg)]
    if given.masked is not None and given.masked_reference is not None:
        masked = np.mean([cosine(holes, given.masked_reference) for holes in given.masked], 0)
        out.append(mean_score(f"similarity_masked_{name}", name, masked, items.image_ids, cfg))
    return out


def _gains(items: Items, given: Edited, foreign: Edited, extractor: str, cfg: StatisticsConfig) -> list[Score]:
    """The gains over foreign references, and the share of items that win: whose gain of both halves is above 0.

    Of both: a foreign reference that merely damages its fill would win by the given half alone, and chance, of fills
    that do not depend on what a reference shows, would not be 0.5.
    """
    by_seed = [
        exemplar_gain(own, other, given.reference, foreign.reference)
        for own, other in zip(given.regions, foreign.regions, strict=True)
    ]
    gains = mean_gains(by_seed)
    out = [
        mean_score(f"exemplar_gain{half}_{extractor}", extractor, values, items.image_ids, cfg)
        for half, values in (("", gains.both), ("_given", gains.own), ("_swap", gains.swap))
    ]
    won = np.mean([wins(gain.both) for gain in by_seed], 0)
    return [*out, mean_score(f"exemplar_win_rate_{extractor}", extractor, won, items.image_ids, cfg, chance=0.5)]


def _retrieval(items: Items, given: Edited, reference_set: ReferenceSet, cfg: StatisticsConfig) -> list[Score]:
    name, exemplars = reference_set.name, reference_set.exemplars
    found = [retrieval_ranks(regions, items.bench_ids, exemplars) for regions in given.regions]
    ranks, first = np.mean(found, 0)
    return [
        mean_score(f"retrieval_rank_{name}", name, ranks, items.image_ids, cfg, chance=exemplars.chance_rank),
        mean_score(f"retrieval_r1_{name}", name, first, items.image_ids, cfg, chance=exemplars.chance_first),
    ]


def mean_gains(gains: Sequence[Gains]) -> Gains:
    """The mean over noise seeds."""
    return Gains(*(np.mean([getattr(gain, part) for gain in gains], 0) for part in ("own", "swap", "both")))
