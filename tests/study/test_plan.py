"""The plan of a user study: who sees what, in which order."""

from collections import Counter
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pbe.store import digest
from pbe.study.plan import ABSURD, QUESTIONS, make_plan
from pbe.study.settings import StudyConfig

METHODS = ("full", "baseline", "untrained", "copy_paste", "poisson")


def plan_of(
    *,
    methods: int = 5,
    items: int = 6,
    raters: int = 20,
    per_rater: int | None = None,
    repeats: int = 2,
    seed: int = 23,
) -> dict[str, Any]:
    cfg = StudyConfig(items=items, raters=raters, items_per_rater=per_rater, repeats=repeats)
    edits = {name: name.encode().hex() for name in METHODS[:methods]}
    return make_plan(cfg, seed=seed, bench="b" * 64, edits=edits, bench_ids=[f"b{index:03d}" for index in range(40)])


def screens_of(plan: dict[str, Any], *roles: str) -> list[tuple[int, dict[str, Any]]]:
    return [(rater["rater"], one) for rater in plan["raters"] for one in rater["screens"] if one["role"] in roles]


@given(
    methods=st.integers(2, 5),
    items=st.integers(2, 12),
    raters=st.integers(1, 30),
    part=st.floats(0, 1),
    seed=st.integers(0, 5),
)
def test_items_and_places_are_balanced_over_raters(
    methods: int, items: int, raters: int, part: float, seed: int
) -> None:
    per_rater = 2 + round(part * (items - 2))
    plan = plan_of(methods=methods, items=items, raters=raters, per_rater=per_rater, repeats=1, seed=seed)
    counted = {entry["item"] for entry in plan["items"]} - {
        one["item"] for _, one in screens_of(plan, "practice", "attention")
    }
    assert len(counted) == items
    for question in QUESTIONS:
        ranked = [one for _, one in screens_of(plan, "item") if one["question"] == question]
        times = Counter(one["item"] for one in ranked)
        assert len(ranked) == raters * per_rater
        assert max(times.values()) - min(times.get(item, 0) for item in counted) <= 1
        for item in counted:
            orders = [one["shown"] for one in ranked if one["item"] == item]
            for place in range(methods):
                shown = [Counter(order[place] for order in orders).get(name, 0) for name in plan["methods"]]
                assert max(shown) - min(shown) <= 1


@pytest.mark.parametrize("methods", [3, 4, 5])
def test_each_method_stands_equally_often_before_each_other(methods: int) -> None:
    """In a cyclic Latin square the same one would always be to the left, and be compared with it first."""
    plan = plan_of(methods=methods, raters=2 * methods, items=3)
    before = Counter(pair for _, one in screens_of(plan, "item") for pair in pairwise(one["shown"]))
    assert len(before) == methods * (methods - 1) and len(set(before.values())) == 1


def test_one_rater_does_not_see_a_method_always_in_one_place() -> None:
    plan = plan_of(items=10)
    for rater in plan["raters"]:
        shown = [one["shown"] for one in rater["screens"] if one["role"] == "item"]
        for place in range(5):
            assert Counter(order[place] for order in shown) == dict.fromkeys(plan["methods"], 4)


@given(items=st.integers(1, 9), repeats=st.integers(0, 3), methods=st.integers(2, 5))
def test_a_raters_screens_are_practice_then_items_with_attention_among_them_then_repeats(
    items: int, repeats: int, methods: int
) -> None:
    repeats = min(repeats, items - 1)
    plan = plan_of(items=items, repeats=repeats, methods=methods, raters=3)
    for rater in plan["raters"]:
        screens = rater["screens"]
        assert [one["screen"] for one in screens] == list(range(2 * (1 + items + repeats) + 1))
        [attention] = [place for place, one in enumerate(screens) if one["role"] == "attention"]
        assert screens[attention]["question"] == "quality" and attention % 2 == 0
        others = screens[:attention] + screens[attention + 1 :]
        assert [one["question"] for one in others] == [*QUESTIONS] * (len(others) // 2)
        pairs = [*zip(others[::2], others[1::2], strict=True)]
        assert all(one["item"] == other["item"] and one["shown"] != other["shown"] for one, other in pairs)
        roles = [first["role"] for first, _ in pairs]
        assert roles == ["practice", *["item"] * items, *["repeat"] * repeats]
        assert 4 <= attention <= 2 + 2 * items
        ranked = {
            one["item"]: one["shown"] for one in screens if one["role"] == "item" and one["question"] == "quality"
        }
        for first in [screens[attention], *(first for first, _ in pairs)]:
            absurd = first["shown"].count(ABSURD)
            assert absurd == (first["role"] == "attention") and len(first["shown"]) == methods
            if first["role"] == "repeat":
                assert first["shown"] == ranked[first["item"]][::-1] != ranked[first["item"]]
            elif first["role"] != "item":
                assert first["item"] not in ranked


def test_the_plan_is_the_same_again_and_another_for_any_other_study() -> None:
    plan = plan_of()
    assert plan == plan_of()
    assert plan["digest"] == digest({key: value for key, value in plan.items() if key != "digest"})
    others = [plan_of(seed=24), plan_of(repeats=1), plan_of(raters=19), plan_of(methods=4)]
    assert len({one["digest"] for one in [plan, *others]}) == 5
    cfg = StudyConfig(items=6, raters=20)
    ids = [f"b{index:03d}" for index in range(40)]
    again = make_plan(cfg, seed=23, bench="b" * 64, edits={**plan["edits"], "full": "trained again"}, bench_ids=ids)
    assert again["raters"] == plan["raters"] and again["digest"] != plan["digest"]


def test_blind_names_do_not_follow_the_order_of_methods() -> None:
    orders = {tuple(plan_of(seed=seed)["methods"].values()) for seed in range(8)}
    assert len(orders) > 4 and all(sorted(order) == sorted(METHODS) for order in orders)


@pytest.mark.parametrize(("methods", "bench"), [(1, 40), (2, 2)])
def test_too_few_methods_or_items_give_a_plan_without_raters(methods: int, bench: int) -> None:
    cfg = StudyConfig(items=6, raters=20)
    ids = [f"b{index}" for index in range(bench)]
    plan = make_plan(cfg, seed=1, bench="", edits=dict.fromkeys(METHODS[:methods], ""), bench_ids=ids)
    assert plan["raters"] == plan["items"] == []


def test_a_short_bench_gives_fewer_items_and_repeats() -> None:
    cfg = StudyConfig(items=30, raters=2, repeats=5, items_per_rater=20)
    plan = make_plan(cfg, seed=1, bench="", edits=dict.fromkeys(METHODS, ""), bench_ids=["a", "b", "c", "d"])
    roles = Counter(one["role"] for one in plan["raters"][0]["screens"])
    assert roles == {"practice": 2, "item": 4, "attention": 1, "repeat": 2}
