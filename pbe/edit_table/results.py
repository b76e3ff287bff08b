"""The folder of a table's edits: PNGs, and edits.jsonl with one line per edit or error."""

import fcntl
import json
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pbe.errors import UserError
from pbe.store import write_whole

LINES = "edits.jsonl"


class ResultsError(UserError):
    """The folder cannot be used now."""


@dataclass(frozen=True)
class Result:
    """A line of edits.jsonl; png: the file, unless the line has an error."""

    line: dict[str, Any]
    png: bytes | None = None


class ResultsFolder:
    """PNGs and edits.jsonl. A line is appended once its PNG is there, so a killed run loses only what it was at."""

    def __init__(self, out: Path, planned: Collection[str]) -> None:
        """Makes the folder, and holds it until `close`. Raises ResultsError if another run holds it, OSError.

        planned: the PNGs of this table. Lines of others, which the folder has from before, lose their row number.
        """
        out.mkdir(parents=True, exist_ok=True)
        self._out, self._path = out, out / LINES
        self._lock = os.open(out, os.O_RDONLY)  # of the folder itself: its files are replaced
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            raise ResultsError(f"--out {out}: another run writes there; wait for it, or name another folder") from None
        self._lines = self._read(planned)
        self._stream = self._path.open("ab")
        if self._stream.tell() and not self._path.read_bytes().endswith(b"\n"):
            self._stream.write(b"\n")  # after the half line of a killed run

    def _read(self, planned: Collection[str]) -> dict[str, dict[str, Any]]:
        """The last line of each PNG; not errors, whose rows are tried again."""
        lines: dict[str, dict[str, Any]] = {}
        for text in self._path.read_bytes().splitlines() if self._path.exists() else []:
            try:
                line = json.loads(text)
                if "error" not in line:
                    lines[_key(line)] = line if line["png"] in planned else line | {"row": None}
            except (ValueError, TypeError, KeyError):  # half a line: its edit is done again
                continue
        return lines

    def has(self, pngs: Sequence[str], identity: str, about: Mapping[str, Any]) -> bool:
        """Whether all edits of a job are there, made of the same. about: what their lines now say of the row."""
        lines = [self._lines.get(png, {}) for png in pngs]
        if not all(line.get("identity") == identity for line in lines):
            return False
        for line in lines:
            line.update(about)  # the row may have another number, or name the same pictures by other paths
        return all((self._out / png).is_file() for png in pngs)

    def add(self, results: Sequence[Result]) -> None:
        """Raises OSError, such as for a full disk."""
        for result in results:
            if result.png is not None:
                write_whole(self._out / result.line["png"], result.png)
            self._stream.write(json.dumps(result.line, allow_nan=False).encode() + b"\n")
            self._stream.flush()
            self._lines[_key(result.line)] = result.line

    def refuse(self, lines: Sequence[dict[str, Any]]) -> None:
        """Add the lines of rows that name no job."""
        self.add([Result(line) for line in lines])

    def errors(self) -> list[dict[str, Any]]:
        """The lines with an error, in the rows' order."""
        return sorted((line for line in self._lines.values() if "error" in line), key=lambda line: line["row"])

    def close(self) -> None:
        """Write edits.jsonl anew, with one line per edit, in the rows' order."""
        self._stream.close()
        ordered = sorted(self._lines.values(), key=lambda line: (line["row"] is None, line["row"] or 0))
        write_whole(self._path, "".join(json.dumps(line, allow_nan=False) + "\n" for line in ordered).encode())
        os.close(self._lock)


def _key(line: dict[str, Any]) -> str:
    return str(line.get("png") or f"row {line['row']}")
