"""How to read each metric, in words and as bars, for the report."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from pbe.evaluate.metrics.intervals import Estimate
from pipelines.reporting.summary import estimate_text

# Metric name -> what it is, its unit, and how to read it. Groups of the pattern are the judge.
HOW_TO_READ: dict[str, tuple[str, str, str]] = {
    r"fid|clip_fid|frechet_(.+)": (
        "Frechet distance",
        "",
        "Distance between the feature clouds of edits and of untouched photos; lower is better. Biased upwards at "
        "small N: compare only within one table. `fid` is by TF's Inception, `clip_fid` by CLIP ViT-B/32 as the "
        "paper's code; by any other network it compares with no published number.",
    ),
    r"kid|kid_(.+)": (
        "KID",
        "",
        "Kernel distance between the same clouds, without a bias by N; lower is better, and it may be below 0.",
    ),
    r"qs": (
        "QS",
        "",
        "The paper's quality score: likelihood under its mixture of COCO photos, 0 to 100; higher is better.",
    ),
    r"qs_rank_(.+)": (
        "QS rank",
        "percentile",
        "Rank of an edit's likelihood among the bench's own crops before the edit, under a mixture fitted on the "
        "untouched photos named below: other crops of the same photos, unless evaluate.reals names a folder. 50 is an "
        "average photo. This is not the paper's QS.",
    ),
    r"clip_score|clip_score_whole|similarity_(.+)": (
        "Similarity",
        "cosine",
        "Fill against the reference that it was given; higher is closer. Pasting the reference scores best, so never "
        "choose a model by this alone. `clip_score` is 100 times the cosine by CLIP, over upstream's region, which "
        "lacks a row and a column; `clip_score_whole` is over all of it.",
    ),
    r"exemplar_gain_given_(.+)": (
        "Exemplar gain, given",
        "cosine",
        "Is the fill closer to its reference than the fill made with a foreign one is? It also rises when a foreign "
        "reference merely damages the fill.",
    ),
    r"exemplar_gain_swap_(.+)": (
        "Exemplar gain, swapped",
        "cosine",
        "Does the fill move towards a foreign reference when it gets one? The strict half of the exemplar gain.",
    ),
    r"exemplar_gain_(.+)": (
        "Exemplar gain",
        "cosine",
        "How much closer a fill is to the reference that it was given than to one that it was not; the same hole, the "
        "same noise. Above 0: the reference mattered.",
    ),
    r"colour_gain": (
        "Colour gain",
        "levels of 255",
        "Exemplar gain with mean colour in place of features. Colour can follow where content does not.",
    ),
    r"spread_pixels": (
        "Spread of colour",
        "levels of 255",
        "Standard deviation over the noises, mean over the hole's pixels. 0: the noise changes nothing.",
    ),
    r"spread_(.+)": (
        "Spread",
        "1 - cosine",
        "Mean distance between the fills of one hole by one reference that differ in their noise alone.",
    ),
    r"copy_paste": (
        "Copy-paste",
        "0 to 1",
        "How well the fill is explained by an affine copy of the reference, mirrored, scaled and turned by up to 20 "
        "degrees: the trivial solution that the paper fights. Lower is better, at equal similarity.",
    ),
    r"hole_psnr_db": (
        "Hole PSNR",
        "dB",
        "How exactly the fill restores what the hole hides; higher is closer. With its own reference, on photos seen "
        "in training, it measures memory.",
    ),
    r"background_psnr_db": (
        "Background PSNR",
        "dB",
        "How little changed outside the hole; 60 stands for nothing.",
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
            return label, "".join(group or "" for group in found.groups()), unit, sentence
    raise KeyError(f"metric {metric} has no sentence in HOW_TO_READ")


def n_text(estimate: Estimate) -> str:
    photos = f" in {estimate.clusters} photos" if estimate.clusters < estimate.n else ""
    return f"{estimate.n}{photos}"
