"""repro: check, `dvc repro` and summary, as `make repro` runs them. On a local Ray, all stages share one."""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import nullcontext

from pipelines.commands.check import main as check
from pipelines.reporting.summary import main as summary
from pipelines.runtime import local_ray
from pipelines.runtime.environment import is_local


def main(arguments: Sequence[str]) -> None:
    """arguments: of `dvc repro`. Exits with its status if it fails."""
    check()
    with local_ray.shared() if is_local() else nullcontext():
        if status := _run([sys.executable, "-m", "dvc", "repro", *arguments]):
            sys.exit(status)  # here, so that Ray's logs stay
    summary()


def _run(command: Sequence[str]) -> int:
    """Run a command to its end; return its exit status, as a shell counts it.

    Ctrl-C reaches it and its stages from the terminal: this process waits until they have stored what is done, and
    passes on a request to terminate.
    """
    process: subprocess.Popen[bytes] | None = None

    def pass_on(number: int, _: object) -> None:
        if process is not None:
            process.send_signal(number)

    before = {
        signal.SIGINT: signal.signal(signal.SIGINT, lambda *_: None),
        signal.SIGTERM: signal.signal(signal.SIGTERM, pass_on),
    }
    try:
        process = subprocess.Popen(command, env=os.environ)
        status = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 128 - status if status < 0 else status
