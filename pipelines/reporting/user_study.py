"""The user study, in the layout of the paper's Table 2: a row per method, a column per question, ranks from 1, best.

Shown only while it is about the edits of this page: the results name their plan, and the plan the edits.
"""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from pbe.store import ManifestError, load_manifest
from pbe.study.plan_file import PlanError, load_plan
from pbe.study.results import load_results, results_path
from pipelines.reporting.summary import estimate_from, estimate_text
from pipelines.runtime.stage import output_folder


def user_study(root: Path, methods: Collection[str]) -> dict[str, Any] | None:
    """What the page shows of data/study-results.json; None if it is not there.

    methods: those of the page. "outdated" says why there are no numbers, or is "". Raises ResultsError for a damaged
    file.
    """
    try:
        results = load_results(results_path(root))
    except FileNotFoundError:
        return None
    outdated = _why_outdated(root, results, methods)
    judges = [] if outdated else [_judge(judge, results["questions"]) for judge in results["judges"]]
    return {"outdated": outdated, "judges": judges, "files": len(results["inputs"]), "plan": results["plan"]}


def _why_outdated(root: Path, results: Mapping[str, Any], methods: Collection[str]) -> str:
    try:
        plan = load_plan(root / "data" / "study" / "plan.json")
    except PlanError:
        return "its plan is not there"
    if plan.digest != results["plan"]:
        return "its answers are of an earlier plan"
    for name, digest in results["edits"].items():
        if name not in methods:
            return f"params.yaml no longer has {name}"
        try:
            current = load_manifest(output_folder(root, "edit", name) / "manifest.json").digest
        except ManifestError:
            return f"the edits of {name} are not there"
        if current != digest:
            return f"its answers are about earlier edits of {name}"
    return ""


def _judge(judge: Mapping[str, Any], questions: Sequence[str]) -> dict[str, Any]:
    found = {question: judge["questions"][question] for question in questions if question in judge["questions"]}
    first: Mapping[str, Any] = next(iter(found.values()))["mean_rank"] if found else {}
    names = sorted(first, key=lambda name: first[name]["value"])
    return {
        "name": judge["judge"],
        "human": judge["human"],
        "questions": list(found),
        "rows": [
            (name, [estimate_text(estimate_from(numbers["mean_rank"][name])) for numbers in found.values()])
            for name in names
        ],
        "details": [_question(question, numbers, names) for question, numbers in found.items()],
        "too_few": judge["too_few"],
        "raters": judge["raters"],
        "left_out": _by_rater(judge["left_out"]),
        "incomplete": _by_rater(judge["incomplete"]),
        "unchecked": judge["unchecked"],
        "median_seconds": judge["median_seconds"],
    }


def _by_rater(found: Mapping[str, Any]) -> list[tuple[int, Any]]:
    """JSON's keys are text."""
    return sorted((int(rater), value) for rater, value in found.items())


def _question(question: str, numbers: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    own = numbers["self_agreement"]
    return {
        "question": question,
        **{key: numbers[key] for key in ("answers", "raters", "items", "friedman_p", "kendall_w")},
        "names": names,
        "rows": [
            (
                name,
                estimate_text(estimate_from(numbers["strength"][name])),
                [
                    estimate_text(estimate_from(numbers["wins"][name][other])) if other != name else ""
                    for other in names
                ],
            )
            for name in names
        ],
        "self": own
        and {
            **own,
            "tau": own["tau"] and estimate_text(estimate_from(own["tau"])),
            "same_first": own["same_first"] and estimate_text(estimate_from(own["same_first"])),
        },
    }
