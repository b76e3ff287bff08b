"""A table of edits: its rows, checked, and the jobs they become. A bad row becomes a line with its error."""

import csv
import io
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pbe.data.boxes import Box
from pbe.data.files import irregular
from pbe.diffusion.sampling import Sampling
from pbe.edit import BATCH_ROWS
from pbe.errors import UserError, one_line

COLUMNS = ("photo", "mask", "box", "reference", "reference_box", "seed", "n", "scale", "name")
MAX_TABLE_BYTES = 256 << 20
MAX_EDITS_PER_ROW = 1000


class TableError(UserError, ValueError):
    """A table cannot be read; the message names the file, and the row or column."""


@dataclass(frozen=True)
class Row:
    """One row: paths from the table's folder; seed, n, scale as given, or None. number: from 1, without the header."""

    number: int
    photo: str
    mask: str | None
    box: Box | None
    reference: str
    reference_box: Box | None
    seed: int | None
    n: int | None
    scale: float | None
    name: str


@dataclass(frozen=True)
class Defaults:
    """For rows that do not say their own."""

    seed: int
    n: int
    scales: tuple[float, ...]


@dataclass(frozen=True)
class Job:
    """Up to BATCH_ROWS edits of one row by one model at one scale; edit k has seed + k and is written to pngs[k]."""

    row: Row
    model: str
    scale: float
    seed: int
    pngs: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """groups: jobs that go through the network together. refused: lines of bad rows."""

    groups: list[tuple[Job, ...]]
    refused: list[dict[str, Any]]


def read_table(path: Path, defaults: Defaults, *, models: Sequence[str]) -> Plan:
    """The jobs of a table .csv, .jsonl or .parquet, model by model. Raises TableError, OSError."""
    raw = _raw_rows(path)
    if not raw:
        raise TableError(f"{path}: no rows")
    unknown = sorted({str(column) for row in raw if isinstance(row, dict) for column in row if column not in COLUMNS})
    if unknown:
        raise TableError(f"{path}: unknown column {unknown[0]!r}; allowed are {', '.join(COLUMNS)}")
    rows: list[Row] = []
    refused: list[dict[str, Any]] = []
    for number, values in enumerate(raw, 1):
        try:
            rows.append(_row(number, values))
        except ValueError as error:
            refused.append({"row": number, "error": one_line(error)})
    jobs = [
        _job(row, model, scale, defaults, several_models=len(models) > 1)
        for model in models
        for scale in defaults.scales
        for row in rows
        if row.scale is None or scale == defaults.scales[0]  # a row's own scale is edited once
    ]
    taken: dict[str, int] = {}
    unique = []
    for job in jobs:
        clash = next((png for png in job.pngs if taken.get(png.lower(), job.row.number) != job.row.number), None)
        if clash:
            line = {"row": job.row.number, "error": f"name: {clash} is row {taken[clash.lower()]}'s too; rename one"}
            refused += [line] if line not in refused else []
            continue
        taken |= dict.fromkeys(map(str.lower, job.pngs), job.row.number)
        unique += _parts(job)
    return Plan(list(_groups(unique)), refused)


def _raw_rows(path: Path) -> list[Any]:
    readers: dict[str, Callable[[bytes, Path], list[Any]]]
    readers = {".csv": _csv_rows, ".jsonl": _json_rows, ".parquet": _parquet_rows}
    if path.suffix not in readers:
        raise TableError(f"{path}: must end in {', '.join(readers)}")
    if kind := irregular(path):
        raise TableError(f"{path}: {kind}, not a file")
    with path.open("rb") as stream:
        data = stream.read(MAX_TABLE_BYTES + 1)
    if len(data) > MAX_TABLE_BYTES:
        raise TableError(f"{path}: more than {MAX_TABLE_BYTES} bytes; split it")
    return readers[path.suffix](data, path)


def _text(data: bytes, path: Path) -> str:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise TableError(f"{path}: line {line} is not UTF-8; save the table as UTF-8") from None
    if "\0" in text:
        raise TableError(f"{path}: line {text[: text.index(chr(0))].count(chr(10)) + 1} has a NUL; is it a text file?")
    return text


def _csv_rows(data: bytes, path: Path) -> list[Any]:
    reader = csv.reader(io.StringIO(_text(data, path), newline=""), strict=True)
    try:
        lines = [line for line in reader if line]
    except csv.Error as error:
        raise TableError(f"{path}: line {reader.line_num}: {error}") from None
    if not lines:
        return []
    header = [name.strip() for name in lines[0]]
    if twice := sorted({name for name in header if header.count(name) > 1}):
        raise TableError(f"{path}: two columns {twice[0]!r}")
    missing = f"{len(header)} cells are needed, one per column"
    return [dict(zip(header, line, strict=True)) if len(line) == len(header) else missing for line in lines[1:]]


def _json_rows(data: bytes, path: Path) -> list[Any]:
    rows: list[Any] = []
    for line in _text(data, path).split("\n"):
        if line.strip():
            try:
                value = json.loads(line)
            except (ValueError, RecursionError):
                value = None
            rows.append(value if isinstance(value, dict) else "not a JSON mapping")
    return rows


