"""summary: what `make repro` prints last. Where the report is, the headline numbers, how to open MLflow.

The report writes its numbers with the functions here. No torch: this runs after every `make repro`.
"""

import json
import shlex
import sys
from pathlib import Path
from typing import Any

from pbe.config import load_params, repo_root, tracking_uri
from pbe.evaluate.intervals import Estimate
from pipelines.stage import StageError, output_folder

LABELS = ("own gain", "swap gain", "colour gain")
LISTED = 4  # variants; the report has all of them


def main() -> None:
    """Raises StageError when a variant has no metrics.json yet."""
    params, root = load_params(), repo_root()
    judge = params.evaluate.judges[0]
    estimates = {name: load_metrics(root, name)[0] for name in params.variants}
    first = next(iter(estimates.values()))[f"own_gain_{judge}"]

    photos = "photos seen in training" if params.evaluate.split == "train" else "photos not seen in training"
    print(f"95 % intervals, {first.n} items in {first.clusters} {photos}, by {judge}; one training seed:")
    width = max(map(len, estimates))
    for name in list(estimates)[:LISTED]:
        numbers = [estimate_text(estimates[name][metric], signed=True) for metric in headline_metrics(judge)]
        print(f"  {name:{width}}  " + "  ".join(f"{a} {b}" for a, b in zip(LABELS, numbers, strict=True)))
    if len(estimates) > LISTED:
        print(f"  and {len(estimates) - LISTED} more variants in the report")
    print(f"Report: {root / 'reports' / 'index.html'}")
    print(f"MLflow: {mlflow_command(tracking_uri())}")


def mlflow_command(uri: str) -> str:
    """A command that works in any folder; a tracking server needs none, its pages are at its address."""
    if uri.startswith(("http://", "https://")):
        return f"open {uri}"
    return f"{shlex.quote(sys.executable)} -m mlflow ui --host 127.0.0.1 --backend-store-uri {shlex.quote(uri)}"


def headline_metrics(judge: str) -> list[str]:
    """The three numbers that a run is summed up by."""
    return [f"own_gain_{judge}", f"swap_gain_{judge}", "colour_gain"]


def load_metrics(root: Path, variant: str) -> tuple[dict[str, Estimate], dict[str, Any]]:
    """Estimates by name and the protocol of one variant's metrics.json. Raises StageError when it is not there."""
    path = output_folder(root, "evaluate", variant) / "metrics.json"
    raw = read_json(path, f"evaluate@{variant}")
    return {name: Estimate(**value) for name, value in raw.items() if name != "protocol"}, raw["protocol"]


def read_json(path: Path, target: str) -> Any:
    """Raises StageError naming the DVC target that writes the file."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise StageError(f"{path}: not there; run `dvc repro {target}` first") from None


def estimate_text(estimate: Estimate, *, signed: bool = False) -> str:
    """value [low, high], all three with the digits that the largest of them needs."""
    size = max(abs(estimate.value), abs(estimate.low), abs(estimate.high))
    digits = 1 if size >= 10 else 2 if size >= 1 else 3
    form = f"{{:{'+' if signed else ''}.{digits}f}}"
    # + 0.0 turns -0.0, which a small negative number rounds to, into 0.0
    value, low, high = (
        form.format(round(number, digits) + 0.0) for number in (estimate.value, estimate.low, estimate.high)
    )
    return f"{value} [{low}, {high}]"
