"""Log files, one per run of a stage: its output, local or from a cluster job, and a last line on how it ended."""

import io
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

LOG_FOLDER = "logs"
KEPT = 5  # logs per stage; older ones are removed


@contextmanager
def stage_log(home: Path, title: str) -> Iterator[Path]:
    """Copy stdout and stderr to a new file in <home>/logs/<title> while the block runs; yields its path.

    Of a progress bar only the last state is logged. What bypasses Python (Ray's C++, child processes) goes to the file
    alone: a user can rarely act on it.
    """
    folder = home / LOG_FOLDER / title.replace("@", "-")
    folder.mkdir(parents=True, exist_ok=True)
    for old in sorted(folder.glob("*.log"))[: -KEPT + 1]:
        old.unlink(missing_ok=True)
    began = time.time()
    path = folder / time.strftime("%Y%m%d-%H%M%S.log", time.gmtime(began))
    with path.open("a", encoding="utf-8") as log, _native_output_to(log):
        streams = sys.stdout, sys.stderr
        sys.stdout, sys.stderr = _Tee(sys.stdout, log), _Tee(sys.stderr, log)
        ending = "ended"
        try:
            yield path
        except BaseException as error:
            ending = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            raise
        finally:
            for tee in (sys.stdout, sys.stderr):
                if isinstance(tee, _Tee):
                    tee.finish_line()
            sys.stdout, sys.stderr = streams
            log.write(f"[{time.strftime('%Y-%m-%d %H:%M:%SZ', time.gmtime())}, {time.time() - began:.0f} s] {ending}\n")


@contextmanager
def _native_output_to(log: TextIO) -> Iterator[None]:
    """Point the process' file descriptors 1 and 2 at the log, and Python's streams at copies of what they were."""
    before = [
        (name, stream, stream.fileno()) for name in ("stdout", "stderr") if _is_native(stream := getattr(sys, name))
    ]
    for name, stream, number in before:
        stream.flush()
        copy = os.fdopen(os.dup(number), "w", encoding=stream.encoding, errors=stream.errors, buffering=1)
        setattr(sys, name, copy)
        os.dup2(log.fileno(), number)
    try:
        yield
    finally:
        for name, stream, number in before:
            copy = getattr(sys, name)
            copy.flush()
            os.dup2(copy.fileno(), number)
            setattr(sys, name, stream)  # the copy stays open: Ray has kept it, and uses it when Python ends


def _is_native(stream: TextIO) -> bool:
    """Whether the stream is the process' own, not one that a test or a notebook has put in its place."""
    try:
        return stream.fileno() in (1, 2)
    except (OSError, ValueError):
        return False


class _Tee(io.TextIOBase):
    """Stream wrapper that also writes complete lines to a log."""

    def __init__(self, stream: TextIO, log: TextIO) -> None:
        self._stream, self._log, self._line = stream, log, ""

    def write(self, text: str) -> int:
        written = self._stream.write(text)
        *whole, self._line = (self._line + text).split("\n")
        for line in whole:
            self._log.write(line.rstrip("\r").rpartition("\r")[2] + "\n")
        if whole:
            self._log.flush()
        return written

    def finish_line(self) -> None:
        if self._line:
            self._log.write(self._line.rpartition("\r")[2] + "\n")
            self._line = ""

    def flush(self) -> None:
        self._stream.flush()

    def isatty(self) -> bool:
        return self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()

    def writable(self) -> bool:
        return True

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._stream.encoding

    @property
    def buffer(self) -> object:
        return self._stream.buffer
