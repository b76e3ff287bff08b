"""What raters answered: JSON and CSV files, checked against the plan before a single number is made of them.

One bad file stops the whole import: the message lists the problems of all files. A rater who stopped early is taken
with what is there; of what a rater saved on the way and at the end, the fullest file counts. A file is refused if it is
torn, of a later version or of another plan, if it answers what its rater was not asked, or if it contradicts another
file of the same rater.
"""

import csv
import hashlib
import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from pbe.errors import UserError, one_line
from pbe.settings import Float, Int, Settings
from pbe.study.plan import Screen
from pbe.study.plan_file import Plan

FORMAT, VERSION = "pbe-study-answers", 1
HUMAN = "human"  # any other judge is a model or a script
COLUMNS = ("plan", "rater", "judge", "screen", "item", "role", "question", "shown", "seconds")
LISTED = 3  # problems of one file


class AnswersError(UserError):
    """Files of answers cannot be used; the message names each of them."""


class Answer(Settings):
    """One screen's ranking. shown: ids from left to right. ranking: the same ids, best first. seconds: spent on it."""

    screen: Int
    item: str
    role: Literal["item", "repeat", "attention"]
    question: str
    shown: tuple[str, ...]
    ranking: tuple[str, ...]
    seconds: Float = Field(ge=0)


class Sheet(Settings):
    """All answers of one rater. judge: HUMAN, or the name of a model or script. started, finished: ISO times."""

    rater: Int
    judge: str = Field(min_length=1, max_length=100)
    started: str | None = None
    finished: str | None = None
    answers: tuple[Answer, ...]

    @property
    def rankings(self) -> list[list[Any]]:
        """What was answered, screen by screen: equal for a rater's JSON and CSV."""
        return sorted([answer.screen, list(answer.ranking)] for answer in self.answers)

    def holds_all_of(self, other: "Sheet") -> bool:
        """Whether this is the same rater's sheet, saved later, or with the times that a CSV lacks."""
        ours, theirs = ({(answer.screen, answer.ranking) for answer in sheet.answers} for sheet in (self, other))
        return theirs < ours or (theirs == ours and (self.started is not None or other.started is None))


@dataclass(frozen=True)
class Source:
    """A file that was read."""

    file: str
    sha256: str


def read_answers(paths: Sequence[Path], plan: Plan) -> tuple[list[Sheet], list[Source]]:
    """Read files, and the .json and .csv files of folders. Returns each rater's sheet once, and the files.

    Raises AnswersError, with the problems of all files.
    """
    problems: list[str] = []
    sources: list[Source] = []
    known: dict[tuple[str, int], tuple[Path, Sheet]] = {}
    for path in dict.fromkeys(_files(paths)):
        try:
            data = path.read_bytes()
            found = _sheets(path, data, plan)
        except AnswersError as error:
            problems.append(f"{path}: {error}")
            continue
        except OSError as error:
            problems.append(f"{path}: cannot be read: {error.strerror}")
            continue
        sources.append(Source(path.name, hashlib.sha256(data).hexdigest()))
        for sheet in found:
            misfits = list(_misfits(sheet, plan))
            problems += [f"{path}: {problem}" for problem in misfits[:LISTED]]
            if len(misfits) > LISTED:
                problems.append(f"{path}: and {len(misfits) - LISTED} more")
            first, other = known.setdefault((sheet.judge, sheet.rater), (path, sheet))
            if sheet.holds_all_of(other):
                known[sheet.judge, sheet.rater] = path, sheet
            elif not other.holds_all_of(sheet):
                problems.append(f"{path}: other answers of rater {sheet.rater} are in {first}; keep one of the files")
    if problems:
        raise AnswersError(f"nothing is imported: {'; '.join(problems)}")
    return [sheet for _, (_, sheet) in sorted(known.items())], sources


def _files(paths: Sequence[Path]) -> Iterator[Path]:
    for path in paths:
        if path.is_dir():
            found = sorted(inner for inner in path.iterdir() if inner.suffix.lower() in (".json", ".csv"))
            if not found:
                raise AnswersError(f"{path}: no .json or .csv file in this folder")
            yield from found
        else:
            yield path


