"""What a run of a stage writes: all of it to a log file, and to the terminal only what the stage says.

A line is said by the stage if it begins with the name of a stage or `pbe:`, here, in a worker, or in its cluster job.
What Ray, DeepSpeed, MLflow and other libraries write is in the log alone.
"""

import io
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path
from typing import TextIO

from pbe.errors import UserError, one_line
from pipelines.runtime.stage import STAGES, StageError

LOG_FOLDER = "logs"
KEPT = 5  # logs per stage; older ones are removed
DESCRIPTORS = {"stdout": 1, "stderr": 2}
# such as "train@full: ..."; Ray puts "(RayTrainWorker pid=7203, ip=10.0.0.2) " before what a worker says
_SAID = re.compile(rf"(?:\S*\(.*?\bpid=\d+(?:, ip=\S+)?\)\S* )?((?:{'|'.join(STAGES)}|features|pbe)(?:@\S+)?: .*)")


@contextmanager
def stage_log(home: Path, title: str) -> Iterator[Path]:
    """Write all output of the block to a new file in <home>/logs/<title>, and what the stage says to both streams too.

    Yields the file's path. Of a progress bar only the last state is logged. If the block fails, the log has the
    traceback, and the error has a note that names the log; an error that is not the user's becomes a StageError.
    """
    folder = home / LOG_FOLDER / title.replace("@", "-")
    folder.mkdir(parents=True, exist_ok=True)
    for old in sorted(folder.glob("*.log"))[: -KEPT + 1]:
        old.unlink(missing_ok=True)
    began = time.time()
    path = folder / time.strftime("%Y%m%d-%H%M%S.log", time.gmtime(began))
    with path.open("a", encoding="utf-8", errors="backslashreplace", buffering=1) as log:
        ending = "ended"
        try:
            with _split_streams(log):
                yield path
        except BaseException as error:
            ending = one_line(f"{type(error).__name__}: {error}")
            log.write("".join(traceback.format_exception(error)))
            if isinstance(error, Exception) and not isinstance(error, UserError | OSError):
                error = StageError(f"{title}: {root_cause(error)}; the log has the traceback")
            error.add_note(f"The log of this run: {path}")
            raise error from None
        finally:
            log.write(f"[{time.strftime('%Y-%m-%d %H:%M:%SZ', time.gmtime())}, {time.time() - began:.0f} s] {ending}\n")


def root_cause(error: Exception) -> str:
    """Return the line that names the error. Ray's errors quote the tracebacks of a worker, the first cause first."""
    lines = [line for line in f"{type(error).__name__}: {error}".splitlines() if line.strip()]
    # a traceback's frames are indented, the exception after them is not
    quoted = (line for frame, line in pairwise(lines) if frame.startswith("  ") and not line.startswith(" "))
    return next(quoted, lines[-1]).strip()


@contextmanager
def _split_streams(log: TextIO) -> Iterator[None]:
    """Replace sys.stdout and sys.stderr; their descriptors, to which C++ and child processes write, lead to the log."""
    with ExitStack() as stack:
        output = _Output(log)
        for name, descriptor in DESCRIPTORS.items():
            stream: TextIO = getattr(sys, name)
            stream.flush()
            beside = stack.enter_context(
                os.fdopen(os.dup(descriptor), "w", encoding=stream.encoding, errors=stream.errors, buffering=1)
            )
            os.dup2(log.fileno(), descriptor)
            stack.callback(os.dup2, beside.fileno(), descriptor)
            split = _Split(beside if _writes_to(stream, descriptor) else stream, output)
            setattr(sys, name, split)
            stack.callback(setattr, sys, name, stream)
            stack.callback(split.leave_for, stream)
        stack.callback(output.end)
        yield


def _writes_to(stream: TextIO, descriptor: int) -> bool:
    try:
        return stream.fileno() == descriptor
    except (OSError, ValueError):  # a test or a notebook has put another in its place
        return False


class _Output:
    """The log and the terminal, whose last line may be a bar that is still drawn."""

    def __init__(self, log: TextIO) -> None:
        self._log, self._ended = log, False
        self._begun: dict[tuple[TextIO, int], str] = {}  # lines by thread: one prints what Ray's workers print
        self._bar = ""
        self._drawn_on: TextIO | None = None
        self._lock = threading.RLock()

    def write(self, text: str, terminal: TextIO) -> None:
        """Log whole lines, and show those that are said."""
        with self._lock:
            if self._ended:  # by a library that has kept the stream
                return
            key = terminal, threading.get_ident()
            if text.startswith("\r"):
                self._draw(text, terminal)
            elif text == "\n" and self._bar and not self._begun.get(key):
                self._end_bar()
            else:
                *whole, self._begun[key] = (self._begun.get(key, "") + text).split("\n")
                for line in whole:
                    self._write_line(line.rstrip("\r"), terminal)

    def end(self) -> None:
        """Finish what is begun."""
        with self._lock:
            if self._bar:
                self._end_bar()
            for (terminal, _), line in self._begun.items():
                if line:
                    self._write_line(line, terminal)
            self._ended = True

    def _draw(self, state: str, terminal: TextIO) -> None:
        self._bar = state.strip()
        if _SAID.fullmatch(self._bar):
            terminal.write(state)
            self._drawn_on = terminal

    def _end_bar(self) -> None:
        self._log.write(self._bar + "\n")
        self._bar = ""
        self._leave_bar()

    def _leave_bar(self) -> None:
        if self._drawn_on is not None:
            self._drawn_on.write("\n")
            self._drawn_on = None

    def _write_line(self, line: str, terminal: TextIO) -> None:
        self._log.write(line + "\n")
        if said := _SAID.fullmatch(line):
            self._leave_bar()  # it is drawn again below
            terminal.write(said[1] + "\n")


class _Split(io.TextIOBase):
    """Stream whose text goes to the log, and to the terminal where it is said."""

    def __init__(self, terminal: TextIO, output: _Output) -> None:
        self._terminal, self._output = terminal, output

    def leave_for(self, stream: TextIO) -> None:
        """Answer as `stream` from now on: a library that has kept this object may ask it when the process exits."""
        self._terminal = stream

    def write(self, text: str) -> int:
        self._output.write(text, self._terminal)
        return len(text)

    def flush(self) -> None:
        self._terminal.flush()

    def isatty(self) -> bool:
        return self._terminal.isatty()

    def fileno(self) -> int:
        return self._terminal.fileno()

    def writable(self) -> bool:
        return True

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._terminal.encoding
