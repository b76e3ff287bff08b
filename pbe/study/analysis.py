"""What the answers of a study say: ranks, wins and strengths of the methods, agreement, and who was left out.

Per question and judge; people, models and scripts are never pooled. Rank 1 is best, as in the paper's Table 2. All
intervals are of one bootstrap over raters and items (two_way.py); strengths are Plackett-Luce's (plackett_luce.py).

A rater who ranks the absurd picture of an attention screen other than last is left out; for nothing else is anybody.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np
from scipy.stats import friedmanchisquare, kendalltau

from pbe.evaluate.metrics.intervals import Estimate
from pbe.study.answers import HUMAN, Answer, Sheet
from pbe.study.plackett_luce import strengths
from pbe.study.plan import ABSURD
from pbe.study.plan_file import Plan
from pbe.study.two_way import TooFewError, resampled_weights

LEVEL = 0.95


@dataclass(frozen=True)
class SelfAgreement:
    """How rankings of repeated screens agree with the first ones, over `pairs` of both.

    tau: Kendall's tau, from -1 to 1; 0 is chance. same_first: share with the same first method; chance is 1 / methods.
    Both None for one pair. below_chance: raters whose mean tau is below 0; they stay in.
    """

    pairs: int
    raters: int
    tau: Estimate | None
    same_first: Estimate | None
    below_chance: tuple[int, ...]


@dataclass(frozen=True)
class QuestionResult:
    """Numbers of one question, by method.

    mean_rank: from 1, best. wins: share of answers that rank the first method above the second. strength: chance to be
    ranked first, by Plackett-Luce. friedman_p: of no difference, each item being a block with the means of its ranks
    over raters (Friedman 1937; ties by scipy); it does not know that raters are a sample; None for two methods or one
    item. kendall_w: agreement of the raters of one item, mean over items, from 0 to 1 (Kendall and Smith 1939); m
    raters without any reach 1 / m; None if no item has two.
    """

    answers: int
    raters: int
    items: int
    mean_rank: dict[str, Estimate]
    wins: dict[str, dict[str, Estimate]]
    strength: dict[str, Estimate]
    friedman_p: float | None
    kendall_w: float | None
    self_agreement: SelfAgreement | None


@dataclass(frozen=True)
class JudgeResult:
    """Results of people, or of one model or script.

    raters: all who answered. left_out: why, by rater. incomplete: screens answered and planned, by rater.
    unchecked: raters without an answer to an attention screen. median_seconds: of one answer, of those who stay; None
    without any. too_few: questions without two answers that differ in rater or item.
    """

    judge: str
    human: bool
    raters: int
    left_out: dict[int, str]
    incomplete: dict[int, tuple[int, int]]
    unchecked: tuple[int, ...]
    median_seconds: float | None
    questions: dict[str, QuestionResult]
    too_few: tuple[str, ...]


def analyse(plan: Plan, sheets: Sequence[Sheet], *, resamples: int, seed: int) -> list[JudgeResult]:
    """One result per judge, people first. sheets: as read_answers returns them."""
    judges = sorted({sheet.judge for sheet in sheets}, key=lambda judge: (judge != HUMAN, judge))
    return [
        _of_judge(plan, judge, [sheet for sheet in sheets if sheet.judge == judge], resamples=resamples, seed=seed)
        for judge in judges
    ]


def _of_judge(plan: Plan, judge: str, sheets: Sequence[Sheet], *, resamples: int, seed: int) -> JudgeResult:
    left_out = {sheet.rater: reason for sheet in sheets if (reason := _why_left_out(sheet))}
    stay = [sheet for sheet in sheets if sheet.rater not in left_out]
    asked = {sheet.rater: _screens_asked(plan, sheet.rater) for sheet in sheets}
    seconds = [answer.seconds for sheet in stay for answer in sheet.answers]
    questions, too_few = {}, []
    for question in plan.questions:
        answers = [(s.rater, answer) for s in stay for answer in s.answers if answer.question == question]
        try:
            questions[question] = _of_question(plan, answers, resamples=resamples, seed=seed)
        except TooFewError:
            too_few.append(question)
    return JudgeResult(
        judge=judge,
        human=judge == HUMAN,
        raters=len(sheets),
        left_out=left_out,
        incomplete={
            sheet.rater: (len(sheet.answers), asked[sheet.rater])
            for sheet in sheets
            if len(sheet.answers) < asked[sheet.rater]
        },
        unchecked=tuple(s.rater for s in stay if not any(answer.role == "attention" for answer in s.answers)),
        median_seconds=median(seconds) if seconds else None,
        questions=questions,
        too_few=tuple(too_few),
    )


def _why_left_out(sheet: Sheet) -> str:
    """Empty for a rater who stays."""
    checks = [answer for answer in sheet.answers if answer.role == "attention"]
    failed = sum(answer.ranking[-1] != ABSURD for answer in checks)
    return f"ranked the absurd picture above another, {failed} of {len(checks)} times" if failed else ""


def _screens_asked(plan: Plan, rater: int) -> int:
    return sum(screen.role != "practice" for screen in (plan.screens_of(rater) or {}).values())


def _of_question(plan: Plan, answers: Sequence[tuple[int, Answer]], *, resamples: int, seed: int) -> QuestionResult:
    """answers: of one question, each with its rater. Raises TooFewError."""
    names = list(plan.methods.values())
    items = {item: index for index, item in enumerate(plan.item_ids)}
    ranked = [(rater, answer) for rater, answer in answers if answer.role == "item"]
    if not ranked:
        raise TooFewError("no answers")
    raters = np.array([rater for rater, _ in ranked])
    item = np.array([items[answer.item] for _, answer in ranked])
    ranks = np.array([_ranks(plan, answer) for _, answer in ranked])  # (N, K)
    mean_ranks, wins, chances = rank_estimates(ranks, raters, item, resamples=resamples, seed=seed)
    return QuestionResult(
        answers=len(ranked),
        raters=len(np.unique(raters)),
        items=len(np.unique(item)),
        mean_rank=dict(zip(names, mean_ranks, strict=True)),
        wins={
            name: {other: row[column] for column, other in enumerate(names) if other != name}
            for name, row in zip(names, wins, strict=True)
        },
        strength=dict(zip(names, chances, strict=True)),
        friedman_p=friedman_p(ranks, item),
        kendall_w=kendall_w(ranks, item),
        self_agreement=_self_agreement(plan, answers, resamples=resamples, seed=seed),
    )


def _ranks(plan: Plan, answer: Answer) -> list[int]:
    """Rank of each method, in the plan's order of ids."""
    return [answer.ranking.index(method) + 1 for method in plan.methods]


