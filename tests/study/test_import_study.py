"""`pbe import-study`: files in, results, table and MLflow runs out; and what of it the report shows."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pbe import track
from pbe.cli.__main__ import main
from pbe.evaluate.settings import StatisticsConfig
from pbe.store import File, Record, make_manifest, save_manifest
from pbe.study.analysis import analyse
from pbe.study.answers import read_answers
from pbe.study.plan_file import load_plan
from pbe.study.results import ResultsError, results_path, save_results
from pipelines import report
from pipelines.reporting.user_study import user_study
from tests.study.plans import answers, csv_text, small_plan, write_json

METHODS = ("full", "copy_paste", "poisson")
MADE = {
    name: make_manifest(
        "edit", config={}, version=1, units=[Record(name, (File("edits", f"parts/edit/{name}/e", 1, 1, name),), {})]
    )
    for name in METHODS
}
BEST, WORST = METHODS, METHODS[::-1]


@pytest.fixture
def plan() -> dict[str, Any]:
    return small_plan(raters=4, edits={name: manifest.digest for name, manifest in MADE.items()})


@pytest.fixture
def root(tmp_path: Path, plan: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with edits, a plan, and the answers of four people, one of them inattentive, and of a model."""
    root = tmp_path / "root"
    monkeypatch.setattr("pbe.places.repo_root", lambda: root)
    write_json(root / "data" / "study" / "plan.json", plan)
    for name, manifest in MADE.items():
        save_manifest(root / "data" / "edit" / name / "manifest.json", manifest)
    people = [answers(plan, rater, lambda *_: BEST) for rater in (1, 2, 3, 4)]
    for answer in people[1]["answers"]:
        if answer["role"] == "attention":
            answer["ranking"].reverse()
    del people[2]["answers"][2:]
    write_json(root / "in" / "1.json", people[0])
    (root / "in" / "2.csv").write_text(csv_text(people[1]))
    write_json(root / "in" / "3.json", people[2])
    write_json(root / "in" / "4.json", people[3])
    write_json(root / "in" / "model.json", answers(plan, 1, lambda *_: WORST, judge="a-vlm"))
    return root


def _import(root: Path) -> int:
    return main(["import-study", str(root / "in")])


def _results(root: Path) -> dict[str, Any]:
    return json.loads((root / "data" / "study-results.json").read_text())


def _runs(uri: str) -> dict[str, Any]:
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    found = client.search_runs([client.get_experiment_by_name(track.EXPERIMENT).experiment_id])
    assert len({run.info.run_name for run in found}) == len(found)
    return {run.info.run_name: run for run in found}


