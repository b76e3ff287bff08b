"""Paired comparison of two methods on their common items, with intervals and p-values."""

from collections.abc import Mapping

from pbe.evaluate.features.tables import FeatureTable
from pbe.evaluate.metrics.paired import Paired, common_items, paired_means, paired_sets
from pbe.evaluate.score import ScopeScores
from pbe.evaluate.score_features import ReferenceSet, metric_names
from pbe.evaluate.settings import StatisticsConfig


def compare(
    ours: ScopeScores,
    our_features: FeatureTable,
    theirs: ScopeScores,
    their_features: FeatureTable,
    *,
    reference_set: ReferenceSet,
    image_ids: Mapping[str, str],
    cfg: StatisticsConfig,
) -> dict[str, Paired]:
    """Return, per metric, the difference ours minus theirs on the common items; noise seeds are averaged.

    Compares the pixel metrics, the per-item metrics of the reference set's extractor, and its Frechet distance.
    our_features, their_features: features of each method's edits, by that extractor. image_ids: image id by bench id.
    Raises ValueError if too few items are common.
    """
    common = common_items(ours.bench_ids, theirs.bench_ids)
    of_items = [image_ids[bench_id] for bench_id in common]
    our_rows, their_rows = ([scope.bench_ids.index(bench_id) for bench_id in common] for scope in (ours, theirs))
    known = {score.metric: score.per_item for score in theirs.scores}
    found = {
        score.metric: paired_means(
            score.per_item[our_rows], value[their_rows], image_ids=of_items, resamples=cfg.resamples, seed=cfg.seed
        )
        for score in ours.scores
        if score.extractor in ("", reference_set.name)
        and score.per_item is not None
        and (value := known.get(score.metric)) is not None
    }
    found[metric_names(reference_set)["frechet"]] = paired_sets(
        reference_set.frechet,
        [our_features.of([keys[row] for row in our_rows], "whole") for keys in ours.keys_by_seed],
        [their_features.of([keys[row] for row in their_rows], "whole") for keys in theirs.keys_by_seed],
        image_ids=of_items,
        resamples=cfg.subsets,
        seed=cfg.seed,
    )
    return found
