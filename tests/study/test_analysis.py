"""Ranks, wins, strengths and agreement: by hand, by scipy and choix, and of simulated raters whose taste is known."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import choix
import numpy as np
import pytest
from scipy.stats import friedmanchisquare, kendalltau

from pbe.study.analysis import JudgeResult, analyse, friedman_p, kendall_w, rank_estimates
from pbe.study.answers import read_answers
from pbe.study.plackett_luce import strengths
from pbe.study.plan_file import load_plan
from pbe.study.two_way import TooFewError, resampled_weights
from tests.study.plans import Ranks, answers, small_plan, write_json
from tests.study.simulation import STRENGTHS, Design, covers, draw_study, true_mean_ranks

FULL_WINS = ("full", "copy_paste", "poisson")
FULL_LAST = ("poisson", "copy_paste", "full")
RAW = small_plan()


def _analyse(
    tmp_path: Path,
    ranks: Ranks,
    *,
    raw: dict[str, Any] = RAW,
    change: Callable[[dict[str, Any]], None] = lambda sheet: None,
    raters: int = 3,
    judge: str = "human",
) -> JudgeResult:
    """Of raters who answer every screen as `ranks` says, after `change` of each one's file."""
    folder = tmp_path / "answers"
    for rater in range(1, raters + 1):
        sheet = answers(raw, rater, ranks, judge=judge)
        change(sheet)
        write_json(folder / f"{rater}.json", sheet)
    plan = load_plan(write_json(tmp_path / "plan.json", raw))
    sheets, _ = read_answers([folder], plan)
    (found,) = analyse(plan, sheets, resamples=200, seed=0)
    return found


# -- by hand ---------------------------------------------------------------------------------------------------------


def test_ranks_and_wins_of_three_raters_by_hand(tmp_path: Path) -> None:
    """Rater 3 disagrees about quality; all agree about consistency."""
    found = _analyse(
        tmp_path, lambda item, question, rater: FULL_LAST if (question, rater) == ("quality", 3) else FULL_WINS
    )
    quality, consistency = found.questions["quality"], found.questions["consistency"]
    assert (quality.answers, quality.raters, quality.items) == (9, 3, 3)  # repeats do not count
    assert {name: e.value for name, e in quality.mean_rank.items()} == pytest.approx(
        {"full": 5 / 3, "copy_paste": 2, "poisson": 7 / 3}
    )
    assert quality.wins["full"]["poisson"].value == pytest.approx(2 / 3)
    assert quality.wins["poisson"]["full"].value == pytest.approx(1 / 3) and "full" not in quality.wins["full"]
    assert 1 <= quality.mean_rank["full"].low < 5 / 3 < quality.mean_rank["full"].high <= 3
    assert quality.mean_rank["copy_paste"].low == quality.mean_rank["copy_paste"].high == 2
    # sums 5, 6, 7 of 3 raters: S = 2, W = 12 * 2 / (9 * 24)
    assert quality.kendall_w == pytest.approx(1 / 9) and consistency.kendall_w == pytest.approx(1)
    assert {name: e.value for name, e in consistency.mean_rank.items()} == {"full": 1, "copy_paste": 2, "poisson": 3}
    # three blocks, all alike: chi2 = 6 of two degrees of freedom
    assert consistency.friedman_p == pytest.approx(np.exp(-3))
    strength = [consistency.strength[name].value for name in FULL_WINS]
    assert sum(strength) == pytest.approx(1) and 1 > strength[0] > strength[1] > strength[2] > 0
    assert "two-way percentile bootstrap of 3 raters and 3 items, 200 resamples" in quality.mean_rank["full"].method


def test_agreement_with_oneself_by_hand_keeps_everybody(tmp_path: Path) -> None:
    """Rater 2 turns the repeated ranking around, rater 3 swaps its end."""
    again = {1: ("full", "copy_paste", "poisson"), 2: FULL_LAST, 3: ("full", "poisson", "copy_paste")}

    def change(sheet: dict[str, Any]) -> None:
        ids = {name: method for method, name in RAW["methods"].items()}
        for answer in sheet["answers"]:
            if answer["role"] == "repeat":
                answer["ranking"] = [ids[name] for name in again[sheet["rater"]]]

    found = _analyse(tmp_path, lambda item, question, rater: FULL_WINS, change=change)
    own = found.questions["quality"].self_agreement
    assert own is not None and own.tau is not None and own.same_first is not None
    assert own.pairs == own.raters == 3
    assert own.tau.value == pytest.approx((1 - 1 + 1 / 3) / 3) and own.same_first.value == pytest.approx(2 / 3)
    assert own.below_chance == (2,) and found.left_out == {} and found.questions["quality"].raters == 3


