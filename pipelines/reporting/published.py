"""The paper's Table 1: this run's methods on COCOEE, and published ones where a column is the very same metric."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pbe.config import Params
from pbe.evaluate.bench.cocoee import ITEMS
from pipelines.reporting.metric_glossary import how_to_read
from pipelines.reporting.summary import Result, estimate_text

TABLE = Path(__file__).with_suffix(".yaml")
TEST2017_PHOTOS = 40_670
SCOPE = ("box", "exemplar")


@dataclass(frozen=True)
class Column:
    """A column of the paper's. metric: what this run has of it. why_not: why it is not the paper's, "" if it is."""

    key: str  # of published.yaml
    label: str
    metric: str
    why_not: str


def table_1(params: Params, card: Mapping[str, Any], results: Mapping[str, Result]) -> dict[str, Any] | None:
    """Rows in the paper's layout (FID, QS, CLIP score), of `results` in their order; None unless the bench is COCOEE.

    card: that of metrics.json. A column is the paper's only by its network, its real images, its mixture, its region
    and, for FID, its number of items; any other carries the name of its metric, and no published number stands in it.
    """
    shown = {name: result.scopes[SCOPE] for name, result in results.items() if SCOPE in result.scopes}
    if params.bench.source != "cocoee" or not shown:
        return None
    columns = _columns(card, {metric for numbers in shown.values() for metric in numbers})
    items = card["bench"]["items"]
    ours = [
        (
            name,
            _fewer({numbers[c.metric].n for c in columns if c.metric in numbers} - {items}, items),
            [estimate_text(numbers[c.metric]) if c.metric in numbers else "" for c in columns],
        )
        for name, numbers in shown.items()
    ]
    published = [row for row in yaml.safe_load(TABLE.read_text()) if any(_is_shown(row, c) for c in columns)]
    return {
        "columns": [column.label for column in columns],
        "ours": ours,
        "published": [
            (row["method"], row["source"], [f"{row[c.key]:.2f}" if _is_shown(row, c) else "" for c in columns])
            for row in published
        ],
        "items": items,
        "why_not": [f"{column.label} is not the paper's: {column.why_not}" for column in columns if column.why_not],
    }


def _fewer(counts: set[int], items: int) -> str:
    """What is said of a method that has not filled all items."""
    return f"N = {min(counts)} of {items}; fewer items make FID larger" if counts else ""


def _is_shown(row: Mapping[str, Any], column: Column) -> bool:
    return not column.why_not and row[column.key] is not None


def _columns(card: Mapping[str, Any], metrics: set[str]) -> list[Column]:
    """The three columns, by CLIP if it is among the extractors, else by the first."""
    extractor = "clip" if "clip" in card["extractors"] else next(iter(card["extractors"]))
    facts, items = card["extractors"][extractor], card["bench"]["items"]
    network = "it is not by CLIP ViT-B/32", not (extractor == "clip" and facts["papers_network"])
    frechet = {"clip": "clip_fid", "inception": "fid"}.get(extractor, f"frechet_{extractor}")
    quality = "qs" if "qs" in metrics else f"qs_rank_{extractor}"
    whole = "clip_score_whole" if "clip_score_whole" in metrics else "clip_score"
    similarity = whole if extractor == "clip" else f"similarity_{extractor}"
    photos = facts["reference_n"]
    real = f"it compares with {photos} photos, the paper's with the {TEST2017_PHOTOS} of COCO test2017"
    subset = f"it is of {items} items, the paper's of {ITEMS}, and fewer items make it larger"
    rank, region = "it is a rank, as evaluate.extractors names no mixture", "its region is another"
    found = [
        ("fid", "FID", frechet, _why(network, (real, photos != TEST2017_PHOTOS), (subset, items != ITEMS))),
        ("qs", "QS", quality, _why(network, (rank, quality != "qs"))),
        ("clip_score", "CLIP score", similarity, _why(network, (region, similarity == "clip_score_whole"))),
    ]
    return [
        Column(key, _name(metric) if why else label, metric, why)
        for key, label, metric, why in found
        if metric in metrics
    ]


def _why(*reasons: tuple[str, bool]) -> str:
    return "; ".join(reason for reason, holds in reasons if holds)


def _name(metric: str) -> str:
    """A name that is not the paper's."""
    label, extractor, _, _ = how_to_read(metric)
    return f"{label}, {extractor}" if extractor else metric
