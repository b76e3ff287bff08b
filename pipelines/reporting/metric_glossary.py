"""Explains each metric for the report, in words and as bars."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import yaml

from pbe.evaluate.metrics.intervals import Estimate
from pipelines.reporting.summary import estimate_text


class Entry(NamedTuple):
    """A row of metric_glossary.yaml."""

    metric: str  # regular expression for names; its group is the extractor
    label: str
    unit: str
    text: str


@cache
def glossary() -> list[Entry]:
    return [Entry(**row) for row in yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text())]


@dataclass(frozen=True)
class Bar:
    """A number with its interval, and their positions on a line in percent of its length."""

    label: str
    index: int  # of the variant, for its colour
    text: str
    verdict: str
    low_pct: float
    high_pct: float
    value_pct: float
    zero_pct: float


def verdict(estimate: Estimate) -> str:
    """Say whether the interval lies above 0, below 0 or contains it."""
    if estimate.low > 0:
        return "above 0"
    return "below 0" if estimate.high < 0 else "may be 0"


def bars(estimates: Sequence[tuple[str, Estimate]]) -> list[Bar]:
    """Place the estimates on one common line that contains 0."""
    ends = [0.0] + [end for _, estimate in estimates for end in (estimate.low, estimate.high, estimate.value)]
    margin = 0.06 * (max(ends) - min(ends)) or 1.0
    start, length = min(ends) - margin, max(ends) - min(ends) + 2 * margin

    def at(value: float) -> float:
        return round(100 * (value - start) / length, 2)

    return [
        Bar(
            label=label,
            index=index,
            text=estimate_text(estimate, signed=True),
            verdict=verdict(estimate),
            low_pct=at(estimate.low),
            high_pct=at(estimate.high),
            value_pct=at(estimate.value),
            zero_pct=at(0.0),
        )
        for index, (label, estimate) in enumerate(estimates)
    ]


def how_to_read(metric: str) -> tuple[str, str, str, str]:
    """Return a metric's label, extractor ("" for none), unit and explanation; a metric without one is a bug."""
    for entry in glossary():
        if found := re.fullmatch(entry.metric, metric):
            return entry.label, "".join(group or "" for group in found.groups()), entry.unit, entry.text
    raise KeyError(f"metric {metric} has no sentence in metric_glossary.yaml")


def n_text(estimate: Estimate, chance: float | None = None) -> str:
    photos = f" in {estimate.clusters} photos" if estimate.clusters < estimate.n else ""
    return f"{estimate.n}{photos}" + (f"; chance {chance:.3g}" if chance is not None else "")
