"""Files of answers: what is read, and what is refused, by name, before anything is computed."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pbe.store import digest
from pbe.study.answers import AnswersError, read_answers
from pbe.study.plan_file import Plan, PlanError, load_plan
from tests.study.plans import answers, csv_text, small_plan, write_json

RAW = small_plan()
ITEM, OTHER = (RAW["raters"][0]["screens"][screen]["item"] for screen in (3, -3))  # of the second answer, and not
ORDER = ("full", "poisson", "copy_paste")


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    return load_plan(write_json(tmp_path / "plan.json", RAW))


def sheet(rater: int = 1, judge: str = "human") -> dict[str, Any]:
    return answers(RAW, rater, lambda item, question, rater: ORDER, judge=judge)


# -- what is read ----------------------------------------------------------------------------------------------------


def test_a_folder_of_both_formats_gives_each_rater_once(tmp_path: Path, plan: Plan) -> None:
    folder = tmp_path / "answers"
    write_json(folder / "a.json", sheet(1))
    (folder / "b.csv").write_text("\ufeff" + csv_text(sheet(2)), encoding="utf-8")  # as Excel saves it
    (folder / "c.csv").write_text(csv_text(sheet(1)))  # the table of a.json
    write_json(folder / "d.json", sheet(1, judge="some-vlm"))  # another judge on the plan of rater 1
    (folder / "notes.txt").write_text("not looked at")
    sheets, sources = read_answers([folder, folder / "a.json"], plan)
    assert [(found.judge, found.rater) for found in sheets] == [("human", 1), ("human", 2), ("some-vlm", 1)]
    assert [source.file for source in sources] == ["a.json", "b.csv", "c.csv", "d.json"]
    assert sheets[1].rankings == [[a["screen"], a["ranking"]] for a in sheet(2)["answers"]]
    assert {answer.seconds for answer in sheets[1].answers} == {2.5}


def test_a_table_of_several_raters_in_any_order(tmp_path: Path, plan: Plan) -> None:
    header, *first = csv_text(sheet(1)).splitlines()
    rows = [*csv_text(sheet(2)).splitlines()[1:], *first]
    (tmp_path / "all.csv").write_text("\n\n".join([header, *rows[::-1]]))
    sheets, _ = read_answers([tmp_path / "all.csv"], plan)
    assert [len(found.answers) for found in sheets] == [len(first)] * 2


def test_a_rater_who_stopped_is_taken_with_what_is_there(tmp_path: Path, plan: Plan) -> None:
    stopped = {**sheet(), "answers": sheet()["answers"][:3], "finished": None}
    (found,), _ = read_answers([write_json(tmp_path / "a.json", stopped)], plan)
    assert len(found.answers) == 3 and found.finished is None


# -- what is refused -------------------------------------------------------------------------------------------------


def _change(raw: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Changes of the file, or with a leading `answer_` of its second answer."""
    for key, value in changes.items():
        if key.startswith("answer_"):
            raw["answers"][1][key.removeprefix("answer_")] = value
        else:
            raw[key] = value
    return raw


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"format": "pbe-study-plan"}, "not a file of answers"),
        ({"version": 2}, "answers of version 2, this program reads version 1; use a newer pbe"),
        ({"plan": "0123"}, f"answers of another plan than {RAW['digest']}"),
        ({"rater": 99}, "rater 99: not in the plan, which has 3"),
        ({"rater": 2}, r"rater 2, screen \d+: "),  # the pictures of another rater's plan
        ({"judge": "Human"}, "judge 'Human': people are 'human'"),
        ({"judge": ""}, "judge: String should have at least 1 character"),
        ({"surprise": 1}, "surprise: Extra inputs are not permitted"),
        ({"answer_seconds": -1}, "answers.1.seconds: Input should be greater than or equal to 0"),
        ({"answer_seconds": float("nan")}, "answers.1.seconds"),
        ({"answer_role": "practice"}, "answers.1.role"),
        ({"answer_screen": 77}, "rater 1, screen 77: not in the plan of this rater"),
        (
            {"answer_screen": 0},
            f"rater 1, screen 0: is about {ITEM} .item, consistency.; the plan asks about item. .practice",
        ),
        ({"answer_screen": 2}, "rater 1, screen 2: answered twice"),
        ({"answer_item": "item9"}, "rater 1, screen 3: item 'item9': not in the plan"),
        ({"answer_item": OTHER}, f"screen 3: is about {OTHER} .item, consistency.; the plan asks about {ITEM}"),
        ({"answer_question": "quality"}, f"screen 3: is about {ITEM} .item, quality."),
        ({"answer_shown": ["m1", "m2", "m9"]}, "screen 3: shown m1 m2 m9; the plan shows"),
        ({"answer_ranking": ["m1", "m2"]}, "screen 3: ranking m1 m2 must name each of"),
        ({"answer_ranking": ["m1", "m2", "m2"]}, "screen 3: ranking m1 m2 m2 must name each of"),
        ({"answer_ranking": ["m1", "m2", "absurd"]}, "screen 3: ranking m1 m2 absurd must name each of"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused_by_name(tmp_path: Path, plan: Plan, changes: dict[str, Any], said: str) -> None:
    path = write_json(tmp_path / "bad.json", _change(sheet(), **changes))
    with pytest.raises(AnswersError, match=rf"^nothing is imported: {path}: .*{said}"):
        read_answers([path], plan)


def _cut(text: str) -> str:
    return text[: len(text) * 2 // 3]


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("a.json", lambda: _cut(json.dumps(sheet())), "torn, or no JSON"),
        ("a.json", lambda: "", "torn, or no JSON"),
        ("a.json", lambda: "[" * 100_000, "torn, or no JSON"),
        ("a.json", lambda: "[]", "not a file of answers"),
        ("a.csv", lambda: csv_text(sheet())[:-7], "row 10: 11 of 12 values; torn"),
        ("a.csv", lambda: "", "empty"),
        ("a.csv", lambda: csv_text(sheet()).splitlines()[0], "has no rows"),
        ("a.csv", lambda: csv_text(sheet()).replace(",", ";"), "not a table of answers: its columns must be plan,"),
        ("a.csv", lambda: csv_text(sheet()).replace("seconds", "minutes"), "not a table of answers"),
        ("a.csv", lambda: csv_text(sheet()).replace(RAW["digest"], "0123"), "answers of another plan"),
        ("a.csv", lambda: csv_text(sheet()).replace(RAW["digest"], "0123", 1), "row 3: plan '.*', above '0123'"),
        ("a.csv", lambda: csv_text(sheet()).replace(f",2,{ITEM}", f",two,{ITEM}"), "answers.0.screen: .*valid integer"),
        ("a.csv", lambda: csv_text(sheet()) + 'x,"', "torn, or no CSV"),
    ],
)
def test_torn_files_and_other_formats_are_refused(
    tmp_path: Path, plan: Plan, name: str, change: Callable[[], str], said: str
) -> None:
    path = tmp_path / name
    path.write_text(change())
    with pytest.raises(AnswersError, match=said):
        read_answers([path], plan)


