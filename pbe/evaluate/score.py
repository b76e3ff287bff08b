"""All metrics of one set of edits: bench rows and edited images in, named estimates out.

Names are honest: a metric that is not computed with the paper's extractor carries the extractor's name.
`own_*` and `swap_*` are two different things (they are reported apart, `exemplar_gain` is their mean):
own rises when a foreign reference makes the fill worse, swap only when the fill moves towards the foreign reference.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pbe.evaluate import similarity
from pbe.evaluate.features import extract
from pbe.evaluate.frechet import frechet_distance
from pbe.evaluate.intervals import Estimate, bootstrap_mean, jackknife
from pbe.evaluate.items import EditedItem
from pbe.evaluate.quality import quality_ranks
from pbe.model.backbone import EfficientNetLite

PSNR_CEILING_DB = 60.0  # a fill that equals the photo has no finite PSNR


@dataclass(frozen=True)
class ScoreConfig:
    quality_components: int
    quality_pca_dims: int
    resamples: int
    batch_rows: int
    seed: int


def score(
    items: Sequence[EditedItem], reals: Sequence[np.ndarray], *, judges: Sequence[EfficientNetLite], cfg: ScoreConfig
) -> tuple[dict[str, Estimate], dict[str, np.ndarray]]:
    """Estimates by metric name, and the per-item values behind those that are means. reals: untouched crops."""
    per_item: dict[str, np.ndarray] = {
        "hole_psnr_db": np.minimum(
            [similarity.hole_psnr(i.own_edit, i.source, i.hole_mask) for i in items], PSNR_CEILING_DB
        )
    }
    colours = similarity.colour_gain(*_colours(items))
    per_item |= _gain_columns("colour_gain", colours, "own_colour_gain", "swap_colour_gain")
    for judge in judges:
        per_item |= _fill_columns(items, judge, cfg)
    columns, frechet = _photo_columns(items, reals, judges[0], cfg)
    per_item |= columns
    estimates = {f"frechet_{judges[0].name}": frechet}
    groups = [item.image_id for item in items]
    for name, values in per_item.items():
        estimates[name] = bootstrap_mean(values, groups=groups, resamples=cfg.resamples, seed=cfg.seed)
    return estimates, per_item


def _fill_columns(items: Sequence[EditedItem], judge: EfficientNetLite, cfg: ScoreConfig) -> dict[str, np.ndarray]:
    """Does the fill look like the reference? Hole regions against references brought to the hole's resolution."""

    def features(pictures: Sequence[np.ndarray]) -> np.ndarray:
        return extract(judge, list(pictures), batch_rows=cfg.batch_rows)

    own_fill = features([similarity.hole_region(i.own_edit, i.hole_mask) for i in items])
    foreign_fill = features([similarity.hole_region(i.foreign_edit, i.hole_mask) for i in items])
    own_reference = features([_at_hole_resolution(i.own_reference, i.hole_mask) for i in items])
    foreign_reference = features([_at_hole_resolution(i.foreign_reference, i.hole_mask) for i in items])
    gain = similarity.exemplar_gain(own_fill, foreign_fill, own_reference, foreign_reference)
    return {
        f"similarity_{judge.name}": similarity.cosine(own_fill, own_reference),
        **_gain_columns(f"exemplar_gain_{judge.name}", gain, f"own_gain_{judge.name}", f"swap_gain_{judge.name}"),
    }


def _photo_columns(
    items: Sequence[EditedItem], reals: Sequence[np.ndarray], judge: EfficientNetLite, cfg: ScoreConfig
) -> tuple[dict[str, np.ndarray], Estimate]:
    """Do whole edits look like photos? Only by the first judge, which does not condition the model."""

    def features(pictures: Sequence[np.ndarray]) -> np.ndarray:
        return extract(judge, list(pictures), batch_rows=cfg.batch_rows)

    edit, photo, real = features([i.own_edit for i in items]), features([i.source for i in items]), features(reals)
    ranks = quality_ranks(
        edit,
        fit_features=real,
        real_features=photo,
        components=cfg.quality_components,
        pca_dims=cfg.quality_pca_dims,
        seed=cfg.seed,
    )
    frechet = jackknife(
        lambda rows: frechet_distance(edit[rows], real), len(items), resamples=min(200, cfg.resamples), seed=cfg.seed
    )
    return {f"qs_rank_{judge.name}": ranks}, frechet


def _gain_columns(both: str, gains: similarity.Gains, own: str, swap: str) -> Mapping[str, np.ndarray]:
    return {own: gains.own, swap: gains.swap, both: gains.both}


def _colours(items: Sequence[EditedItem]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    return (
        np.stack([similarity.mean_colour(i.own_edit, i.hole_mask) for i in items]),
        np.stack([similarity.mean_colour(i.foreign_edit, i.hole_mask) for i in items]),
        np.stack([similarity.mean_colour(i.own_reference, None) for i in items]),
        np.stack([similarity.mean_colour(i.foreign_reference, None) for i in items]),
    )


def _at_hole_resolution(reference: np.ndarray, hole_mask: np.ndarray) -> np.ndarray:
    height_px, width_px = similarity.hole_region(hole_mask[..., None], hole_mask).shape[:2]
    return similarity.match_resolution(reference, height_px, width_px)