def test_who_fails_an_attention_screen_is_left_out_of_everything(tmp_path: Path) -> None:
    def change(sheet: dict[str, Any]) -> None:
        if sheet["rater"] == 2:
            first = next(answer for answer in sheet["answers"] if answer["role"] == "attention")
            first["ranking"].reverse()
            for answer in sheet["answers"]:
                answer["seconds"] = 0.1

    found = _analyse(tmp_path, lambda item, question, rater: FULL_LAST if rater == 2 else FULL_WINS, change=change)
    assert found.left_out == {2: "ranked the absurd picture above another, 1 of 1 times"}
    assert found.raters == 3 and found.questions["quality"].raters == 2 and found.median_seconds == 2.5
    assert found.questions["consistency"].mean_rank["full"].value == 1


def test_who_stopped_counts_with_what_is_there(tmp_path: Path) -> None:
    def change(sheet: dict[str, Any]) -> None:
        if sheet["rater"] == 3:
            del sheet["answers"][2:]

    found = _analyse(tmp_path, lambda item, question, rater: FULL_WINS, change=change)
    assert found.incomplete == {3: (2, 9)} and found.unchecked == (3,)
    assert found.questions["quality"].answers == 7 and found.questions["quality"].raters == 3


def test_judges_are_never_pooled_and_people_come_first(tmp_path: Path) -> None:
    plan = load_plan(write_json(tmp_path / "plan.json", RAW))
    for rater in (1, 2):
        write_json(tmp_path / "in" / f"model-{rater}.json", answers(RAW, rater, lambda *_: FULL_LAST, judge="a-vlm"))
        write_json(tmp_path / "in" / f"person-{rater}.json", answers(RAW, rater, lambda *_: FULL_WINS))
    sheets, _ = read_answers([tmp_path / "in"], plan)
    people, model = analyse(plan, sheets, resamples=100, seed=0)
    assert (people.judge, people.human, model.judge, model.human) == ("human", True, "a-vlm", False)
    assert people.questions["quality"].mean_rank["full"].value == 1
    assert model.questions["quality"].mean_rank["full"].value == 3
    assert people.raters == model.raters == 2


def test_one_rater_has_intervals_over_items_and_one_answer_has_no_numbers(tmp_path: Path) -> None:
    odd = RAW["items"][0]["item"]
    alone = _analyse(
        tmp_path, lambda item, question, rater: FULL_LAST if item == odd else FULL_WINS, raters=1, judge="a-vlm"
    )
    quality = alone.questions["quality"]
    assert quality.kendall_w is None and quality.friedman_p is not None
    assert quality.mean_rank["full"].low < quality.mean_rank["full"].value < quality.mean_rank["full"].high
    assert quality.self_agreement is not None and quality.self_agreement.tau is None  # a single pair
    stopped = _analyse(
        tmp_path, lambda *_: FULL_WINS, raters=1, change=lambda sheet: sheet.update(answers=sheet["answers"][:2])
    )
    assert stopped.questions == {} and stopped.too_few == ("quality", "consistency")
    nothing = _analyse(tmp_path, lambda *_: FULL_WINS, raters=1, change=lambda sheet: sheet.update(answers=[]))
    assert nothing.too_few == ("quality", "consistency") and nothing.median_seconds is None


# -- by scipy and choix ----------------------------------------------------------------------------------------------


def test_agreement_is_that_of_scipy() -> None:
    rng = np.random.default_rng(1)
    ranks = rng.permuted(np.tile(np.arange(1, 5), (6 * 7, 1)), axis=1)
    items = np.repeat(np.arange(6), 7)
    blocks = ranks.reshape(6, 7, 4).mean(axis=1)
    assert friedman_p(ranks, items) == pytest.approx(friedmanchisquare(*blocks.T).pvalue)
    # W and Friedman's chi2 of one item's raters: chi2 = m (K - 1) W
    expected = [friedmanchisquare(*of_item.T).statistic / (7 * 3) for of_item in ranks.reshape(6, 7, 4)]
    assert kendall_w(ranks, items) == pytest.approx(np.mean(expected))
    assert friedman_p(ranks[:, :2], items) is None and friedman_p(ranks[:7], items[:7]) is None
    assert friedman_p(np.tile([[1, 2, 3], [3, 2, 1]], (4, 1)), np.repeat(np.arange(4), 2)) is None  # all means alike
    assert kendalltau([1, 2, 3], [1, 3, 2]).statistic == pytest.approx(1 / 3)  # as by hand above


