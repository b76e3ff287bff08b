"""The page of a user study in a real browser: a rater ranks by keys and by drag, goes away, comes back, saves files."""

import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pbe.study.answers import read_answers
from pbe.study.page import Item, absurd_picture, encode_item, render
from pbe.study.plan import ABSURD, make_plan
from pbe.study.plan_file import load_plan
from pbe.study.settings import StudyConfig
from tests.study.plans import write_json

pytestmark = [pytest.mark.browser, pytest.mark.timeout(120)]

METHODS = ("bottleneck", "untrained", "copy_paste", "poisson", "sd_inpaint")
SIDE_PX = 48


@pytest.fixture(scope="module")
def plan() -> dict[str, Any]:
    cfg = StudyConfig(items=3, raters=4, repeats=1)
    ids = ["a</script>b", "@script@", 'comma,"quote"', "d", "e"]  # ids come from the names of photos
    return make_plan(cfg, seed=5, bench="b" * 64, edits={name: f"edits of {name}" for name in METHODS}, bench_ids=ids)


@pytest.fixture(scope="module")
def page_file(plan: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(3)

    def picture() -> np.ndarray:
        return np.broadcast_to(rng.integers(0, 256, 3, np.uint8), (SIDE_PX, SIDE_PX, 3)).copy()

    pictures = {}
    for entry in plan["items"]:
        edits = {name: picture() for name in plan["methods"]} | {ABSURD: absurd_picture(SIDE_PX, SIDE_PX)}
        hole_mask = np.zeros((SIDE_PX, SIDE_PX), np.uint8)
        hole_mask[10:30, 10:30] = 1
        pictures[entry["item"]] = encode_item(Item(picture(), hole_mask, picture(), edits), picture_px=32)
    file = tmp_path_factory.mktemp("study page") / "study.html"
    file.write_text(render(plan, pictures), encoding="utf-8")
    return file


class Rater:
    """One person at one page."""

    def __init__(self, context: Any, file: Path, number: int, plan: dict[str, Any]) -> None:
        self.screens = plan["raters"][number - 1]["screens"]
        self.number, self.requests, self.troubles = number, [], []  # type: ignore[var-annotated]
        self.page = context.new_page()
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("console", lambda message: self.troubles.append(message.text))
        self.page.on("pageerror", lambda error: self.troubles.append(str(error)))
        self.page.goto(f"{file.as_uri()}#rater={number}")
        self.page.get_by_role("button", name="Start").click()

    def sees(self, screen: int) -> None:
        """Wait for this screen of the plan."""
        place = "Practice" if self.screens[screen]["role"] == "practice" else f"{screen - 1} of {len(self.screens) - 2}"
        self.page.locator("#where", has_text=re.compile(f"^{place}$")).wait_for()
        question = "Image quality" if self.screens[screen]["question"] == "quality" else "Consistency"
        assert self.page.locator("#question").inner_text().startswith(question)

    @property
    def ranked(self) -> list[str]:
        """Letters by place; empty places as ''."""
        texts = self.page.locator(".place").all_inner_texts()
        return [text.partition(": ")[2].strip() for text in texts]

    def type(self, keys: str) -> None:
        for key in keys.split():
            self.page.keyboard.press(key)

    def drag(self, letter: str, rank: int) -> None:
        """Carry the picture from its letter to a place."""
        start = self.page.locator(".card", has=self.page.locator(".grip", has_text=letter)).bounding_box()
        end = self.page.locator(".place").nth(rank - 1).bounding_box()
        mouse = self.page.mouse
        mouse.move(start["x"] + start["width"] / 2, start["y"] + 12)
        mouse.down()
        mouse.move(start["x"] + start["width"] / 2, start["y"] + 60, steps=3)
        mouse.move(end["x"] + end["width"] / 2, end["y"] + end["height"] / 2, steps=3)
        mouse.up()

    def save(self, form: str, where: Path) -> Path:
        with self.page.expect_download() as started:
            self.page.locator(f"[data-save={form}]:visible").click()
        target = where / started.value.suggested_filename
        started.value.save_as(target)
        return target


@pytest.fixture
def context(chromium: Any) -> Iterator[Any]:
    context = chromium.new_context(viewport={"width": 1280, "height": 900}, accept_downloads=True)
    context.set_default_timeout(20_000)
    yield context
    context.close()


def test_a_rater_ranks_by_keys_and_drag_goes_away_comes_back_and_saves_both_files(
    context: Any, page_file: Path, plan: dict[str, Any], tmp_path: Path
) -> None:
    rater = Rater(context, page_file, 3, plan)
    expected = []  # letters by place, of each screen
    half = len(rater.screens) // 2
    for screen in range(half):
        rater.sees(screen)
        if screen % 2:
            for rank, letter in enumerate("DBEAC", 1):
                rater.drag(letter, rank)
            expected.append("DBEAC")
        else:
            rater.type("3 1 5 2 4")  # the place of A, of B, ...
            expected.append("BDAEC")
        assert rater.ranked == list(expected[-1])
        rater.type("Enter")
    rater.sees(half)
    rater.type("2")  # an unfinished screen is kept too
    rater.page.close()

    again = Rater(context, page_file, 3, plan)
    again.sees(half)
    assert again.ranked == ["", "A", "", "", ""]
    again.type("r")
    for screen in range(half, len(rater.screens)):
        again.sees(screen)
        again.type("5 4 3 2 1 Enter")
        expected.append("EDCBA")
    again.page.get_by_role("heading", name="Thank you").wait_for()
    told = json.loads(again.save("json", tmp_path).read_text())
    with again.save("csv", tmp_path).open(newline="") as stream:
        lines = list(csv.DictReader(stream))
    (sheet,), sources = read_answers(
        sorted(tmp_path.iterdir()), load_plan(write_json(tmp_path / "p" / "plan.json", plan))
    )
    assert len(sources) == 2 and len(sheet.answers) == len(told["answers"])  # `pbe import-study` takes both, as one
    assert not rater.troubles and not again.troubles
    asked_for = {url.partition("#")[0] for url in rater.requests + again.requests}
    assert {url for url in asked_for if not url.startswith(("data:", "blob:"))} == {page_file.as_uri()}

    head = {key: told[key] for key in ("format", "version", "plan", "rater", "judge")}
    assert head == {
        "format": "pbe-study-answers",
        "version": 1,
        "plan": plan["digest"],
        "rater": 3,
        "judge": "human",
    }
    assert told["started"] < told["finished"] and told.keys() == {*head, "started", "finished", "answers"}
    asked = [screen for screen in rater.screens if screen["role"] != "practice"]
    assert [{key: one[key] for key in asked[0]} for one in told["answers"]] == asked
    for one, letters in zip(told["answers"], expected[2:], strict=True):
        assert one["ranking"] == [one["shown"]["ABCDE".index(letter)] for letter in letters]
        assert 0 <= one["seconds"] < 120 and one.keys() == {*asked[0], "ranking", "seconds"}
    ranks = [f"rank_{place}" for place in range(1, 6)]
    assert sum(one["seconds"] for one in told["answers"]) > 0  # one alone may be typed in less than 0.05 s
    columns = ["plan", "rater", "judge", "screen", "item", "role", "question", *ranks, "shown", "seconds"]
    assert list(lines[0]) == columns
    for line, one in zip(lines, told["answers"], strict=True):
        assert [line[rank] for rank in ranks] == one["ranking"]
        assert line["shown"].split(" ") == one["shown"] and float(line["seconds"]) == one["seconds"]
        assert (line["plan"], line["rater"], line["judge"]) == (plan["digest"], "3", "human")
        assert (line["screen"], line["item"]) == (str(one["screen"]), one["item"])
        assert (line["role"], line["question"]) == (one["role"], one["question"])


def test_no_ties_undo_reset_and_one_screen_back(context: Any, page_file: Path, plan: dict[str, Any]) -> None:
    rater = Rater(context, page_file, 1, plan)
    page = rater.page
    next_, back, undo = (page.locator(f"#screen [data-do={name}]") for name in ("next", "back", "undo"))
    assert back.is_disabled() and undo.is_disabled() and next_.is_disabled()
    for letter in "AB":
        page.locator(".card", has_text=letter).click()
    assert rater.ranked == ["A", "B", "", "", ""]
    rater.drag("C", 1)  # the others make way
    assert rater.ranked == ["C", "A", "B", "", ""]
    page.locator(".card", has_text="A").click()  # off again
    assert rater.ranked == ["C", "", "B", "", ""]
    rater.type("u u")
    assert rater.ranked == ["A", "B", "", "", ""]
    page.locator(".place").first.click()
    assert rater.ranked == ["", "B", "", "", ""]
    rater.type("Enter")  # not complete: the screen stays
    rater.sees(0)
    rater.type("r 1 2 3 4 5")
    next_.click()
    rater.sees(1)
    back.click()
    rater.sees(0)
    assert rater.ranked == list("ABCDE") and back.is_disabled()
    rater.type("Enter 1 2 3 4 5 Enter")
    rater.sees(2)
    rater.type("b b")  # only the last answer may be changed
    rater.sees(1)
    assert not rater.troubles


def test_zoom_shows_all_results_at_the_same_place_and_ranks_nothing(
    context: Any, page_file: Path, plan: dict[str, Any]
) -> None:
    rater = Rater(context, page_file, 1, plan)
    rater.type("z")
    box = rater.page.locator(".card .frame").nth(2).bounding_box()
    rater.page.mouse.click(box["x"] + 0.25 * box["width"], box["y"] + 0.75 * box["height"])
    places = rater.page.evaluate(
        """() => [...document.querySelectorAll(".card img, #photo")].map((image) => {
          const { transform, transformOrigin } = getComputedStyle(image);
          const [x, y] = transformOrigin.split(" ").map(parseFloat);
          return [transform, Math.round(100 * x / image.offsetWidth), Math.round(100 * y / image.offsetHeight)];
        })"""
    )
    assert len(places) == 6 and all(place == ["matrix(3, 0, 0, 3, 0, 0)", 25, 75] for place in places)
    assert rater.ranked == [""] * 5
    rater.type("Escape")
    rater.page.locator(".card").nth(2).click()
    assert rater.ranked == ["C", "", "", "", ""]


def test_nobody_learns_whose_a_picture_is(context: Any, page_file: Path, plan: dict[str, Any]) -> None:
    text = page_file.read_text()
    assert not [name for name in METHODS if re.search(rf"\b{name}\b", text)]
    rater = Rater(context, page_file, 2, plan)
    shown = rater.page.locator("main").inner_html()
    assert not re.search(r"\bm[1-5]\b|absurd", re.sub(r"data:image[^\"]*", "", shown))


def test_raters_of_one_browser_have_answers_of_their_own_and_other_numbers_are_refused(
    context: Any, page_file: Path, plan: dict[str, Any]
) -> None:
    first = Rater(context, page_file, 1, plan)
    first.type("1 2 3 4 5 Enter")
    first.sees(1)
    second = Rater(context, page_file, 2, plan)
    second.sees(0)
    assert second.ranked == [""] * 5
    page = context.new_page()
    page.goto(f"{page_file.as_uri()}#rater=5")
    page.get_by_role("button", name="Start").click()
    assert page.locator("#welcome").is_visible() and page.locator("#rater").evaluate("one => !one.validity.valid")


def test_a_phone_has_no_sideways_scroll_and_a_finger_carries_a_picture_by_its_letter(
    chromium: Any, page_file: Path, plan: dict[str, Any]
) -> None:
    context = chromium.new_context(viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True)
    context.set_default_timeout(20_000)
    rater = Rater(context, page_file, 1, plan)
    assert rater.page.evaluate("() => document.documentElement.scrollWidth") <= 360
    rater.page.locator(".card").nth(2).tap()
    rater.page.locator(".place.full").wait_for()
    assert rater.ranked == ["C", "", "", "", ""]
    session = context.new_cdp_session(rater.page)

    def touch(kind: str, *points: tuple[float, float]) -> None:
        fingers = [{"x": x, "y": y} for x, y in points]
        session.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": fingers})

    rater.page.evaluate("() => scrollTo(0, 0)")  # the tap has scrolled
    grip = rater.page.locator(".card .grip").nth(1).bounding_box()
    end = rater.page.locator(".place").nth(3).bounding_box()
    start = grip["x"] + grip["width"] / 2, grip["y"] + grip["height"] / 2
    touch("touchStart", start)
    touch("touchMove", (start[0], start[1] + 30))
    touch("touchMove", (end["x"] + 10, end["y"] + 10))
    touch("touchEnd")
    rater.page.locator(".place.full").nth(1).wait_for()
    assert rater.ranked == ["C", "", "", "B", ""]
    rater.page.evaluate("() => scrollTo(0, document.body.scrollHeight)")
    assert rater.page.locator("#places").bounding_box()["y"] < 740  # the places stay in sight
    context.close()


def test_a_browser_that_keeps_nothing_says_so(context: Any, page_file: Path, plan: dict[str, Any]) -> None:
    context.add_init_script(
        "Storage.prototype.setItem = () => { throw new DOMException('full', 'QuotaExceededError') }"
    )
    rater = Rater(context, page_file, 1, plan)
    rater.type("1")
    assert "Save them before you close the page" in rater.page.locator("#trouble").inner_text()
