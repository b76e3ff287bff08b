"""A plan as the stage study draws it, but small, and files of answers to it."""

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pbe.study.plan import make_plan
from pbe.study.settings import StudyConfig

EDITS = {name: f"edits of {name}" for name in ("full", "copy_paste", "poisson")}
# item, question, rater -> methods' names, best first; None: this screen is not answered
Ranks = Callable[[str, str, int], Sequence[str]]


def small_plan(*, raters: int = 3, edits: Mapping[str, str] = EDITS) -> dict[str, Any]:
    """Every rater sees three items, one of them again; with practice and attention five parts of two screens each."""
    cfg = StudyConfig(items=3, raters=raters, repeats=1)
    return make_plan(cfg, seed=0, bench="b" * 64, edits=edits, bench_ids=[f"item{number}" for number in range(5)])


def answers(plan: dict[str, Any], rater: int, ranks: Ranks, *, judge: str = "human") -> dict[str, Any]:
    """What the page gives a rater who answers every screen, and puts the absurd picture last."""
    id_of = {name: method for method, name in plan["methods"].items()}
    found = []
    for screen in next(planned["screens"] for planned in plan["raters"] if planned["rater"] == rater):
        if screen["role"] == "practice":
            continue
        order = [id_of[name] for name in ranks(screen["item"], screen["question"], rater)]
        ranking = [method for method in order if method in screen["shown"]]
        ranking += ["absurd"] * (screen["role"] == "attention")
        found.append({**screen, "ranking": ranking, "seconds": 2.5})
    return {
        "format": "pbe-study-answers",
        "version": 1,
        "plan": plan["digest"],
        "rater": rater,
        "judge": judge,
        "started": "2026-11-29T09:00:00Z",
        "finished": "2026-11-29T09:10:00Z",
        "answers": found,
    }


def write_json(path: Path, value: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))
    return path


def csv_text(sheet: dict[str, Any]) -> str:
    """The same answers as the page's table."""
    count = max(len(answer["ranking"]) for answer in sheet["answers"])
    out = io.StringIO()
    table = csv.writer(out)
    ranks = [f"rank_{place + 1}" for place in range(count)]
    table.writerow(["plan", "rater", "judge", "screen", "item", "role", "question", *ranks, "shown", "seconds"])
    for answer in sheet["answers"]:
        head = [answer[key] for key in ("screen", "item", "role", "question")]
        row = [*head, *answer["ranking"], " ".join(answer["shown"]), answer["seconds"]]
        table.writerow([sheet["plan"], sheet["rater"], sheet["judge"], *row])
    return out.getvalue()