def test_strengths_are_those_of_choix_with_each_pair_compared_once_more() -> None:
    """Half a virtual win either way: to choix, all rankings twice and each ordered pair once."""
    ranks, raters, items = draw_study(Design(6, 5, 5), seed=0)
    ranks[:, 0], ranks[:, 1:] = 1, ranks[:, 1:].argsort(axis=1).argsort(axis=1) + 2  # one always wins
    pairs = list(itertools.permutations(range(5), 2))
    for weights in (np.ones(30), *next(resampled_weights(raters, items, resamples=3, seed=0))):
        data = [
            tuple(order) for order, w in zip(ranks.argsort(axis=1), weights, strict=True) for _ in range(2 * int(w))
        ]
        expected = np.exp(choix.ilsr_rankings(5, data + pairs))
        found = strengths(ranks, weights[None])[0]
        np.testing.assert_allclose(found, expected / expected.sum(), atol=1e-5)
        assert found[0] == found.max() < 1


def test_two_methods_are_a_bradley_terry_model() -> None:
    ranks = np.array([[1, 2]] * 7 + [[2, 1]] * 2)
    np.testing.assert_allclose(strengths(ranks, np.ones((1, 9))), [[7.5 / 10, 2.5 / 10]], atol=1e-6)


# -- simulated raters ------------------------------------------------------------------------------------------------


def test_resamples_draw_raters_and_items_and_are_never_empty() -> None:
    raters, items = np.array([4, 4, 9]), np.array([0, 1, 2])  # nobody shares an item
    weights = np.concatenate(list(resampled_weights(raters, items, resamples=500, seed=0)))
    assert weights.shape == (500, 3) and (weights.sum(axis=1) > 0).all()
    assert set(np.unique(weights)) <= {0, 1, 2, 3, 4, 6}
    # a lone rater is always drawn, so only items vary
    lone = np.concatenate(list(resampled_weights(np.zeros(3, int), items, resamples=50, seed=0)))
    assert (lone.sum(axis=1) == 3).all()
    with pytest.raises(TooFewError):
        next(resampled_weights(np.zeros(2, int), np.zeros(2, int), resamples=5, seed=0))


def test_a_study_of_known_strengths_recovers_their_order_and_the_strengths() -> None:
    """The paper's size. Without effects of raters and items, Plackett-Luce is the truth, not only a summary."""
    design = Design(50, 30, 30)
    ranks, raters, items = draw_study(design, seed=3)
    mean_ranks, _, chances = rank_estimates(ranks, raters, items, resamples=300, seed=0)
    assert np.argsort([e.value for e in mean_ranks]).tolist() == [0, 1, 2, 3, 4]
    assert np.argsort([-e.value for e in chances]).tolist() == [0, 1, 2, 3, 4]
    truth = true_mean_ranks(design, answers=50_000)
    assert all(e.low <= true <= e.high for e, true in zip(mean_ranks, truth, strict=True))
    plain = Design(50, 30, 30, rater_sd=0, item_sd=0)
    _, wins, chances = rank_estimates(*draw_study(plain, seed=0), resamples=300, seed=0)
    assert all(e.low <= s <= e.high for e, s in zip(chances, STRENGTHS / STRENGTHS.sum(), strict=True))
    for first, second in itertools.permutations(range(5), 2):
        true = STRENGTHS[first] / (STRENGTHS[first] + STRENGTHS[second])
        assert wins[first][second].low <= true <= wins[first][second].high


def test_intervals_hold_the_true_mean_rank_as_often_as_they_say() -> None:
    """40 studies of 12 raters: 200 methods' intervals, of which 95 % expected, sd 3 % as one study's are correlated.

    A bootstrap of single answers, or of raters alone, falls far below.
    """
    design = Design(12, 20, 20)
    truth = true_mean_ranks(design, answers=100_000)
    two_way, naive = np.mean([covers(design, truth, seed) for seed in range(40)], axis=(0, 2))
    assert 0.89 <= two_way <= 0.995
    assert naive < 0.8
