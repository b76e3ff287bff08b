"""A lease that allows one training of a run at a time: two would overwrite each other's checkpoints.

A lease is a file in the run's folder that its holder renews. A process that finds one waits: if it is renewed, the
holder is alive and the second training is rejected; after WATCH_S without renewal the holder is dead. No clock is read,
here or on another machine: clocks are set, and machines pause. On the same machine the holder's process is checked
instead, so a killed training resumes at once; the kernel's ticks since boot tell it from a later process of the same
number. A holder that was only suspended (a sleeping laptop) finds its lease replaced or gone at the next renewal, and
stops.
"""

import math
import os
import signal
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pbe.errors import one_line
from pbe.store import StoreError
from pbe.train.checkpoints import Run
from pipelines.runtime.progress_records import who
from pipelines.runtime.stage import StageError

RENEW_S = 15.0
WATCH_S = 45.0  # three renewals
SETTLE_S = 1.0  # of two that start at the same moment, the one whose lease remains after this continues
FILE = "lease.json"
KEYS = {"token", "renewed", "who", "machine", "pid"}


@contextmanager
def hold(run: Run) -> Iterator[None]:
    """Hold the lease of a run. Raises StageError if another training of it is alive or takes the lease over."""
    token = uuid.uuid4().hex
    _wait_for_its_end(run)
    _write(run, token)
    time.sleep(SETTLE_S)
    if (found := _read(run)) and found["token"] != token:
        raise _refusal(run, found)
    renewal = _Renewal(run, token)
    before = signal.getsignal(signal.SIGINT)
    if before is signal.SIG_IGN:  # a background process; the renewal thread must be able to interrupt it
        signal.signal(signal.SIGINT, signal.default_int_handler)
    renewal.start()
    try:
        yield
    except BaseException:  # the KeyboardInterrupt from the renewal thread, or an exception it caused
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
    """Return the current lease, or None if it is missing or unreadable."""
    try:
        found = run.read_json(FILE)
    except ValueError:
        return None
    return found if isinstance(found, dict) and found.keys() >= KEYS else None


def _wait_for_its_end(run: Run) -> None:
    """Wait until an existing lease, if any, has expired. Raises StageError if it is renewed."""
    found = _read(run)
    if found is None or _is_dead_here(found):
        return
    print(f"train: run {run.name} was being trained by {found['who']}; waiting {WATCH_S:.0f} s for a sign of life")
    nap_s = min(1.0, RENEW_S / 3)
    for _ in range(math.ceil(WATCH_S / nap_s)):  # naps are counted: after a pause of both, the holder has time to renew
        time.sleep(nap_s)
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
    if lease["machine"] != _machine() or "began_ticks" not in lease:  # of an older version: it is watched
        return False
    return _began_ticks(lease["pid"]) != lease["began_ticks"]


def _began_ticks(pid: int) -> int | None:
    """Return when a process began, in clock ticks since boot; None if it is gone, or dead and not yet collected.

    psutil and ps give dates, which move when the clock is set.
    """
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return None
    state, *fields = text.rpartition(")")[2].split()  # proc(5): from the third field on
    return None if state in "ZX" else int(fields[18])


def _machine() -> str:
    """Return an id of this boot, process namespace and user; host names are not unique."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {Path('/proc/self/ns/pid').readlink()} {os.getuid()}"  # other users' processes may be hidden


def _write(run: Run, token: str, renewed: int = 0) -> None:
    run.write_json(
        FILE,
        {
            "token": token,
            "renewed": renewed,
            "who": who(),
            "machine": _machine(),
            "pid": os.getpid(),
            "began_ticks": _began_ticks(os.getpid()),
        },
    )


class _Renewal(threading.Thread):
    """Renews a lease until `over`; if another process took it, interrupts this process as by Ctrl-C."""

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
                    os.kill(os.getpid(), signal.SIGINT)  # sent again after RENEW_S if ignored
                    continue
                _write(self._run_held, self._token, renewed)
            except (StoreError, OSError) as error:  # does not stop training, but others may take the lease over
                reason = one_line(error, 200)
                print(f"train: the lease of run {self._run_held.name} was not renewed: {reason}", flush=True)
