"""A stage's log file: what passed both streams, without the states of a progress bar that were drawn over."""

import subprocess
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


def test_what_bypasses_python_is_in_the_log_alone(tmp_path: Path) -> None:
    """Of the process itself and of its children, which is how Ray's C++ prints. Python's lines stay in both."""
    program = """
import atexit, os, subprocess, sys
from pathlib import Path
from pipelines.runtime.logs import stage_log
with stage_log(Path(sys.argv[1]), "encode"):
    atexit.register(sys.stdout.isatty)  # as colorama does in Ray
    print("news")
    os.write(2, b"core_worker.cc: an actor has constructor arguments\\n")
    subprocess.run(["sh", "-c", "echo from a child"])
    print("a warning", file=sys.stderr)
os.write(2, b"after\\n")
print("the end")
"""
    ran = subprocess.run([sys.executable, "-c", program, tmp_path], capture_output=True, text=True, check=True)
    assert ran.stdout == "news\nthe end\n" and ran.stderr == "a warning\nafter\n"
    [log] = (tmp_path / "logs" / "encode").glob("*.log")
    assert {"news", "core_worker.cc: an actor has constructor arguments", "from a child", "a warning"} < set(
        log.read_text().splitlines()
    )


def test_old_logs_go(tmp_path: Path) -> None:
    folder = tmp_path / "logs" / "encode"
    folder.mkdir(parents=True)
    for day in range(1, 9):
        (folder / f"2026010{day}-000000.log").write_text("old")
    with stage_log(tmp_path, "encode") as path:
        pass
    found = sorted(file.name for file in folder.glob("*.log"))
    assert len(found) == KEPT and found[-1] == path.name and found[0] == "20260105-000000.log"
