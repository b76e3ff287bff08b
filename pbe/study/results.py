"""data/study-results.json: what `pbe import-study` found. No stage makes it; the report shows it if it is there."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pbe.errors import UserError, one_line
from pbe.evaluate.settings import StatisticsConfig
from pbe.store import write_json
from pbe.study.analysis import JudgeResult
from pbe.study.answers import Source
from pbe.study.plan_file import Plan

FORMAT, VERSION = "pbe-study-results", 1


class ResultsError(UserError):
    """The file of results is damaged, or of another version."""


def results_path(root: Path) -> Path:
    return root / "data" / "study-results.json"


def save_results(
    path: Path, plan: Plan, sources: Sequence[Source], judges: Sequence[JudgeResult], cfg: StatisticsConfig
) -> None:
    """Write the numbers, and the plan and files that they come from."""
    results = {
        "format": FORMAT,
        "version": VERSION,
        "plan": plan.digest,
        "questions": plan.questions,
        "bench": plan.bench,
        "edits": plan.edits,
        "inputs": [asdict(source) for source in sources],
        "statistics": cfg.model_dump(include={"resamples", "seed"}),
        "judges": [asdict(judge) for judge in judges],
    }
    write_json(path, results)


def load_results(path: Path) -> dict[str, Any]:
    """Read what save_results wrote, as JSON has it. Raises ResultsError, FileNotFoundError."""
    again = "delete it, or run `pbe import-study` again"
    try:
        raw = json.loads(path.read_bytes())
    except ValueError as error:
        raise ResultsError(f"{path}: damaged ({one_line(error, 100)}); {again}") from None
    if not isinstance(raw, dict) or (raw.get("format"), raw.get("version")) != (FORMAT, VERSION):
        raise ResultsError(f"{path}: not results of a study that this version reads; {again}")
    return raw
