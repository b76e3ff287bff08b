"""A stage's log file has all output; the terminal has what the stage says, and the progress bars."""

import logging
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from pbe.errors import UserError
from pipelines.runtime.logs import KEPT, stage_log
from pipelines.runtime.progress import progress_bar
from pipelines.runtime.stage import StageError


def test_what_the_stage_says_is_shown_and_logged(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = sys.stdout, sys.stderr
    with stage_log(tmp_path, "train@full") as path:
        print("train@full:", "a line")
        print("pbe: warning: another", file=sys.stderr)
    assert (sys.stdout, sys.stderr) == before
    print("later")
    shown = capfd.readouterr()
    assert (shown.out, shown.err) == ("train@full: a line\nlater\n", "pbe: warning: another\n")
    assert path.parent == tmp_path / "logs" / "train-full"
    *lines, end = path.read_text().splitlines()
    assert lines == ["train@full: a line", "pbe: warning: another"]
    assert end.endswith(" s] ended")


def test_what_others_write_is_only_logged(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    library = logging.getLogger("a library")
    with stage_log(tmp_path, "encode") as path:
        library.addHandler(handler := logging.StreamHandler())
        try:
            library.warning("a logger")
            print("\x1b[36m(MapWorker(Map(UnitActor)) pid=7)\x1b[0m Loading weights: 5%")
            print("\rLoading weights: 5%", end="", file=sys.stderr)
        finally:
            library.removeHandler(handler)
    handler.emit(logging.makeLogRecord({"msg": "after the end"}))  # as a library does that has kept the stream
    assert capfd.readouterr() == ("", "")
    log = path.read_text()
    for line in ("a logger", "Loading weights: 5%\n"):
        assert line in log
    assert "after the end" not in log


def test_the_streams_of_a_process_are_split_and_whole_again_afterwards(tmp_path: Path) -> None:
    program = """
import atexit, os, subprocess, sys
from pathlib import Path
from pipelines.runtime.logs import stage_log
with stage_log(Path(sys.argv[1]), "encode"):
    atexit.register(sys.stderr.isatty)  # as colorama does in Ray
    print("encode: news")
    os.write(2, b"core_worker.cc: an actor has constructor arguments\\n")
    subprocess.run(["sh", "-c", "echo from a child"])
    print("pbe: warning: more news", file=sys.stderr)
os.write(2, b"after\\n")
print("the end")
"""
    ran = subprocess.run([sys.executable, "-c", program, tmp_path], capture_output=True, text=True, check=True)
    assert ran.stdout == "encode: news\nthe end\n" and ran.stderr == "pbe: warning: more news\nafter\n"
    [log] = (tmp_path / "logs" / "encode").glob("*.log")
    assert {"encode: news", "core_worker.cc: an actor has constructor arguments", "from a child"} < set(
        log.read_text().splitlines()
    )


@pytest.mark.parametrize(
    ("printed", "said"),
    [
        ("(RayTrainWorker pid=7203) train: resuming from step 8", "train: resuming from step 8"),
        ("(MapWorker(Map(UnitActor)) pid=7, ip=10.0.0.2) edit@full: an actor", "edit@full: an actor"),
        ("\x1b[36m(pid=7)\x1b[0m bench: low on memory", "bench: low on memory"),
    ],
)
def test_what_a_worker_says_is_shown_without_rays_prefix(
    printed: str, said: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with stage_log(tmp_path, "encode") as path:
        print(printed)
    assert capfd.readouterr().out == said + "\n"
    assert path.read_text().startswith(printed + "\n")


def test_a_bar_is_redrawn_below_the_lines_that_come_meanwhile(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with stage_log(tmp_path, "encode") as path:
        for state in ("0%", "50%"):
            sys.stderr.write(f"\rencode: {state}")
        print("noise")
        print("encode: a line", file=sys.stderr)
        sys.stderr.write("\rencode: 100%")
        sys.stderr.write("\n")
        sys.stderr.write("\rencode: last")
    shown = "\rencode: 0%\rencode: 50%\nencode: a line\n\rencode: 100%\n\rencode: last\n"
    assert capfd.readouterr().err == shown
    assert path.read_text().splitlines()[:-1] == ["noise", "encode: a line", "encode: 100%", "encode: last"]


def test_a_bar_in_a_log_is_lines(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with stage_log(tmp_path, "encode"), progress_bar("encode", total=2, unit="part") as bar:
        bar.update(2)
    [line] = capfd.readouterr().err.splitlines()
    assert line.startswith("encode: 100%") and "2/2" in line


def test_lines_of_two_threads_do_not_mix(tmp_path: Path) -> None:
    """print writes a text and its end one after the other; Ray prints what workers print in a thread of its own."""
    with stage_log(tmp_path, "encode") as path:
        sys.stdout.write("encode: begun")
        thread = threading.Thread(target=print, args=("another",))
        thread.start()
        thread.join()
        sys.stdout.write(" and ended\n")
    assert path.read_text().splitlines()[:-1] == ["another", "encode: begun and ended"]


def test_an_error_names_the_log_which_has_its_traceback(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no photo") as caught, stage_log(tmp_path, "encode") as path:
        raise UserError("no photo") from ValueError("the cause")
    assert caught.value.__notes__ == [f"The log of this run: {path}"]
    log = path.read_text()
    assert "ValueError: the cause\n" in log and "test_logs.py" in log and log.endswith(" s] UserError: no photo\n")


def test_an_error_in_the_code_is_one_line_and_its_traceback_is_logged(tmp_path: Path) -> None:
    rays = 'ray::f()\n  File "a.py", line 1\n    f()\nKeyError: 3\n\nThe above exception was the cause:\nSee the docs'
    with pytest.raises(StageError) as caught, stage_log(tmp_path, "encode") as path:
        raise RuntimeError(rays)
    assert str(caught.value) == "encode: KeyError: 3; the log has the traceback"
    assert f"RuntimeError: {rays}" in path.read_text()


def test_old_logs_go(tmp_path: Path) -> None:
    folder = tmp_path / "logs" / "encode"
    folder.mkdir(parents=True)
    for day in range(1, 9):
        (folder / f"2026010{day}-000000.log").write_text("old")
    with stage_log(tmp_path, "encode") as path:
        pass
    found = sorted(file.name for file in folder.glob("*.log"))
    assert len(found) == KEPT and found[-1] == path.name and found[0] == "20260105-000000.log"
