"""One training of a run at a time: two would write the same checkpoints into each other.

A lease is a file of the run that its holder renews. Who finds one watches it: renewed, its holder lives, and the second
training is refused; not renewed for WATCH_S, its holder is gone. No clock of another machine is read. A holder of this
machine is looked for among its processes, so that a training that was killed goes on at once. A holder that was only
silent, as in a laptop that slept, finds the other's lease or none when it renews its own, and stops.
"""

import os
import signal
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from pbe.errors import one_line
from pbe.store import StoreError
from pbe.train.checkpoints import Run
from pipelines.runtime.progress_records import who
from pipelines.runtime.stage import StageError

RENEW_S = 15.0
WATCH_S = 45.0  # three renewals
SETTLE_S = 1.0  # of two that begin at the same moment, the one whose lease stands after this goes on
FILE = "lease.json"
KEYS = {"token", "renewed", "who", "machine", "pid", "process_began"}


@contextmanager
def hold(run: Run) -> Iterator[None]:
    """Raises StageError while another training of the run lives, or when one has taken the lease over meanwhile."""
    token = uuid.uuid4().hex
    _wait_for_its_end(run)
    _write(run, token)
    time.sleep(SETTLE_S)
    if (found := _read(run)) and found["token"] != token:
        raise _refusal(run, found)
    renewal = _Renewal(run, token)
    before = signal.getsignal(signal.SIGINT)
    if before is signal.SIG_IGN:  # in the background; Ray's own handler takes the signal there, too
        signal.signal(signal.SIGINT, signal.default_int_handler)
    renewal.start()
    try:
        yield
    except BaseException:  # the interrupt by which it was stopped, or what became of that
        if renewal.taken_by:
            raise _refusal(run, renewal.taken_by) from None
        raise
    finally:
        renewal.over.set()
        renewal.join(timeout=RENEW_S)
        if before is signal.SIG_IGN:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        if (found := _read(run)) and found["token"] == token:
            run.store.delete_file(f"{run.folder}/{FILE}")
    if renewal.taken_by:
        raise _refusal(run, renewal.taken_by)


def _read(run: Run) -> dict[str, Any] | None:
    """The lease that is there; one that cannot be read is nobody's."""
    try:
        found = run.read_json(FILE)
    except ValueError:
        return None
    return found if isinstance(found, dict) and found.keys() >= KEYS else None


def _wait_for_its_end(run: Run) -> None:
    """Until the lease that is there has not been renewed for long enough, if there is one."""
    found = _read(run)
    if found is None or _is_dead_here(found):
        return
    print(f"train: run {run.name} was being trained by {found['who']}; waiting {WATCH_S:.0f} s for a sign of life")
    deadline = time.monotonic() + WATCH_S
    while time.monotonic() < deadline:
        time.sleep(min(1.0, RENEW_S / 3))
        now = _read(run)
        if now is None:
            return
        if now["renewed"] != found["renewed"] or now["token"] != found["token"]:
            raise _refusal(run, now)


def _refusal(run: Run, lease: dict[str, Any]) -> StageError:
    return StageError(
        f"train: run {run.name} is being trained right now by {lease['who']}; the same settings, data and code give "
        "the same run, so wait for it and repeat the command, which takes its result over"
    )


def _is_dead_here(lease: dict[str, Any]) -> bool:
    if lease["machine"] != _machine():
        return False
    try:
        return psutil.Process(lease["pid"]).create_time() != lease["process_began"]
    except psutil.NoSuchProcess:
        return True


def _machine() -> str:
    """Where a process id means the same process: many laptops and containers have one name."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {Path('/proc/self/ns/pid').readlink()} {os.getuid()}"  # other users' may be hidden


def _write(run: Run, token: str, renewed: int = 0) -> None:
    process = psutil.Process(os.getpid())
    run.write_json(
        FILE,
        {
            "token": token,
            "renewed": renewed,
            "who": who(),
            "machine": _machine(),
            "pid": process.pid,
            "process_began": process.create_time(),
        },
    )


class _Renewal(threading.Thread):
    """Renews a lease until `over`, or until it is another's: then this process is interrupted, as by Ctrl-C."""

    def __init__(self, run: Run, token: str) -> None:
        super().__init__(daemon=True, name="pbe-lease")
        self.over = threading.Event()
        self._run_held, self._token = run, token
        self.taken_by: dict[str, Any] | None = None

    def run(self) -> None:
        renewed = 0
        while not self.over.wait(RENEW_S):
            renewed += 1
            try:
                found = _read(self._run_held) or {"token": "", "who": "somebody else, who has ended since"}
                if found["token"] != self._token:
                    self.taken_by = found
                    os.kill(os.getpid(), signal.SIGINT)  # again after RENEW_S, should nothing come of it
                    continue
                _write(self._run_held, self._token, renewed)
            except (StoreError, OSError) as error:  # training does not end for it; others may take it for its end
                reason = one_line(error, 200)
                print(f"train: the lease of run {self._run_held.name} was not renewed: {reason}", flush=True)
