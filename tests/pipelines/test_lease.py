"""Two trainings of one run: the second is refused while the first lives, and goes on when it does not."""

import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from pbe.store import Store
from pbe.train.checkpoints import Run
from pipelines.cluster import lease
from pipelines.runtime.stage import StageError


@pytest.fixture
def run(store: Store, monkeypatch: pytest.MonkeyPatch) -> Run:
    for name, seconds in {"RENEW_S": 0.1, "WATCH_S": 0.6, "SETTLE_S": 0.05}.items():
        monkeypatch.setattr(lease, name, seconds)
    return Run(store, "full-0123")


def test_a_lease_is_there_while_it_is_held(run: Run) -> None:
    with lease.hold(run):
        assert run.read_json(lease.FILE) is not None
    assert run.read_json(lease.FILE) is None
    with lease.hold(run):
        pass


def test_who_comes_second_is_refused_with_the_first_ones_name(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PBE_JOB", "pbe-train-full-0123-1")
    monkeypatch.setattr(lease, "WATCH_S", 60.0)
    with lease.hold(run):
        with (
            pytest.raises(StageError, match=r"run full-0123 is being trained right now by pbe-train-full-0123-1"),
            lease.hold(run),
        ):
            pytest.fail("both train")
        assert run.read_json(lease.FILE) is not None  # the first one's stays


def test_a_holder_that_shows_no_life_is_waited_for_and_followed(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    with lease.hold(run):
        left = run.read_json(lease.FILE)
    assert left is not None
    # two laptops called ubuntu, or two containers: the other's process ids mean nothing here
    run.write_json(lease.FILE, {**left, "machine": "another boot pid:[4026531836]", "pid": 4_000_000})
    with lease.hold(run):
        assert "waiting" in capsys.readouterr().out


def test_a_process_of_this_machine_that_was_killed_is_not_waited_for(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(lease, "WATCH_S", 600)
    code = f"""
import time
from pbe.store import Store
from pbe.train.checkpoints import Run
from pipelines.cluster import lease
with lease.hold(Run(Store({run.store.uri!r}), {run.name!r})):
    print("held", flush=True)
    time.sleep(600)
"""
    root = Path(__file__).resolve().parents[2]
    env = {**os.environ, "PYTHONPATH": str(root)}
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=env, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        holder.kill()
    with lease.hold(run):
        assert capsys.readouterr().out == ""


def test_a_holder_that_slept_stops_and_leaves_the_lease_of_the_one_who_took_over(run: Run) -> None:
    theirs: dict[str, object] = {}

    def sleep_and_wake() -> None:
        with lease.hold(run):
            theirs.update(run.read_json(lease.FILE) or {}, token="theirs", who="the other")
            run.write_json(lease.FILE, theirs)
            time.sleep(60)  # interrupted

    with pytest.raises(StageError, match="is being trained right now by the other"):
        sleep_and_wake()
    assert run.read_json(lease.FILE) == theirs


@pytest.mark.parametrize("left", [b"", b"{"])
def test_a_holder_whose_lease_is_gone_stops(run: Run, left: bytes) -> None:
    """The one who took it over has ended meanwhile, or something has damaged it."""

    def sleep_and_wake() -> None:
        with lease.hold(run):
            run.store.delete_file(f"{run.folder}/{lease.FILE}")
            if left:
                run.store.write_bytes(f"{run.folder}/{lease.FILE}", left)
            time.sleep(60)  # interrupted

    with pytest.raises(StageError, match="by somebody else, who has ended since"):
        sleep_and_wake()


def test_a_holder_in_the_background_stops_too(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a shell has started it so that it ignores Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        test_a_holder_that_slept_stops_and_leaves_the_lease_of_the_one_who_took_over(run)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_lease_that_cannot_be_read_is_nobodys(run: Run) -> None:
    for damaged in (b"{", b"[]", b'{"token": "x"}'):
        run.store.write_bytes(f"{run.folder}/{lease.FILE}", damaged)
        with lease.hold(run):
            assert (run.read_json(lease.FILE) or {})["who"]


def test_another_process_with_its_number_is_not_taken_for_the_holder(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    with lease.hold(run):
        found = run.read_json(lease.FILE)
    assert found is not None and found["pid"] == os.getpid()
    run.write_json(lease.FILE, {**found, "began_ticks": found["began_ticks"] - 100})
    with lease.hold(run):
        assert capsys.readouterr().out == ""  # it is dead: nothing to wait for


def in_thread(work: Callable[..., None], *arguments: object) -> None:
    thread = threading.Thread(target=work, args=arguments, name="pbe-lease")
    thread.start()
    thread.join()


@pytest.mark.parametrize("step_s", [3600, -3600])
@pytest.mark.parametrize("here", [True, False])
def test_a_living_holder_stays_when_the_clock_is_set(
    run: Run, monkeypatch: pytest.MonkeyPatch, step_s: int, here: bool
) -> None:
    """Set by hand or NTP, or jumped when a virtual machine went on. here: the holder is of this machine."""
    monkeypatch.setattr(lease, "WATCH_S", 60.0)  # until the first renewal, however busy the machine
    written = lease._write
    if not here:
        monkeypatch.setattr(lease, "_machine", lambda: f"{threading.current_thread().name} pid:[4026531836] 0")
        monkeypatch.setattr(lease, "_write", lambda *arguments: in_thread(written, *arguments))
    with lease.hold(run):
        with monkeypatch.context() as clock:
            for name in ("time", "monotonic", "time_ns", "monotonic_ns"):
                now, unit = getattr(time, name), 10**9 if name.endswith("ns") else 1
                times = itertools.chain([0], itertools.repeat(step_s * unit))  # stepped after the first look at it
                clock.setattr(time, name, lambda now=now, times=times: now() + next(times))
            # the kernel gives the starts of processes in ticks since boot, and libraries add the date of the boot
            clock.setattr(psutil._pslinux, "boot_time", lambda boot=psutil._pslinux.boot_time: boot() + step_s)
            with pytest.raises(StageError, match="is being trained right now"), lease.hold(run):
                pytest.fail("both train")
        assert run.read_json(lease.FILE) is not None


def test_a_holder_that_died_and_was_not_collected_is_not_waited_for(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a container whose first process collects nobody's children."""
    with lease.hold(run), subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as died:
        left = {**(run.read_json(lease.FILE) or {}), "pid": died.pid, "began_ticks": lease._began_ticks(died.pid)}
        died.kill()
        os.waitid(os.P_PID, died.pid, os.WEXITED | os.WNOWAIT)
        run.write_json(lease.FILE, left)
        lease._wait_for_its_end(run)
        assert capsys.readouterr().out == ""
        run.store.delete_file(f"{run.folder}/{lease.FILE}")


def test_the_lease_of_an_older_version_is_watched(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    with lease.hold(run):
        found = run.read_json(lease.FILE) or {}
    old = {name: value for name, value in found.items() if name != "began_ticks"} | {"process_began": 1e9}
    run.write_json(lease.FILE, old)
    with lease.hold(run):
        assert "waiting" in capsys.readouterr().out


def test_of_two_at_the_same_moment_one_goes_on(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    written = lease._write

    def write_and_be_overwritten(run: Run, token: str, renewed: int = 0) -> None:
        written(run, token, renewed)
        written(run, "of-the-other", renewed)

    monkeypatch.setattr(lease, "_write", write_and_be_overwritten)
    with pytest.raises(StageError, match="right now"), lease.hold(run):
        pytest.fail("both train")