def _sheets(path: Path, data: bytes, plan: Plan) -> list[Sheet]:
    """Raises AnswersError, without the path."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise AnswersError(f"not a file of answers ({one_line(error, 100)})") from None
    raws = _raw_of_csv(text) if path.suffix.lower() == ".csv" else [_raw_of_json(text)]
    for raw in raws:
        if raw.pop("plan", None) != plan.digest:
            raise AnswersError(f"answers of another plan than {plan.digest}; give that one with --plan")
    try:
        return [Sheet.model_validate(raw) for raw in raws]
    except ValidationError as error:
        found = error.errors()[0]
        where = ".".join(map(str, found["loc"]))
        raise AnswersError(f"{where}: {found['msg']}") from None


def _raw_of_json(text: str) -> dict[str, Any]:
    try:
        raw = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise AnswersError(f"torn, or no JSON ({one_line(error, 100)}); ask its rater for the file again") from None
    if not isinstance(raw, dict) or raw.pop("format", None) != FORMAT:
        raise AnswersError("not a file of answers; leave it out")
    version = raw.pop("version", None)
    if version != VERSION:
        raise AnswersError(f"answers of version {version}, this program reads version {VERSION}; use a newer pbe")
    return raw


def _raw_of_csv(text: str) -> list[dict[str, Any]]:
    """One sheet for each judge and rater of the table; its rows may be in any order."""
    try:
        header, *rows = csv.reader(io.StringIO(text, newline=""), strict=True)
    except ValueError:
        raise AnswersError("empty; ask its rater for the file again") from None
    except csv.Error as error:
        raise AnswersError(f"torn, or no CSV ({error}); ask its rater for the file again") from None
    ranks = sorted((column for column in header if re.fullmatch(r"rank_\d+", column)), key=lambda name: int(name[5:]))
    if not ranks or sorted(header) != sorted([*COLUMNS, *ranks]):
        raise AnswersError(f"not a table of answers: its columns must be {', '.join(COLUMNS)}, rank_1, rank_2, ...")
    sheets: dict[tuple[str, str], dict[str, Any]] = {}
    for number, values in enumerate(rows, start=2):
        if not values:  # an empty line
            continue
        if len(values) != len(header):
            raise AnswersError(f"row {number}: {len(values)} of {len(header)} values; torn: ask its rater for it again")
        row = dict(zip(header, values, strict=True))
        plan, rater, judge = row.pop("plan"), row.pop("rater"), row.pop("judge")
        sheet = sheets.setdefault((judge, rater), {"plan": plan, "rater": rater, "judge": judge, "answers": []})
        if sheet["plan"] != plan:
            raise AnswersError(f"row {number}: plan {plan!r}, above {sheet['plan']!r}")
        ranking = [row.pop(column) for column in ranks]
        while ranking and not ranking[-1]:
            ranking.pop()
        sheet["answers"].append({**row, "shown": row["shown"].split(), "ranking": ranking})
    if not sheets:
        raise AnswersError("has no rows; leave it out")
    return list(sheets.values())


def _misfits(sheet: Sheet, plan: Plan) -> Iterator[str]:
    """What of a sheet does not fit the plan."""
    if sheet.judge != HUMAN and sheet.judge.strip().lower() == HUMAN:
        yield f"judge {sheet.judge!r}: people are {HUMAN!r}, written like this"
    screens = plan.screens_of(sheet.rater)
    if screens is None:
        yield f"rater {sheet.rater}: not in the plan, which has {len(plan.raters)}"
        return
    seen: set[int] = set()
    for answer in sheet.answers:
        if answer.screen in seen:
            yield f"rater {sheet.rater}, screen {answer.screen}: answered twice"
        seen.add(answer.screen)
        yield from (
            f"rater {sheet.rater}, screen {answer.screen}: {problem}" for problem in _misfit(answer, screens, plan)
        )


def _misfit(answer: Answer, screens: Mapping[int, Screen], plan: Plan) -> Iterator[str]:
    """What of an answer does not fit its screen: at most one line."""
    screen = screens.get(answer.screen)
    if screen is None:
        yield "not in the plan of this rater"
    elif answer.item not in plan.item_ids:
        yield f"item {answer.item!r}: not in the plan"
    elif (answer.item, answer.role, answer.question) != (screen.item, screen.role, screen.question):
        yield (
            f"is about {answer.item} ({answer.role}, {answer.question}); the plan asks about {screen.item} "
            f"({screen.role}, {screen.question})"
        )
    elif answer.shown != screen.shown:
        yield f"shown {' '.join(answer.shown)}; the plan shows {' '.join(screen.shown)}"
    elif sorted(answer.ranking) != sorted(answer.shown):
        yield f"ranking {' '.join(answer.ranking)} must name each of {' '.join(answer.shown)} once"
