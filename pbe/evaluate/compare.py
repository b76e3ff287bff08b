"""One scope of two methods, item by item: what of the difference is more than the choice of items."""

from collections.abc import Mapping

from pbe.evaluate.features.tables import Looks
from pbe.evaluate.metrics.paired import Paired, common_items, paired_means, paired_sets
from pbe.evaluate.score import JudgeScale, ScopeScores, metric_names
from pbe.evaluate.settings import StatisticsConfig


def compare(
    ours: ScopeScores,
    our_looks: Looks,
    theirs: ScopeScores,
    their_looks: Looks,
    *,
    scale: JudgeScale,
    photos: Mapping[str, str],
    cfg: StatisticsConfig,
) -> dict[str, Paired]:
    """Differences ours minus theirs on the items that both have, by metric: pixels, what the scale's judge says per
    item, and its Frechet distance; of several noise seeds the mean.

    looks: the scale's judge's, of each method's edits. photos: image id of each bench id. Raises ValueError where too
    few items are common.
    """
    common = common_items(ours.bench_ids, theirs.bench_ids)
    of_items = [photos[bench_id] for bench_id in common]
    our_rows, their_rows = ([scope.bench_ids.index(bench_id) for bench_id in common] for scope in (ours, theirs))
    known = {score.metric: score.per_item for score in theirs.scores}
    found = {
        score.metric: paired_means(
            score.per_item[our_rows], value[their_rows], photos=of_items, resamples=cfg.resamples, seed=cfg.seed
        )
        for score in ours.scores
        if score.judge in ("", scale.name)
        and score.per_item is not None
        and (value := known.get(score.metric)) is not None
    }
    found[metric_names(scale)["frechet"]] = paired_sets(
        scale.frechet,
        [our_looks.of([keys[row] for row in our_rows], "whole") for keys in ours.keys_by_seed],
        [their_looks.of([keys[row] for row in their_rows], "whole") for keys in theirs.keys_by_seed],
        photos=of_items,
        resamples=cfg.subsets,
        seed=cfg.seed,
    )
    return found
