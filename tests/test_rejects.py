"""`pbe rejects`: every dropped row by stage and reason, with examples; all of them as CSV."""

import csv
import hashlib
import io
from pathlib import Path

import pyarrow as pa
import pytest
import yaml

from pbe import places
from pbe.cli.__main__ import main
from pbe.data.schema import REJECTS
from pbe.store import Store, make_manifest, save_manifest

Parts = list[list[tuple[str, str]]]  # key and reason of each row that a part drops
INGEST: Parts = [
    [("a.jpg", "image_unreadable"), ("boxes.csv:2", "box_unparsable"), ("boxes.csv:9", "box_unparsable")],
    [],
    [("boxes.csv:4", "box_unparsable"), ("train/b.jpg", "download_failed"), ("boxes.csv:5", "box_image_rejected")],
]
FILTER: Parts = [[("c#0", "area_below_min")], [("d#1", "area_below_min"), ("d#2", "area_above_max")], []]
NOTHING: Parts = [[]]


@pytest.fixture
def root(tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty project folder with its own storage."""
    monkeypatch.setattr(places, "repo_root", lambda: tmp_path)
    monkeypatch.setenv("PBE_STORAGE", store.uri)
    return tmp_path


def _run_stage(root: Path, store: Store, stage: str, parts: Parts, **counts: int) -> None:
    units = []
    for number, rows in enumerate(parts):
        table = pa.Table.from_pylist(
            [{"stage": stage, "key": key, "reason": reason, "detail": f"why, {key}"} for key, reason in rows],
            schema=REJECTS,
        )
        mine = counts if number == 0 else {}
        units.append(store.write_unit(stage, f"b{number:04d}-0", {"rejects": table}, counts=mine))
    manifest = make_manifest(stage, config={}, version=1, units=units)
    save_manifest(root / "data" / stage / "manifest.json", manifest)


def test_reasons_are_counted_by_stage_the_most_frequent_first_with_examples(
    root: Path, store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    _run_stage(root, store, "filter", FILTER, boxes_in=40)
    _run_stage(root, store, "ingest", INGEST, images_in=9, boxes_in=44)
    _run_stage(root, store, "materialize", NOTHING, images_in=8)
    assert main(["rejects", "--examples", "1"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert lines == [
        "ingest: 6 rows dropped of 9 images, 44 boxes",
        "3 box_unparsable",
        "boxes.csv:2: why, boxes.csv:2",
        "1 box_image_rejected",
        "boxes.csv:5: why, boxes.csv:5",
        "1 download_failed (ingest.retry_rejected retries these)",
        "train/b.jpg: why, train/b.jpg",
        "1 image_unreadable",
        "a.jpg: why, a.jpg",
        "filter: 3 rows dropped of 40 boxes",
        "2 area_below_min",
        "c#0: why, c#0",
        "1 area_above_max",
        "d#2: why, d#2",
        "materialize: 0 rows dropped of 8 images",
    ]


def test_a_stage_whose_input_has_changed_since_is_marked(
    root: Path, store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    for stage, parts in (("ingest", INGEST), ("filter", FILTER), ("materialize", NOTHING)):
        _run_stage(root, store, stage, parts, images_in=9, boxes_in=44)
    before = {"filter": ["ingest"], "materialize": ["ingest", "filter"]}
    stages = {}
    for stage, names in before.items():
        paths = [f"data/{name}/manifest.json" for name in names]
        deps = [{"path": path, "md5": hashlib.md5((root / path).read_bytes()).hexdigest()} for path in paths]
        stages[stage] = {"deps": [*deps, {"path": "pbe/store.py", "md5": "0"}]}
    (root / "dvc.lock").write_text(yaml.safe_dump({"schema": "2.0", "stages": stages}))

    def marked() -> list[str]:
        assert main(["rejects"]) == 0
        return [line.split(":")[0] for line in capsys.readouterr().out.splitlines() if "from an earlier run" in line]

    assert marked() == []
    _run_stage(root, store, "filter", FILTER[:1], boxes_in=40)
    assert marked() == ["materialize"]
    _run_stage(root, store, "ingest", INGEST[:1], images_in=9, boxes_in=44)
    assert marked() == ["filter", "materialize"]
    (root / "data" / "ingest" / "manifest.json").unlink()  # as DVC does before it runs the stage, which then fails
    assert main(["rejects"]) == 0
    first, second, *_ = capsys.readouterr().out.splitlines()
    assert first == "ingest: no result here; it has not run, or failed before it had one"
    assert second.startswith("filter:") and "from an earlier run" in second


@pytest.mark.parametrize("text", ["stages: []", "stages: {filter: {deps: [{md5: 0}]}}", "a: ["])
def test_a_lock_file_that_is_none_of_dvcs_is_one_line(
    text: str, root: Path, store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    _run_stage(root, store, "ingest", INGEST, images_in=9, boxes_in=44)
    (root / "dvc.lock").write_text(text)
    assert main(["rejects"]) == 1
    err = capsys.readouterr().err
    assert "dvc.lock: not a lock file of DVC" in err and err.count("\n") == 1


@pytest.mark.parametrize(("examples", "shown"), [(0, 0), (2, 2), (50, 3)])
def test_as_many_examples_as_asked_for(
    root: Path, store: Store, examples: int, shown: int, capsys: pytest.CaptureFixture[str]
) -> None:
    _run_stage(root, store, "ingest", INGEST, images_in=9, boxes_in=44)
    assert main(["rejects", "--examples", str(examples)]) == 0
    out = capsys.readouterr().out
    assert out.count("why, boxes.csv:") - out.count("why, boxes.csv:5") == shown


def test_every_row_goes_into_the_csv(root: Path, store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    _run_stage(root, store, "ingest", INGEST, images_in=9, boxes_in=44)
    _run_stage(root, store, "filter", FILTER, boxes_in=40)
    target = root / "all rejects.csv"
    assert main(["rejects", "--examples", "0", "--out", str(target)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"wrote 9 rows to {target}"
    rows = list(csv.DictReader(io.StringIO(target.read_text())))
    expected = [
        {"stage": stage, "key": key, "reason": reason, "detail": f"why, {key}"}
        for stage, parts in (("ingest", INGEST), ("filter", FILTER))
        for part in parts
        for key, reason in part
    ]
    assert rows == expected


def test_names_from_data_steer_neither_the_terminal_nor_a_spreadsheet(
    root: Path, store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    formulas = ["=1+1", "@SUM(A1)", "+cmd|' /C calc'!A0", "\t=1", "-2+3"]
    keys = ["\x1b[2J\u202egpj.exe", "two\nlines", "\x9b1m", *formulas, "-2.5", "日本.jpg"]
    _run_stage(root, store, "ingest", [[(key, "image_unreadable") for key in keys]], images_in=9, boxes_in=44)
    assert main(["rejects", "--examples", "10", "--out", str(root / "all.csv")]) == 0
    out = capsys.readouterr().out
    assert not set("\x1b\u202e\x9b") & set(out) and "\\x1b[2J\\u202egpj.exe: why" in out and "two\\nlines: why" in out
    assert "日本.jpg" in out
    with (root / "all.csv").open(newline="") as stream:
        cells = [row["key"] for row in csv.DictReader(stream)]
    assert cells == [*keys[:3], *(f"'{key}" for key in formulas), *keys[8:]]


def test_before_any_stage_has_run_it_says_which_is_the_first(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rejects"]) == 1
    assert capsys.readouterr().err == "pbe: error: no data stage has run here; run `dvc repro ingest` first\n"


@pytest.mark.parametrize("what", ["a part that is gone", "a target without a folder"])
def test_what_goes_wrong_is_one_line(what: str, root: Path, store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    _run_stage(root, store, "ingest", INGEST, images_in=9, boxes_in=44)
    if what == "a part that is gone":
        store.delete_unit("parts/ingest/b0002-0")
        assert main(["rejects"]) == 1
    else:
        assert main(["rejects", "--out", str(root / "nowhere" / "all.csv")]) == 1
    err = capsys.readouterr().err
    assert err.startswith("pbe: error: ") and err.count("\n") == 1
    assert ("b0002-0" if what == "a part that is gone" else "nowhere") in err
