"""One training of a run at a time: two would write the same checkpoints into each other.

A lease is a file of the run that its holder renews. Who finds one watches it: renewed, its holder lives, and the second
training is refused; not renewed for WATCH_S, its holder is gone. No clock of another machine is read. A holder of this
machine is looked for among its processes, so that a training that was killed goes on at once.
"""

import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil

from pbe.store import StoreError
from pbe.train.checkpoints import Run
from pipelines.plans import who
from pipelines.stage import StageError

RENEW_S = 15.0
WATCH_S = 45.0  # three renewals
SETTLE_S = 1.0  # of two that begin at the same moment, the one whose lease stands after this goes on
FILE = "lease.json"


@contextmanager
def hold(run: Run) -> Iterator[None]:
    """Raises StageError while another training of the run lives."""
    token = uuid.uuid4().hex
    _wait_for_its_end(run)
    _write(run, token)
    time.sleep(SETTLE_S)
    if (found := run.read_json(FILE)) and found["token"] != token:
        raise _refusal(run, found)
    over = threading.Event()
    renewing = threading.Thread(target=_renew, args=(run, token, over), daemon=True, name="pbe-lease")
    renewing.start()
    try:
        yield
    finally:
        over.set()
        renewing.join(timeout=RENEW_S)
        run.store.delete_file(f"{run.folder}/{FILE}")


def _wait_for_its_end(run: Run) -> None:
    """Until the lease that is there has not been renewed for long enough, if there is one."""
    found = run.read_json(FILE)
    if found is None or _is_dead_here(found):
        return
    print(f"train: run {run.name} was being trained by {found['who']}; waiting {WATCH_S:.0f} s for a sign of life")
    deadline = time.monotonic() + WATCH_S
    while time.monotonic() < deadline:
        time.sleep(min(1.0, RENEW_S / 3))
        now = run.read_json(FILE)
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
    if lease["host"] != socket.gethostname():
        return False
    try:
        return psutil.Process(lease["pid"]).create_time() != lease["process_began"]
    except psutil.NoSuchProcess:
        return True


def _write(run: Run, token: str, renewed: int = 0) -> None:
    process = psutil.Process(os.getpid())
    run.write_json(
        FILE,
        {
            "token": token,
            "renewed": renewed,
            "who": who(),
            "host": socket.gethostname(),
            "pid": process.pid,
            "process_began": process.create_time(),
        },
    )


def _renew(run: Run, token: str, over: threading.Event) -> None:
    renewed = 0
    while not over.wait(RENEW_S):
        renewed += 1
        try:
            _write(run, token, renewed)
        except (StoreError, OSError) as error:  # training does not end for it; others may take its silence for its end
            print(
                f"train: the lease of run {run.name} was not renewed: {' '.join(str(error).split())[:200]}", flush=True
            )
