"""All numbers of one method on one bench, from features and pixel counts alone: no picture is opened here.

Holes and references are scored apart; a scope is one of each, such as (box, exemplar), which is what the paper scores.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from pbe.evaluate.bench.scopes import picture_column
from pbe.evaluate.features.tables import FeatureTable, PixelTable
from pbe.evaluate.metrics.similarity import colour_gain
from pbe.evaluate.number import Score, mean_score
from pbe.evaluate.score_features import Edited, Items, ReferenceSet, mean_gains, score_features
from pbe.evaluate.settings import StatisticsConfig

PSNR_CEILING_DB = 60.0  # equal pictures have an infinite PSNR


@dataclass(frozen=True)
class Pixels:
    """Pixel metrics of one method's edits in one scope: (S, N), colours (S, N, 3), over S seeds.

    reference_colour: (N, 3), the mean colour of the given reference. lpips: by metric; empty without its weights.
    """

    hole_psnr_db: np.ndarray
    background_psnr_db: np.ndarray
    background_max_error: np.ndarray
    background_ssim: np.ndarray
    seam: np.ndarray
    copy_paste: np.ndarray
    colour: np.ndarray
    reference_colour: np.ndarray
    lpips: Mapping[str, np.ndarray]


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
        bench, view = self.method.bench_features[extractor], f"{self.hole_kind}/{picture_column(reference_kind)}"
        found = Edited(
            edits=[],
            regions=[features.of(of_seed, "region") for of_seed in keys],
            reference=bench.of(self.bench_ids, view),
        )
        if reference_kind == "foreign":  # see features/crops.py
            return found
        found = replace(found, edits=[features.of(of_seed, "whole") for of_seed in keys])
        if self.hole_kind == "box":
            return found
        return replace(
            found,
            masked=[features.of(of_seed, "masked") for of_seed in keys],
            masked_reference=bench.of_first(self.bench_ids, [f"{view}/masked", view]),
        )

    def pixels(self, reference_kind: str) -> Pixels:
        keys = self.keys(reference_kind)

        def of(*columns: str) -> np.ndarray:
            return np.stack([self.method.counts.of(of_seed, *columns) for of_seed in keys])

        return Pixels(
            hole_psnr_db=of("hole_psnr_db"),
            background_psnr_db=of("background_psnr_db"),
            background_max_error=of("background_max_error"),
            background_ssim=of("background_ssim"),
            seam=of("seam"),
            copy_paste=of("copy_paste"),
            colour=of("colour_r", "colour_g", "colour_b"),
            reference_colour=of("reference_r", "reference_g", "reference_b")[0],
            lpips={name: of(name) for name in self.method.counts.lpips},
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
    items = Items(scope.hole_kind, picture_column(reference_kind) == "exemplar", scope.bench_ids, image_ids)
    for extractor, reference_set in reference_sets.items():
        given = scope.edited(extractor, reference_kind)
        other = scope.edited(extractor, "foreign") if has_foreign else None
        found += score_features(items, given, other, reference_set, cfg)
    return tuple(found)


def numbers_of(scope: ScopeScores) -> dict[str, dict[str, Any]]:
    """Return a scope's entries of metrics.json: by metric, the estimate's fields, the extractor and, where it is known,
    the number's chance value.
    """
    return {
        score.metric: asdict(score.estimate)
        | {"extractor": score.extractor}
        | ({} if score.chance is None else {"chance": score.chance})
        for score in scope.scores
    }


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
        "background_max_error": given.background_max_error.mean(0),
        "background_ssim": given.background_ssim.mean(0),
        "seam": given.seam.mean(0),
        "copy_paste": given.copy_paste.mean(0),
        **{name: values.mean(0) for name, values in given.lpips.items()},
    }
    if foreign is not None:
        gains = [
            colour_gain(own, other, given.reference_colour, foreign.reference_colour)
            for own, other in zip(given.colour, foreign.colour, strict=True)
        ]
        columns["colour_gain"] = mean_gains(gains).both
    return [mean_score(name, "", values, image_ids, cfg) for name, values in columns.items()]