def _parquet_rows(data: bytes, path: Path) -> list[Any]:
    try:
        rows: list[Any] = pq.read_table(pa.BufferReader(data)).to_pylist()
    except (pa.ArrowException, OSError, ValueError) as error:
        raise TableError(f"{path}: not a Parquet file that can be read ({one_line(error, 200)})") from None
    return rows


def _row(number: int, raw: Any) -> Row:
    """Raises ValueError that names the column."""
    if isinstance(raw, str):
        raise ValueError(raw)
    given = {key: value.strip() if isinstance(value, str) else value for key, value in raw.items()}
    missing = (None, "")
    # NaN, which no number equals, is how pandas writes a missing cell
    given = {key: value for key, value in given.items() if value not in missing and value == value}
    for column in ("photo", "reference"):
        if column not in given:
            raise ValueError(f"{column}: is missing")
    if ("mask" in given) == ("box" in given):
        raise ValueError("mask, box: give one of the two")
    for column in ("photo", "mask", "reference", "name"):
        if not isinstance(given.get(column, ""), str):
            raise ValueError(f"{column} = {given[column]!r}: must be text")
    return Row(
        number,
        photo=given["photo"],
        mask=given.get("mask"),
        box=_box(given, "box"),
        reference=given["reference"],
        reference_box=_box(given, "reference_box"),
        seed=_whole(given, "seed", 0, 2**62),
        n=_whole(given, "n", 1, MAX_EDITS_PER_ROW),
        scale=_scale(given),
        name=_name(given.get("name", f"row-{number:04d}")),
    )


def _name(name: str) -> str:
    """The name of an edit's file: no path, nothing that a terminal would obey, and no name that systems refuse."""
    if not name.isprintable() or "/" in name or "\\" in name or name.startswith(".") or len(name.encode()) > 150:
        raise ValueError(f"name = {name!r}: must be a file name, without folders, of at most 150 bytes")
    return name.removesuffix(".png")


def _whole(given: dict[str, Any], column: str, least: int, most: int) -> int | None:
    if column not in given:
        return None
    try:
        value = _integer(given[column])
    except (TypeError, ValueError):
        value = -1
    if not least <= value <= most:
        raise ValueError(f"{column} = {given[column]!r}: must be a whole number from {least} to {most}")
    return value


def _integer(cell: object) -> int:
    """An int, also of 42.0, which pandas writes in a column with gaps. Raises TypeError, ValueError."""
    if isinstance(cell, str):
        try:
            return int(cell)
        except ValueError:
            cell = float(cell)
    if isinstance(cell, float) and math.isfinite(cell) and cell.is_integer():
        return int(cell)
    if isinstance(cell, int) and not isinstance(cell, bool):
        return cell
    raise TypeError


def _scale(given: dict[str, Any]) -> float | None:
    if "scale" not in given:
        return None
    try:
        return Sampling(guidance_scale=float(given["scale"])).guidance_scale
    except (TypeError, ValueError):
        raise ValueError(f"scale = {given['scale']!r}: must be a number") from None


def _box(given: dict[str, Any], column: str) -> Box | None:
    if column not in given:
        return None
    value = given[column]
    try:
        x0, y0, x1, y1 = (_integer(end) for end in (value.split(",") if isinstance(value, str) else value))
        return Box(x0, y0, x1, y1)
    except (TypeError, ValueError):
        raise ValueError(f"{column} = {value!r}: must be x0,y0,x1,y1 in pixels, x0 < x1 and y0 < y1") from None


def _job(row: Row, model: str, scale: float, defaults: Defaults, *, several_models: bool) -> Job:
    seed, n = row.seed if row.seed is not None else defaults.seed, row.n or defaults.n
    name = row.name
    if several_models:
        name += f"-{Path(model).name}"
    if len(defaults.scales) > 1 and row.scale is None:
        name += f"-scale-{scale:g}"
    pngs = (f"{name}.png",) if n == 1 else tuple(f"{name}-seed-{seed + k}.png" for k in range(n))
    return Job(row, model, scale if row.scale is None else row.scale, seed, pngs)


def _parts(job: Job) -> list[Job]:
    """The job in pieces that go through the network at once, each of which is written before the next begins."""
    return [
        replace(job, seed=job.seed + start, pngs=job.pngs[start : start + BATCH_ROWS])
        for start in range(0, len(job.pngs), BATCH_ROWS)
    ]


def _groups(jobs: Sequence[Job]) -> Iterator[tuple[Job, ...]]:
    """Neighbours of the same model and scale, up to BATCH_ROWS edits: together they take less than half the time."""
    group: list[Job] = []
    for job in jobs:
        edits = sum(len(other.pngs) for other in group)
        if group and (edits + len(job.pngs) > BATCH_ROWS or (job.model, job.scale) != (group[0].model, group[0].scale)):
            yield tuple(group)
            group = []
        group.append(job)
    if group:
        yield tuple(group)