def rank_estimates(
    ranks: np.ndarray, raters: np.ndarray, items: np.ndarray, *, resamples: int, seed: int
) -> tuple[list[Estimate], list[list[Estimate]], list[Estimate]]:
    """Mean ranks (K), shares of wins (K by K; a method against itself has 0) and strengths (K), with intervals.

    ranks: (N, K) int, from 1; raters, items: (N,) int. Raises TooFewError.
    """
    count = ranks.shape[1]
    above = (ranks[:, :, None] < ranks[:, None, :]).reshape(len(ranks), -1)
    values = np.concatenate([ranks, above], axis=1).astype(np.float64)
    drawn = []
    for weights in resampled_weights(raters, items, resamples=resamples, seed=seed):
        drawn.append(np.concatenate([_means(values, weights), strengths(ranks, weights)], axis=1))
    once = np.ones((1, len(ranks)))
    points = np.concatenate([_means(values, once), strengths(ranks, once)], axis=1)[0]
    found = _estimates(points, np.concatenate(drawn), raters, items)
    pairs = found[count:-count]
    return found[:count], [pairs[row * count : (row + 1) * count] for row in range(count)], found[-count:]


def _means(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Means of the columns of values (N, C) under weights (b, N): (b, C)."""
    return weights @ values / weights.sum(axis=1, keepdims=True)


def _estimates(points: np.ndarray, drawn: np.ndarray, raters: np.ndarray, items: np.ndarray) -> list[Estimate]:
    """points: (C,); drawn: (B, C). Percentile intervals."""
    lows, highs = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    people, things = len(np.unique(raters)), len(np.unique(items))
    method = f"{LEVEL:.0%} two-way percentile bootstrap of {people} raters and {things} items, {len(drawn)} resamples"
    return [
        Estimate(float(point), float(low), float(high), n=len(raters), clusters=min(people, things), method=method)
        for point, low, high in zip(points, lows, highs, strict=True)
    ]


def friedman_p(ranks: np.ndarray, items: np.ndarray) -> float | None:
    """Friedman's test with items as blocks, by scipy. ranks: (N, K); items: (N,). None as QuestionResult says."""
    blocks = np.stack([ranks[items == item].mean(axis=0) for item in np.unique(items)])
    if blocks.shape[1] < 3 or len(blocks) < 2 or (blocks == blocks[:, :1]).all():
        return None
    return float(friedmanchisquare(*blocks.T).pvalue)


def kendall_w(ranks: np.ndarray, items: np.ndarray) -> float | None:
    """Kendall's W among the raters of an item, mean over items that have two or more: 12 S / (m^2 (K^3 - K)).

    S: squared deviations of the K rank sums from their mean; m: raters. Rankings have no ties.
    """
    count = ranks.shape[1]
    found = []
    for item in np.unique(items):
        own = ranks[items == item]
        if len(own) > 1:
            sums = own.sum(axis=0)
            found.append(12 * ((sums - sums.mean()) ** 2).sum() / (len(own) ** 2 * (count**3 - count)))
    return float(np.mean(found)) if found else None


def _self_agreement(
    plan: Plan, answers: Sequence[tuple[int, Answer]], *, resamples: int, seed: int
) -> SelfAgreement | None:
    """Compare repeated screens with the first ones of the same rater and item; None if there are none."""
    first = {(rater, answer.item): _ranks(plan, answer) for rater, answer in answers if answer.role == "item"}
    pairs = [
        (rater, plan.item_ids.index(answer.item), first[rater, answer.item], _ranks(plan, answer))
        for rater, answer in answers
        if answer.role == "repeat" and (rater, answer.item) in first
    ]
    if not pairs:
        return None
    raters, items = (np.array([pair[column] for pair in pairs]) for column in (0, 1))
    values = np.array([(kendalltau(one, two).statistic, one.index(1) == two.index(1)) for *_, one, two in pairs])
    tau = same_first = None
    try:
        drawn = [_means(values, w) for w in resampled_weights(raters, items, resamples=resamples, seed=seed)]
        tau, same_first = _estimates(values.mean(axis=0), np.concatenate(drawn), raters, items)
    except TooFewError:  # a single pair
        pass
    below = tuple(int(rater) for rater in np.unique(raters) if values[raters == rater, 0].mean() < 0)
    return SelfAgreement(len(pairs), len(np.unique(raters)), tau, same_first, below)
