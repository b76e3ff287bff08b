"""summary: print where the report is, the headline numbers and the MLflow command; `make repro` ends with it.

The report formats its numbers with the functions here. Does not import torch, because it runs after every `make repro`.
"""

import json
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pbe.config import Params, load_params
from pbe.data.schema import CAPTION_FORMS
from pbe.evaluate.metrics.intervals import Estimate
from pbe.places import repo_root, tracking_uri
from pipelines.runtime.stage import StageError, output_folder

LISTED = 8  # rows printed; the report has all
Scope = tuple[str, str]  # hole kind, and reference kind or form of caption


@dataclass(frozen=True)
class Result:
    """One method of metrics.json: a variant or a baseline, which may be someone else's results.

    chances: by metric, its value for fills that tell nothing of their reference, where that is known; of all scopes.
    """

    name: str
    protocol: dict[str, Any]
    scopes: dict[Scope, dict[str, Estimate]]
    chances: dict[str, float] = field(default_factory=dict)


def main() -> None:
    """Print the summary. Raises StageError if there is no metrics.json yet."""
    params, root = load_params(), repo_root()
    extractor, scope = params.evaluate.extractors[0].kind, (params.edit.holes[0], "exemplar")
    results, _ = load_results(root, params)
    first = next(iter(next(iter(results.values())).scopes[scope].values()))

    photos = "photos seen in training" if seen_in_training(params) else "photos not seen in training"
    metrics = headline_metrics(extractor)
    print(f"{first.n} items in {photos}, {scope[0]} holes, 95 % intervals, by {extractor}; one training seed:")
    rows = {
        result.name if kind == "exemplar" else caption_label(result.name, kind): result.scopes[scope[0], kind]
        for result in results.values()
        for kind in ("exemplar", *CAPTION_FORMS)
        if (scope[0], kind) in result.scopes
    }
    width = max(map(len, rows))
    for name, scored in list(rows.items())[:LISTED]:
        found = [(label, scored.get(metric)) for metric, label in metrics.items()]
        numbers = [f"{label} {estimate_text(estimate)}" for label, estimate in found if estimate is not None]
        n = next(iter(scored.values())).n
        print(f"  {name:{width}}  " + "  ".join(numbers) + (f"  (N = {n})" if n != first.n else ""))
    if len(rows) > LISTED:
        print(f"  and {len(rows) - LISTED} more in the report")
    print(f"Report: {root / 'reports' / 'index.html'}")
    print(f"MLflow: {mlflow_command(tracking_uri())}")


def caption_label(name: str, form: str) -> str:
    """Return a text variant's row of one form of captions."""
    return f"{name}: {form.replace('_', ' and ')}"


def seen_in_training(params: Params) -> bool:
    return params.bench.source == "heldout" and params.bench.split == "train"


def mlflow_command(uri: str) -> str:
    """Return a command that works in any folder; for a tracking server, its address."""
    if uri.startswith(("http://", "https://")):
        return f"open {uri}"
    return f"{shlex.quote(sys.executable)} -m mlflow ui --host 127.0.0.1 --backend-store-uri {shlex.quote(uri)}"


def headline_metrics(extractor: str) -> dict[str, str]:
    """Return the headline columns by their names in metrics.json; not every method has all of them."""
    return {
        {"inception": "fid", "clip": "clip_fid"}.get(extractor, f"frechet_{extractor}"): "Frechet",
        "qs": "QS",
        f"qs_rank_{extractor}": "QS rank",
        "clip_score": "CLIP score",
        "clip_score_whole": "CLIP score, whole region",
        f"similarity_{extractor}": "similarity",
        f"exemplar_gain_{extractor}": "exemplar gain",
        "copy_paste": "copy-paste",
    }


def load_results(root: Path, params: Params) -> tuple[dict[str, Result], dict[str, Any]]:
    """Return the methods in the order of params.yaml, and the card of their provenance. Raises StageError."""
    path = output_folder(root, "evaluate") / "metrics.json"
    raw = read_json(path, "evaluate")
    out = {}
    for name in (*params.variants, *params.baselines):
        if name not in raw:
            raise StageError(f"{path}: has no {name}; run `dvc repro evaluate` first")
        found = dict(raw[name])
        protocol = found.pop("protocol")
        scopes = {
            (hole, reference): {metric: estimate_from(value) for metric, value in numbers.items()}
            for hole, references in found.items()
            for reference, numbers in references.items()
        }
        chances = {
            metric: value["chance"]
            for references in found.values()
            for numbers in references.values()
            for metric, value in numbers.items()
            if "chance" in value
        }
        out[name] = Result(name, protocol, scopes, chances)
    return out, raw["card"]


def estimate_from(raw: dict[str, Any]) -> Estimate:
    """Read an estimate from its JSON, which may also have the extractor and a chance value."""
    return Estimate(**{key: value for key, value in raw.items() if key not in ("extractor", "chance")})


def read_json(path: Path, target: str) -> Any:
    """Read a JSON file. Raises StageError if it is missing, naming the DVC target that writes it."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise StageError(f"{path}: not there; run `dvc repro {target}` first") from None


def estimate_text(estimate: Estimate, *, signed: bool = False) -> str:
    """Format as value [low, high], all with the digits that the largest needs."""
    size = max(abs(estimate.value), abs(estimate.low), abs(estimate.high))
    digits = 1 if size >= 10 else 2 if size >= 1 else 3
    form = f"{{:{'+' if signed else ''}.{digits}f}}"
    # adding 0.0 turns -0.0, from a rounded small negative number, into 0.0
    value, low, high = (
        form.format(round(number, digits) + 0.0) for number in (estimate.value, estimate.low, estimate.high)
    )
    return f"{value} [{low}, {high}]"
