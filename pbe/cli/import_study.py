"""`pbe import-study`: answers of a user study to data/study-results.json, a table, and a run per method in MLflow."""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pbe.errors import printable

if TYPE_CHECKING:
    from pbe.evaluate.metrics.intervals import Estimate
    from pbe.evaluate.settings import StatisticsConfig
    from pbe.study.analysis import JudgeResult, QuestionResult
    from pbe.study.answers import Sheet
    from pbe.study.plan_file import Plan


def add_import_study_parser(commands: Any) -> None:
    imports = commands.add_parser("import-study", help="read the answers of a user study: ranks with intervals")
    imports.add_argument("files", nargs="+", type=Path, help="all raters' .json or .csv files, or folders with them")
    imports.add_argument("--plan", type=Path, help="the study's plan; default: data/study/plan.json")
    imports.set_defaults(run=run_import_study)


def run_import_study(args: argparse.Namespace) -> None:
    """Raises PlanError, AnswersError, ParamsError, OSError: then nothing is written."""
    from pbe.config import load_params
    from pbe.places import repo_root, tracking_uri
    from pbe.study.analysis import analyse
    from pbe.study.answers import read_answers
    from pbe.study.plan_file import load_plan
    from pbe.study.results import results_path, save_results
    from pbe.track import TrackError

    root, cfg = repo_root(), load_params().evaluate.statistics
    plan = load_plan(args.plan or root / "data" / "study" / "plan.json")
    sheets, sources = read_answers(args.files, plan)
    judges = analyse(plan, sheets, resamples=cfg.resamples, seed=cfg.seed)
    save_results(results_path(root), plan, sources, judges, cfg)
    print("\n".join(printable(line) for judge in judges for line in _lines(judge)))
    # DVC does not know the results, which no stage makes
    print(
        f"wrote {results_path(root)}, from {len(sources)} file{'s' * (len(sources) > 1)}; "
        "`dvc repro --force --single-item report` shows it in the report"
    )
    try:
        for judge in judges:
            _log(tracking_uri(), plan, judge, sheets, cfg)
    except TrackError as error:
        print(
            f"pbe: warning: import-study: its results are written, but not logged to MLflow ({error}); later, the same "
            "command logs them",
            file=sys.stderr,
        )


# -- what is printed -------------------------------------------------------------------------------------------------


def _lines(judge: "JudgeResult") -> Iterator[str]:
    who = judge.judge if judge.human else f"{judge.judge} (no people)"
    for question, found in judge.questions.items():
        raters = f"{found.raters} rater{'s' * (found.raters > 1)}"
        yield f"{who}, {question}: {found.answers} rankings by {raters} of {found.items} items; 1 is best, [95 %]:"
        width = max(map(len, found.mean_rank))
        for name in sorted(found.mean_rank, key=lambda name: found.mean_rank[name].value):
            rank, chance = found.mean_rank[name], found.strength[name]
            yield f"  {name:{width}}  mean rank {_text(rank)}  chance to be first {_text(chance)}"
        yield f"  {_agreement(found)}"
    for question in judge.too_few:
        yield f"{who}, {question}: too few answers for numbers"
    for rater, reason in judge.left_out.items():
        yield f"{who}: rater {rater} left out: {reason}"
    if judge.incomplete:
        parts = ", ".join(f"{rater} ({done} of {asked} screens)" for rater, (done, asked) in judge.incomplete.items())
        yield f"{who}: not finished, but counted: rater {parts}"
    if judge.unchecked:
        yield f"{who}: without an answer to an attention screen: rater {', '.join(map(str, judge.unchecked))}"
    if judge.median_seconds is not None:
        yield f"{who}: median time of a ranking {judge.median_seconds:.1f} s"


def _agreement(found: "QuestionResult") -> str:
    parts = []
    if found.friedman_p is not None:
        parts.append(f"Friedman p {found.friedman_p:.2g} ({found.items} items)")
    if found.kendall_w is not None:
        parts.append(f"Kendall's W {found.kendall_w:.2f}")
    own = found.self_agreement
    if own is not None and own.tau is not None and own.same_first is not None:
        below = f", below 0 for rater {', '.join(map(str, own.below_chance))}" if own.below_chance else ""
        parts.append(
            f"with themselves tau {_text(own.tau)}{below}, same first {_text(own.same_first)} ({own.pairs} repeats)"
        )
    return "; ".join(parts) or "too few answers for agreement"


def _text(estimate: "Estimate") -> str:
    return f"{estimate.value:.2f} [{estimate.low:.2f}, {estimate.high:.2f}]"


# -- what MLflow gets ------------------------------------------------------------------------------------------------


def _log(uri: str, plan: "Plan", judge: "JudgeResult", sheets: "Sequence[Sheet]", cfg: "StatisticsConfig") -> None:
    """One run per method. The same answers are the same runs; more answers are new ones. Raises TrackError."""
    from pbe import track
    from pbe.store import digest

    answers = [[sheet.rater, sheet.rankings] for sheet in sheets if sheet.judge == judge.judge]
    statistics = cfg.model_dump(include={"resamples", "seed"})
    tags = {"part_of": "user_study", "plan": plan.digest, "judge": judge.judge}
    params = {
        "study": {
            "raters": judge.raters,
            "left_out": len(judge.left_out),
            **{
                f"{question}.{key}": getattr(found, key)
                for question, found in judge.questions.items()
                for key in ("answers", "raters", "items")
            },
            **statistics,
        }
    }
    for name in plan.methods.values():
        run = track.open_run(
            uri,
            name=f"study-{name}" if judge.human else f"study-{name}-by-{judge.judge}",
            identity={"digest": digest(["study", plan.digest, judge.judge, name, answers, statistics])},
            params=params,
            tags={**tags, "variant": name},
        )
        track.log_metrics(uri, run, _metrics(judge, name))
        track.end_run(uri, run)


def _metrics(judge: "JudgeResult", name: str) -> dict[str, float]:
    out: dict[str, float] = {}
    for question, found in judge.questions.items():
        estimates = {"mean_rank": found.mean_rank[name], "strength": found.strength[name]}
        estimates |= {f"wins_over/{other}": estimate for other, estimate in found.wins[name].items()}
        for key, estimate in estimates.items():
            prefix = f"study-{question}/{key}"
            out |= {prefix: estimate.value, f"{prefix}.low": estimate.low, f"{prefix}.high": estimate.high}
        for key, value in (("friedman_p", found.friedman_p), ("kendall_w", found.kendall_w)):
            if value is not None:
                out[f"study-{question}/{key}"] = value
    return out
