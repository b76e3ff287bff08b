"""The plan of a user study: which rater ranks which pictures on which screen, in which order.

Paper, Table 2: 50 participants rank 30 groups of two inputs and five outputs from 1 to 5, by quality and by consistency
with the exemplar, separately. Ours beyond that: a practice item, repeated items and one attention item per rater, and
an order of screens and pictures that is drawn here, from the seed, so that it is on record and the same everywhere.

Pictures are in the order of a Williams square (E. J. Williams, 1949): over the raters of an item each method stands
equally often in each place, and next to each other method. Methods have blind names m1, m2, ...; ABSURD is none.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import numpy as np

from pbe.data.rng import row_rng
from pbe.store import digest
from pbe.study.settings import StudyConfig

FORMAT, FORMAT_VERSION = "pbe-study-plan", 1
Question = Literal["quality", "consistency"]
QUESTIONS: tuple[Question, ...] = get_args(Question)
Role = Literal["practice", "item", "attention", "repeat"]
Orders = list[tuple[str, ...]]  # of the pictures of one item, for each question that is asked about it
ABSURD = "absurd"  # what stands for one method in the attention item, and must be ranked last
EXTRA_ITEMS = 2  # the practice item and the attention item


@dataclass(frozen=True)
class Screen:
    """One question about one item. screen: its place in the rater's plan. shown: blind names from left to right."""

    screen: int
    item: str
    role: Role
    question: Question
    shown: tuple[str, ...]


def make_plan(
    cfg: StudyConfig, *, seed: int, bench: str, edits: Mapping[str, str], bench_ids: Sequence[str]
) -> dict[str, Any]:
    """Draw the plan; the answers of a study name its digest.

    bench: SHA-256 of the bench's part. edits: digest of each method's manifest, by method. bench_ids: items that every
    method has edited. Without two methods or three such items the plan has no raters.
    """
    blind = _blind_names(seed, list(edits))
    items = _draw_items(seed, bench_ids, cfg.items) if len(blind) > 1 else []
    plan: dict[str, Any] = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "questions": list(QUESTIONS),
        "methods": blind,
        "bench": bench,
        "edits": dict(edits),
        "items": [{"item": item} for item in items],
        "raters": [
            {"rater": rater, "screens": [{**asdict(screen), "shown": list(screen.shown)} for screen in screens]}
            for rater, screens in _raters(cfg, seed, list(blind), items).items()
        ],
    }
    return {**plan, "digest": digest(plan)}


def _blind_names(seed: int, methods: Sequence[str]) -> dict[str, str]:
    order = row_rng(seed, "study", "methods").permutation(len(methods))
    return {f"m{place + 1}": methods[index] for place, index in enumerate(order)}


def _draw_items(seed: int, bench_ids: Sequence[str], most: int) -> list[str]:
    """The study's items in random order, evenly spaced over the bench; the last two are for practice and attention."""
    count = min(most + EXTRA_ITEMS, len(bench_ids))
    if count <= EXTRA_ITEMS:
        return []
    chosen = [bench_ids[index] for index in np.linspace(0, len(bench_ids) - 1, count).round().astype(int)]
    return [chosen[index] for index in row_rng(seed, "study", "items").permutation(count)]


def _raters(cfg: StudyConfig, seed: int, names: Sequence[str], items: Sequence[str]) -> dict[int, list[Screen]]:
    """Screens of each rater, from 1. names: blind names. items: as _draw_items."""
    if not items:
        return {}
    *ranked, practice, attention = items
    per_rater = min(cfg.items_per_rater or len(ranked), len(ranked))
    seen = dict.fromkeys(ranked, 0)  # raters who have seen it so far
    out = {}
    for rater in range(1, cfg.raters + 1):
        rng = row_rng(seed, "study", "rater", rater)
        # raters take the next items in turn, around the list, so that each item is seen equally often
        first = (rater - 1) * per_rater
        orders: dict[str, Orders] = {}
        for place in (index % len(ranked) for index in range(first, first + per_rater)):
            times = seen[ranked[place]]
            orders[ranked[place]] = _orders(names, row=times + place, mirrored=times // len(names) % 2 == 1)
            seen[ranked[place]] += 1
        mine = [list(orders)[index] for index in rng.permutation(per_rater)]
        parts: list[tuple[Role, str, Orders]] = [("item", item, orders[item]) for item in mine]
        third = -(-per_rater // 3)
        middle = int(rng.integers(third, max(third, per_rater - third) + 1))
        parts.insert(middle, ("attention", attention, [_with_absurd(names, rng)]))
        # the first ones, which were seen longest ago, their pictures from right to left
        repeats = mine[: min(cfg.repeats, per_rater - 1)]
        parts += [("repeat", item, [order[::-1] for order in orders[item]]) for item in repeats]
        parts.insert(0, ("practice", practice, _orders(names, row=rater, mirrored=False)))
        # attention is a matter of quality alone: noise of an untrained model is as unlike the exemplar as ABSURD is
        shown = [(item, role, *pair) for role, item, found in parts for pair in zip(QUESTIONS, found, strict=False)]
        out[rater] = [Screen(number, *fields) for number, fields in enumerate(shown)]
    return out


def _orders(names: Sequence[str], *, row: int, mirrored: bool) -> Orders:
    """Rows of the Williams square of these names: that number, modulo theirs, and another for the second question.

    mirrored: an odd number of names needs the square and its mirror image for all neighbours.
    """
    count = len(names)
    zigzag = [(place + 1) // 2 if place % 2 else -place // 2 for place in range(count)]  # 0, 1, -1, 2, -2, ...
    rows = [row + question * ((count + 1) // 2) for question in range(len(QUESTIONS))]
    orders = [tuple(names[(step + start) % count] for step in zigzag) for start in rows]
    return [order[::-1] for order in orders] if mirrored else orders


def _with_absurd(names: Sequence[str], rng: np.random.Generator) -> tuple[str, ...]:
    """A random order of all but one method and of ABSURD."""
    left_out = int(rng.integers(len(names)))
    shown = [*names[:left_out], ABSURD, *names[left_out + 1 :]]
    return tuple(shown[index] for index in rng.permutation(len(shown)))
