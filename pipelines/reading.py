"""How to read each metric, in words and as bars, for the report."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from pbe.evaluate.intervals import Estimate
from pipelines.summary import estimate_text

# Metric name -> what it is, its unit, and how to read it. Groups of the pattern are the judge.
HOW_TO_READ: dict[str, tuple[str, str, str]] = {
    r"own_gain_(.+)": (
        "Own gain",
        "cosine",
        "Is the fill closer to its own reference than the fill made with a foreign reference is? Above 0 is good. It "
        "also rises when a foreign reference merely damages the fill.",
    ),
    r"swap_gain_(.+)": (
        "Swap gain",
        "cosine",
        "Does the fill move towards a foreign reference when it gets one? Above 0 is good; this is the strict test.",
    ),
    r"exemplar_gain_(.+)": ("Exemplar gain", "cosine", "The mean of own gain and swap gain."),
    r"own_colour_gain": (
        "Own colour gain",
        "levels of 255",
        "Own gain with mean colour in place of features: how much nearer the fill's colour is to its own reference.",
    ),
    r"swap_colour_gain": (
        "Swap colour gain",
        "levels of 255",
        "How far the fill's mean colour moves towards a foreign reference.",
    ),
    r"colour_gain": (
        "Colour gain",
        "levels of 255",
        "How far the fill's mean colour follows the reference that was given, own or foreign (the mean of both). "
        "Colour can follow where content does not.",
    ),
    r"hole_psnr_db": (
        "Hole PSNR",
        "dB",
        "How exactly the fill of the own reference restores the photo, inside the hole; higher is closer. On photos "
        "seen in training it measures memory.",
    ),
    r"similarity_(.+)": (
        "Similarity",
        "cosine",
        "Fill against its own reference; higher is closer. Pasting the reference would score best, so never choose a "
        "model by this alone.",
    ),
    r"frechet_(.+)": (
        "Frechet distance",
        "",
        "Distance between the feature clouds of edits and of untouched crops; lower is better. Biased upwards at small "
        "N and not comparable with a published FID: another extractor, other photos.",
    ),
    r"qs_rank_(.+)": (
        "QS rank",
        "percentile",
        "Rank of an edit's likelihood among real crops, under a mixture fitted on other real crops of the same photos: "
        "50 is an average crop. This is not the paper's QS.",
    ),
}


@dataclass(frozen=True)
class Bar:
    """A number with its interval, and where they lie on a line: percentages of its length."""

    label: str
    index: int  # which variant, for its colour
    text: str
    verdict: str
    low_pct: float
    high_pct: float
    value_pct: float
    zero_pct: float


def verdict(estimate: Estimate) -> str:
    """What the interval says about 0."""
    if estimate.low > 0:
        return "above 0"
    return "below 0" if estimate.high < 0 else "may be 0"


def bars(estimates: Sequence[tuple[str, Estimate]]) -> list[Bar]:
    """Estimates on one common line that holds 0."""
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
    """Label, judge ("" when there is none), unit and the sentence of a metric; a metric without one is a bug."""
    for pattern, (label, unit, sentence) in HOW_TO_READ.items():
        if found := re.fullmatch(pattern, metric):
            return label, "".join(found.groups()), unit, sentence
    raise KeyError(f"metric {metric} has no sentence in HOW_TO_READ")


def n_text(estimate: Estimate) -> str:
    photos = f" in {estimate.clusters} photos" if "groups" in estimate.method else ""
    return f"{estimate.n}{photos}"
