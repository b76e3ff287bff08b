"""A stage's log file: what passed both streams, without the states of a progress bar that were drawn over."""

import sys
from pathlib import Path

import pytest

from pipelines.runtime.logs import KEPT, stage_log


def test_both_streams_are_kept_and_still_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sys.stdout, sys.stderr
    with stage_log(tmp_path, "train@full") as path:
        print("a line")
        print("another", file=sys.stderr)
    assert (sys.stdout, sys.stderr) == before
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("a line\n", "another\n")
    assert path.parent == tmp_path / "logs" / "train-full"
    *lines, end = path.read_text().splitlines()
    assert lines == ["a line", "another"]
    assert end.endswith(" s] ended")


def test_a_bar_leaves_its_last_state(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with stage_log(tmp_path, "encode") as path:
        for state in ("0%", "50%", "100%"):
            sys.stderr.write(f"\rencode: {state}")
        sys.stderr.write("\nnext\r\n")
        sys.stderr.write("\rlast")
    assert capsys.readouterr().err.count("encode") == 3
    assert path.read_text().splitlines()[:3] == ["encode: 100%", "next", "last"]


def test_the_log_ends_with_what_ended_the_stage(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no photo"), stage_log(tmp_path, "encode"):
        raise ValueError("no photo")
    (path,) = (tmp_path / "logs" / "encode").glob("*.log")
    assert path.read_text().endswith("ValueError: no photo\n")


def test_old_logs_go(tmp_path: Path) -> None:
    folder = tmp_path / "logs" / "encode"
    folder.mkdir(parents=True)
    for day in range(1, 9):
        (folder / f"2026010{day}-000000.log").write_text("old")
    with stage_log(tmp_path, "encode") as path:
        pass
    found = sorted(file.name for file in folder.glob("*.log"))
    assert len(found) == KEPT and found[-1] == path.name and found[0] == "20260105-000000.log"
