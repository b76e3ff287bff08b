"""`pbe edit --table`: every good row is edited once, every bad one is a line, and a killed run goes on."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pbe.cli.__main__ import main
from pbe.data import images
from pbe.edit import Editor
from pbe.places import repo_root
from pbe.recipe import is_same, read_recipe

ROW = {"photo": "photo.png", "box": "8,5,25,15", "reference": "reference.png"}


@pytest.fixture
def folder(
    tmp_path: Path, model_folder: Path, edit_pictures: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> Path:
    """photo.png, mask.png, reference.png and small.png, beside models/tiny."""
    for name, image in (*edit_pictures.items(), ("small", edit_pictures["mask"][:9, :9])):
        (tmp_path / f"{name}.png").write_bytes(images.encode_png(image))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    columns = sorted({column for row in rows for column in row})
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, columns)
        writer.writeheader()
        writer.writerows(rows)


def _run(*options: str, table: str = "edits.csv", model: str = "models/tiny") -> int:
    return main(["edit", "--table", table, "--model", model, "--steps", "2", "--out", "out", *options])


def _lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "out" / "edits.jsonl").read_text().splitlines()]


def _pngs(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "out").glob("*.png")}


def test_all_kinds_of_tables_give_the_edits_that_single_calls_give(folder: Path) -> None:
    rows: list[dict[str, Any]] = [
        {**ROW, "name": "one", "seed": 3},
        {"photo": "photo.png", "mask": "mask.png", "reference": "reference.png", "name": "two", "scale": 2.5},
        {**ROW, "reference_box": "2,3,20,30", "n": 2, "seed": 7, "name": "three"},
    ]
    _write(folder / "edits.csv", rows)
    (folder / "edits.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    pq.write_table(
        pa.Table.from_pylist([{column: None for r in rows for column in r} | row for row in rows]), "a.parquet"
    )
    made = []
    for table in ("edits.csv", "edits.jsonl", "a.parquet"):
        assert _run("--out", table[:3], table=table) == 0
        made.append({path.name: path.read_bytes() for path in (folder / table[:3]).glob("*.png")})
        (folder / table[:3]).rename(folder / f"{table}.out")
    assert sorted(made[0]) == ["one.png", "three-seed-7.png", "three-seed-8.png", "two.png"]
    assert made[0] == made[1] == made[2]
    single = ["--model", "models/tiny", "--steps", "2", "--out", "single.png"]
    given = ["--mask", "mask.png", "--reference", "reference.png", "--scale", "2.5"]
    assert main(["edit", "photo.png", *given, *single]) == 0
    np.testing.assert_array_equal(images.decode(made[0]["two.png"]), images.decode(Path("single.png").read_bytes()))


def test_a_bad_row_is_a_line_and_costs_no_other(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "empty.png").touch()
    bad = {
        "photo: is missing": {**ROW, "photo": ""},
        "gone.png: No such file": {**ROW, "photo": "gone.png"},
        "empty.png: empty file": {**ROW, "reference": "empty.png"},
        "small.png is 9 x 9 px, the photo 40 x 24": {**ROW, "box": "", "mask": "small.png"},
        "mask, box: give one of the two": {**ROW, "mask": "mask.png"},
        "is not inside its 40 x 24 px": {**ROW, "box": "8,5,99,15"},
        "box = '8,5,8,15': must be": {**ROW, "box": "8,5,8,15"},
        "covers the whole photo": {**ROW, "box": "0,0,40,24"},  # only the editor sees it
        "name = '../up'": {**ROW, "name": "../up"},
        "name = 'a\\nb'": {**ROW, "name": "a\nb"},
        "name: good.png is row 1's too": {**ROW, "name": "GOOD"},
        "seed = '-1'": {**ROW, "seed": "-1"},
        "n = '1001'": {**ROW, "n": "1001"},
        "scale = 'nan'": {**ROW, "scale": "nan"},
    }
    _write(folder / "edits.csv", [{**ROW, "name": "good"}, *bad.values(), {**ROW, "name": "last"}])
    assert _run() == 1
    assert sorted(_pngs(folder)) == ["good.png", "last.png"]
    assert f"2 edits written, 0 were there, {len(bad)} failed" in capsys.readouterr().out
    errors = {line["row"]: line["error"] for line in _lines(folder) if "error" in line}
    for number, told in enumerate(bad, 2):
        assert told.lower() in errors[number].lower(), (number, errors[number])
    assert len(_lines(folder)) == len(bad) + 2 and not (folder / "up.png").exists()
    _write(folder / "edits.csv", [{**ROW, "name": "good"}, {**ROW, "name": "up"}])
    assert _run() == 0  # the rows are mended: no error is left
    assert not [line for line in _lines(folder) if "error" in line]


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"", "no rows"),
        (b"photo,box,reference\n", "no rows"),
        (b"photo,box,reference\ncaf\xe9.png,1,1\n", "line 2 is not UTF-8"),
        (b"photo,box,reference\na\0.png,1,1\n", "line 2 has a NUL"),
        (b"photo,colour\na,b\n", "unknown column 'colour'; allowed are photo, mask"),
        (b"photo,photo\na,b\n", "two columns 'photo'"),
        (b'photo,box\n"a', "line 2: "),
    ],
)
def test_a_table_that_cannot_be_read_is_one_line(
    data: bytes, told: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "edits.csv").write_bytes(data)
    assert _run() == 1
    err = capsys.readouterr().err
    assert f"edits.csv: {told}" in err and err.count("\n") == 1 and not (folder / "out").exists()


def test_run_again_it_does_only_what_is_missing_or_changed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "other.png").write_bytes((folder / "reference.png").read_bytes())
    rows = [{**ROW, "seed": seed, "reference": "other.png" if seed == 1 else "reference.png"} for seed in range(4)]
    _write(folder / "edits.csv", rows)
    assert _run() == 0
    first = _pngs(folder)
    (folder / "out" / "row-0003.png").unlink()
    (folder / "other.png").write_bytes((folder / "photo.png").read_bytes())
    capsys.readouterr()
    assert _run() == 0
    assert "2 edits written, 2 were there, 0 failed" in capsys.readouterr().out
    again = _pngs(folder)
    assert sorted(again) == sorted(first) and len(_lines(folder)) == 4
    assert {name for name in first if first[name] != again[name]} == {"row-0002.png", "row-0003.png"}
    assert _run("--scale", "2") == 0
    assert "4 edits written, 0 were there" in capsys.readouterr().out
    recipe = read_recipe(folder / "out" / "row-0002.png")
    assert recipe.batch_rows == 4 and recipe.photo.name == "../photo.png"
    assert main(["edit", "--recipe", "out/row-0002.png", "--out", "again.png"]) == 0
    assert is_same(recipe, images.decode(Path("again.png").read_bytes()))


def test_gaps_and_numbers_as_pandas_and_json_write_them(folder: Path) -> None:
    nan = float("nan")
    rows = [
        {**ROW, "mask": nan, "name": nan, "seed": 42.0, "n": nan, "scale": nan},
        {**ROW, "box": [8.0, 5, 25, 15.0], "seed": "43.0"},
    ]
    (folder / "edits.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert _run(table="edits.jsonl") == 0
    assert [(line["seed"], line["box"]) for line in _lines(folder)] == [(42, [8, 5, 25, 15]), (43, [8, 5, 25, 15])]
    bad = [
        {**ROW, "seed": float("inf")},
        {**ROW, "n": 1.5},
        {**ROW, "seed": True},
        {**ROW, "box": [0.3, 0.4, 1.0, 1.0]},  # fractions would be a hole of one pixel
    ]
    (folder / "edits.jsonl").write_text("\n".join(map(json.dumps, bad)))
    assert _run(table="edits.jsonl") == 1
    errors = [line["error"].split(" = ")[0] for line in _lines(folder) if "error" in line]
    assert errors == ["seed", "n", "seed", "box"]


def test_no_edit_replaces_a_picture_that_it_is_made_of(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path.name: path.read_bytes() for path in folder.glob("*.png")}
    _write(folder / "edits.csv", [{**ROW, "name": "other"}, {**ROW, "name": "reference"}])
    assert _run("--out", ".") == 1
    assert "edits.csv: row 2: its edit reference.png would replace reference.png" in capsys.readouterr().err
    options = ["--box", "8,5,25,15", "--reference", "reference.png", "--model", "models/tiny", "--steps", "2"]
    assert main(["edit", "photo.png", *options, "--out", "./photo.png"]) == 1
    assert "--out photo.png: the edit would replace its own photo" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in folder.glob("*.png")} == before


def test_lines_follow_their_rows_when_the_table_changes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "mine.png").write_bytes((folder / "photo.png").read_bytes())
    cat, dog = {**ROW, "name": "cat", "photo": "mine.png", "n": 2}, {**ROW, "name": "dog"}
    _write(folder / "edits.csv", [cat, dog])
    assert _run("--context", "inf") == 0
    (folder / "mine.png").unlink()
    _write(folder / "edits.csv", [{**ROW, "name": "ant"}, dog | {"photo": "../" + folder.name + "/photo.png"}])
    capsys.readouterr()
    assert _run("--context", "inf") == 0
    assert "1 edits written, 1 were there" in capsys.readouterr().out
    lines = _lines(folder)
    assert [(line["row"], line["png"]) for line in lines] == [
        (1, "ant.png"), (2, "dog.png"), (None, "cat-seed-42.png"), (None, "cat-seed-43.png")
    ]  # fmt: skip
    assert lines[1]["photo"].endswith("/photo.png") and {line["context_factor"] for line in lines} == {"inf"}
    _write(folder / "edits.csv", [cat, dog])
    assert _run("--context", "inf", "--scale", "2", "--scale", "3") == 1  # a sheet of what can be read
    out, err = capsys.readouterr()
    assert "2 edits written, 0 were there, 4 failed" in out and err.count("row 1: mine.png") == 1
    assert _run("--context", "inf") == 1
    assert [line["png"] for line in _lines(folder) if "error" in line] == ["cat-seed-42.png", "cat-seed-43.png"]


def test_many_edits_of_a_row_are_written_eight_at_a_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write(folder / "edits.csv", [{**ROW, "n": 20, "seed": 5}])
    at_once = []
    edit_batch = Editor.edit_batch

    def counted(editor: Editor, tasks: Any, **named: Any) -> Any:
        at_once.append(len(tasks))
        if len(at_once) == 3:
            raise KeyboardInterrupt
        return edit_batch(editor, tasks, **named)

    monkeypatch.setattr(Editor, "edit_batch", counted)
    assert _run() == 130
    assert at_once == [8, 8, 4] and len(_pngs(folder)) == 16
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    assert _run() == 0
    assert sorted(line["seed"] for line in _lines(folder)) == list(range(5, 25))
    assert main(["edit", "--recipe", "out/row-0001-seed-14.png", "--out", "again.png"]) == 0


@pytest.mark.timeout(200)
def test_a_killed_run_goes_on_and_keeps_what_it_had(folder: Path) -> None:
    _write(folder / "edits.csv", [{**ROW, "seed": seed} for seed in range(64)])
    code = "import sys; from pbe.cli.__main__ import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "edit", "--table", "edits.csv", "--model", "models/tiny", "--out", "out"]
    env = {**os.environ, "PYTHONPATH": str(repo_root()), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen([*command, "--steps", "40"], cwd=folder, env=env) as process:
        path = folder / "out" / "edits.jsonl"
        while process.poll() is None and not (path.exists() and path.read_bytes().count(b"\n") >= 8):
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    kept = _pngs(folder)
    assert 8 <= len(kept) < 64
    with path.open("ab") as stream:
        stream.write(b'{"png": "row-00')  # half a line
    assert _run("--steps", "40") == 0
    pngs = _pngs(folder)
    assert len(pngs) == 64 and len(_lines(folder)) == 64
    recorded = list(kept)[:8]
    assert {name: pngs[name] for name in recorded} == {name: kept[name] for name in recorded}


def test_several_scales_make_every_combination_and_a_sheet(folder: Path) -> None:
    _write(folder / "edits.csv", [ROW, {**ROW, "scale": "4"}])
    assert _run("--scale", "1", "--scale", "3") == 0
    assert sorted(_pngs(folder)) == ["row-0001-scale-1.png", "row-0001-scale-3.png", "row-0002.png", "sheet.png"]
    assert images.decode(_pngs(folder)["sheet.png"]).shape == (2 * (24 + 4), 4 * 44 - 4, 3)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--box", "1,2,3,4"], "--box cannot be combined with --table"),
        (["--recipe", "a.png"], "--table cannot be combined with --recipe"),
        (["--grid"], "--grid cannot be combined with --table"),
        (["--actors", "2"], "--actors 2: only the command `pbe` starts Ray"),
        (["--scale", "3", "--scale", "3"], "--scale 3.0: twice"),
        (["--out", "edits.csv"], "edits.csv"),
    ],
)
def test_what_cannot_go_together_is_said(
    options: list[str], told: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _write(folder / "edits.csv", [ROW])
    assert _run(*options) == 1
    assert told in capsys.readouterr().err


def test_a_dashboard_as_ray_address_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _write(folder / "edits.csv", [ROW])
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:8265")
    assert _run() == 1
    assert "with RAY_ADDRESS set to its head's host:port" in capsys.readouterr().err


def test_a_full_disk_ends_the_run_with_one_line(
    folder: Path, full_disk: Callable[[int], None], capsys: pytest.CaptureFixture[str]
) -> None:
    _write(folder / "edits.csv", [ROW])
    full_disk(100)
    assert _run() == 1
    err = capsys.readouterr().err
    assert "File too large" in err and err.count("\n") == 1
    assert [path.name for path in (folder / "out").iterdir()] == ["edits.jsonl"]