def test_bytes_that_are_no_text_are_refused(tmp_path: Path, plan: Plan) -> None:
    (tmp_path / "a.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(AnswersError, match="not a file of answers"):
        read_answers([tmp_path / "a.csv"], plan)


@pytest.mark.parametrize("names", [("early.json", "late.csv"), ("late.json", "early.csv")])
def test_of_the_files_that_a_rater_saved_the_fullest_counts(tmp_path: Path, plan: Plan, names: tuple[str, str]) -> None:
    early, late = sheet(), sheet()
    early["answers"], early["finished"] = early["answers"][:2], None
    for name in names:
        saved = early if name.startswith("early") else late
        (tmp_path / name).write_text(csv_text(saved) if name.endswith("csv") else json.dumps(saved))
    [read], sources = read_answers([tmp_path / name for name in names], plan)
    assert len(read.answers) == len(late["answers"]) > 2 and len(sources) == 2


def test_a_rater_with_two_files_that_differ_is_refused_with_both_names(tmp_path: Path, plan: Plan) -> None:
    first, second = write_json(tmp_path / "first.json", sheet()), tmp_path / "second.csv"
    changed = sheet()
    changed["answers"][0]["ranking"].reverse()
    second.write_text(csv_text(changed))
    with pytest.raises(AnswersError, match=rf"{second}: other answers of rater 1 are in {first}"):
        read_answers([first, second], plan)


def test_all_problems_of_all_files_are_in_one_message(tmp_path: Path, plan: Plan) -> None:
    write_json(tmp_path / "in" / "good.json", sheet(1))
    changed = sheet(2)
    for answer in changed["answers"]:
        answer["ranking"] = ["m1"]
    write_json(tmp_path / "in" / "bad.json", changed)
    (tmp_path / "in" / "torn.json").write_text("{")
    with pytest.raises(AnswersError) as error:
        read_answers([tmp_path / "in", tmp_path / "away.csv"], plan)
    said = str(error.value)
    assert said.count("bad.json: rater 2, screen") == 3 and "bad.json: and 6 more" in said
    assert "torn.json: torn" in said and "away.csv: cannot be read: No such file" in said and "good" not in said
    (tmp_path / "empty").mkdir()
    with pytest.raises(AnswersError, match=r"empty: no \.json or \.csv file"):
        read_answers([tmp_path / "empty"], plan)


# -- the plan --------------------------------------------------------------------------------------------------------


def _again(**changes: Any) -> dict[str, Any]:
    plan = {**{key: value for key, value in RAW.items() if key != "digest"}, **changes}
    return {**plan, "digest": digest(plan)}


def _half_shown() -> dict[str, Any]:
    plan = small_plan()
    plan["raters"][1]["screens"][2]["shown"].pop()
    return _again(raters=plan["raters"])


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        ({**RAW, "bench": "other"}, "changed since it was written"),
        (_again(version=2), "a plan of version 2; this program reads version 1"),
        (_again(format="other"), "not the plan of a study"),
        ([], "not the plan of a study"),
        (_again(raters="many"), "raters: .*dvc repro -f -s study"),
        (_again(raters=[]), "has no raters"),
        (_half_shown(), "rater 2, screen 2: shows 2 of 3 methods"),
    ],
)
def test_a_plan_that_cannot_be_used_is_refused(tmp_path: Path, raw: Any, said: str) -> None:
    with pytest.raises(PlanError, match=said):
        load_plan(write_json(tmp_path / "plan.json", raw))


def test_a_plan_that_is_missing_or_torn(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="dvc repro study"):
        load_plan(tmp_path / "plan.json")
    (tmp_path / "plan.json").write_text(_cut(json.dumps(RAW)))
    with pytest.raises(PlanError, match="not a plan"):
        load_plan(tmp_path / "plan.json")
