"""One scope of two methods, item by item: what of the difference is more than the choice of items."""

from collections.abc import Mapping

from pbe.evaluate.look import Looks
from pbe.evaluate.paired import Paired, paired_means, paired_sets, refuse_other_items
from pbe.evaluate.score import JudgeScale, ScopeScores, ScoreConfig, metric_names


def compare(
    ours: ScopeScores,
    our_looks: Looks,
    theirs: ScopeScores,
    their_looks: Looks,
    *,
    scale: JudgeScale,
    photos: Mapping[str, str],
    cfg: ScoreConfig,
) -> dict[str, Paired]:
    """Differences ours minus theirs, by metric: pixels, what the scale's judge says per item (means over seeds), and
    its Frechet distance (of the first seed).

    looks: the scale's judge's, of each method's edits. photos: image id of each bench id. Raises ValueError for scopes
    of other items.
    """
    refuse_other_items(theirs.bench_ids, ours.bench_ids)
    of_items = [photos[bench_id] for bench_id in ours.bench_ids]
    known = {score.metric: score.per_item for score in theirs.scores}
    found = {
        score.metric: paired_means(score.per_item, value, photos=of_items, resamples=cfg.resamples, seed=cfg.seed)
        for score in ours.scores
        if score.judge in ("", scale.name)
        and score.per_item is not None
        and (value := known.get(score.metric)) is not None
    }
    found[metric_names(scale)["frechet"]] = paired_sets(
        scale.frechet,
        our_looks.of(ours.first_seed_keys, "whole"),
        their_looks.of(theirs.first_seed_keys, "whole"),
        photos=of_items,
        resamples=cfg.subsets,
        seed=cfg.seed,
    )
    return found