def test_it_writes_results_and_says_whose_they_are(
    root: Path, plan: dict[str, Any], mlflow_uri: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _import(root) == 0
    said, warned = capsys.readouterr()
    assert warned == ""
    for line in (
        "human, quality: 7 rankings by 3 raters of 3 items; 1 is best, [95 %]:",
        "  full        mean rank 1.00 [1.00, 1.00]  chance to be first 0.",
        "human: rater 2 left out: ranked the absurd picture above another, 1 of 1 times",
        "human: not finished, but counted: rater 3 (2 of 9 screens)",
        "human: without an answer to an attention screen: rater 3",
        "with themselves tau 1.00 [1.00, 1.00], same first 1.00 [1.00, 1.00] (2 repeats)",
        "a-vlm (no people), consistency: 3 rankings by 1 rater of 3 items",
        "from 5 files; `dvc repro --force --single-item report` shows it in the report",
    ):
        assert line in said
    found = _results(root)
    assert found["plan"] == plan["digest"] and found["edits"] == plan["edits"]
    assert [source["file"] for source in found["inputs"]] == ["1.json", "2.csv", "3.json", "4.json", "model.json"]
    people, model = found["judges"]
    assert people["questions"]["quality"]["mean_rank"]["full"]["value"] == 1
    assert model["questions"]["quality"]["mean_rank"]["full"]["value"] == 3


def test_mlflow_has_a_run_per_method_and_judge_also_after_it_is_repeated(root: Path, mlflow_uri: str) -> None:
    assert _import(root) == 0
    first = _runs(mlflow_uri)
    assert first.keys() == {f"study-{name}{of}" for name in METHODS for of in ("", "-by-a-vlm")}
    run = first["study-copy_paste"]
    assert run.info.status == "FINISHED"
    assert run.data.tags["part_of"] == "user_study" and run.data.tags["judge"] == "human"
    assert run.data.tags["plan"] == _results(root)["plan"] and run.data.tags["variant"] == "copy_paste"
    assert run.data.params["study.raters"] == "4" and run.data.params["study.quality.answers"] == "7"
    estimate = _results(root)["judges"][0]["questions"]["quality"]["mean_rank"]["copy_paste"]
    for key, value in (("", estimate["value"]), (".low", estimate["low"]), (".high", estimate["high"])):
        assert run.data.metrics[f"study-quality/mean_rank{key}"] == pytest.approx(value)
    assert run.data.metrics["study-consistency/wins_over/poisson"] == 1
    assert first["study-copy_paste-by-a-vlm"].data.tags["judge"] == "a-vlm"
    (root / "in" / "1.csv").write_text(csv_text(json.loads((root / "in" / "1.json").read_text())))  # nothing new
    assert _import(root) == 0
    again = _runs(mlflow_uri)
    assert {name: run.info.run_id for name, run in again.items()} == {
        name: run.info.run_id for name, run in first.items()
    }


def test_an_mlflow_that_is_away_costs_a_line(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    assert _import(root) == 0
    warned = capsys.readouterr().err
    assert warned.count("\n") == 1 and "results are written, but not logged to MLflow (MLFLOW_TRACKING_URI=" in warned
    assert len(_results(root)["judges"]) == 2


def test_bad_answers_leave_the_results_as_they_were(
    root: Path, mlflow_uri: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _import(root) == 0
    before, runs = _results(root), len(_runs(mlflow_uri))
    (root / "in" / "torn.json").write_text('{"format": "\x1b[2J')
    (root / "in" / "other.json").write_text("{}")
    capsys.readouterr()
    assert _import(root) == 1
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1
    assert "pbe: error: nothing is imported: " in said.err and "torn.json" in said.err and "other.json" in said.err
    assert _results(root) == before and len(_runs(mlflow_uri)) == runs
    assert main(["import-study", str(root / "in"), "--plan", str(root / "no.json")]) == 1
    assert "no.json: not there; run `dvc repro study` first" in capsys.readouterr().err


# -- the report ------------------------------------------------------------------------------------------------------


def _save(root: Path) -> None:
    cfg = StatisticsConfig(resamples=100)
    plan = load_plan(root / "data" / "study" / "plan.json")
    sheets, sources = read_answers([root / "in"], plan)
    judges = analyse(plan, sheets, resamples=cfg.resamples, seed=cfg.seed)
    save_results(results_path(root), plan, sources, judges, cfg)


def _html(root: Path) -> str:
    page = report.page_environment().get_template("user_study.html.j2")
    return page.render(user_study=user_study(root, METHODS), colours={name: n for n, name in enumerate(METHODS)})


def test_the_report_shows_people_and_models_apart(root: Path) -> None:
    assert _html(root).strip() == ""  # nothing imported yet
    _save(root)
    html = " ".join(_html(root).split())
    people, model = html.split("no people</span>")
    assert re.search(r"[a-z]\.[A-Z]", html) is None  # Jinja joins lines
    assert people.index("mean rank, quality") < people.index("mean rank, consistency")
    assert people.index("v0") < people.index("v1") < people.index("v2")  # the best first
    for text in (
        "1.00 [1.00, 1.00]",
        "People ranked",
        "Quality: 7 rankings by 3 raters of 3 items.",
        "rater 2, who ranked the absurd picture above another, 1 of 1 times.",
        "rater 3 (2 of 9 screens).",
        "Without an answer to an attention screen: rater 3.",
        "Median time of a ranking: 2.5 s.",
        "in 2 repeated rankings: Kendall's tau 1.00 [1.00, 1.00], same first 1.00 [1.00, 1.00].",
    ):
        assert text in people
    assert "<strong>a-vlm</strong>" in people and "not pooled" in model
    assert model.index("v2") < model.index("v1") < model.index("v0") and "none of 1 rater." in model
    assert "5 files of answers" in model and "of 3 items; the intervals are over items alone." in model


def _plan_drawn_again(root: Path) -> None:
    write_json(root / "data" / "study" / "plan.json", small_plan(raters=5))


def _edits_made_again(root: Path) -> None:
    save_manifest(root / "data" / "edit" / "full" / "manifest.json", MADE["poisson"])


def _plan_gone(root: Path) -> None:
    (root / "data" / "study" / "plan.json").unlink()


def _edits_gone(root: Path) -> None:
    (root / "data" / "edit" / "full" / "manifest.json").unlink()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_plan_drawn_again, "its answers are of an earlier plan"),
        (_edits_made_again, "its answers are about earlier edits of full"),
        (_plan_gone, "its plan is not there"),
        (_edits_gone, "the edits of full are not there"),
    ],
)
def test_answers_about_other_edits_give_a_line_and_no_number(
    root: Path, change: Callable[[Path], None], said: str
) -> None:
    _save(root)
    change(root)
    html = _html(root)
    assert f"left out: {said}." in html and "<table" not in html and "[95 % interval]" not in html


def test_a_method_that_is_gone_from_params_yaml_and_a_damaged_file(root: Path) -> None:
    _save(root)
    shown = user_study(root, ("full", "copy_paste"))
    assert shown is not None and shown["outdated"] == "params.yaml no longer has poisson" and shown["judges"] == []
    (root / "data" / "study-results.json").write_text("{")
    with pytest.raises(
        ResultsError, match=r"study-results.json: damaged .*; delete it, or run `pbe import-study` again"
    ):
        user_study(root, METHODS)
