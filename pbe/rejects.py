"""Lists what the data stages dropped, and why: the table of `pbe rejects`."""

import hashlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import yaml

from pbe.data.schema import REJECTS, TRANSIENT_REASONS
from pbe.errors import printable
from pbe.store import Manifest, Store, load_manifest, whole_file

STAGES = ("ingest", "filter", "materialize")
FORMULA = r"^[\s'\x{FEFF}]*[=+\-@\x{FF1D}\x{FF0B}\x{FF0D}\x{FF20}]|^[\t\r\n]"  # also in full width


@dataclass
class Reason:
    stage: str
    reason: str
    rows: int = 0
    examples: list[Mapping[str, str]] = field(default_factory=list)


def stages_with_rejects(root: Path) -> dict[str, Manifest]:
    """Manifests of the data stages that have run, by stage, including a stage that failed on its rejects."""
    paths = {stage: root / "data" / stage / "manifest.json" for stage in STAGES}
    return {stage: load_manifest(path) for stage, path in paths.items() if path.is_file()}


def made_from_earlier_input(root: Path) -> set[str]:
    """Stages whose inputs have changed since DVC ran them: an earlier stage has run again, or failed on its rejects.

    A stage that is not in dvc.lock counts as current. Raises ValueError if dvc.lock is damaged.
    """
    lock = root / "dvc.lock"
    try:
        return _stale_stages(
            root, (yaml.safe_load(lock.read_bytes()) or {}).get("stages", {}) if lock.is_file() else {}
        )
    except (yaml.YAMLError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{lock}: not a lock file of DVC ({' '.join(str(error).split())[:200]}); fix it") from None


def _stale_stages(root: Path, locked: Mapping[str, Any]) -> set[str]:
    stale: set[str] = set()
    for stage in STAGES:
        for dep in locked.get(stage, {}).get("deps", ()):
            path = root / dep["path"]
            before = path.parent.name
            if path.name == "manifest.json":  # DVC removes it before the stage runs, so a failed one has none
                here = path.read_bytes() if path.is_file() else b""
                changed = hashlib.md5(here, usedforsecurity=False).hexdigest() != dep.get("md5")
                if changed or before in stale:
                    stale.add(stage)
    return stale


def count_rejects(store: Store, manifests: Mapping[str, Manifest], *, examples: int) -> list[Reason]:
    """One entry per stage and reason, most frequent first within a stage, with the first `examples` rows of each."""
    found: dict[tuple[str, str], Reason] = {}
    for stage, rows in _tables(store, manifests):
        for row in rows:
            entry = found.setdefault((stage, row["reason"]), Reason(stage, row["reason"]))
            entry.rows += 1
            if len(entry.examples) < examples:
                entry.examples.append(row)
    return sorted(found.values(), key=lambda entry: (STAGES.index(entry.stage), -entry.rows, entry.reason))


def write_rejects(store: Store, manifests: Mapping[str, Manifest], target: Path) -> int:
    """Write every row to a CSV that spreadsheets may open; returns their number.

    A cell that a spreadsheet would compute begins with an apostrophe, as OWASP advises (CSV injection); numbers stay.
    """
    rows = 0
    with whole_file(target) as beside, pacsv.CSVWriter(str(beside), REJECTS) as writer:
        for stage, manifest in manifests.items():
            for unit in manifest.units:
                if any(file.dataset == "rejects" for file in unit.files):
                    table = store.read_table(unit.file("rejects"))
                    writer.write_table(_without_formulas(table))
                    rows += table.num_rows
            assert stage in STAGES
    return rows


def _without_formulas(table: pa.Table) -> pa.Table:
    """Rows of REJECTS, all text."""
    cells = []
    for column in table.columns:
        formula = pc.match_substring_regex(column, FORMULA)
        number = pc.match_substring_regex(column, r"^[-+]?[0-9]+(\.[0-9]*)?([eE][-+]?[0-9]+)?$")
        cells.append(pc.if_else(pc.and_not(formula, number), pc.binary_join_element_wise("'", column, ""), column))
    return pa.table(cells, schema=table.schema)


def _tables(store: Store, manifests: Mapping[str, Manifest]) -> Iterator[tuple[str, list[Mapping[str, str]]]]:
    for stage, manifest in manifests.items():
        for unit in manifest.units:
            if any(file.dataset == "rejects" for file in unit.files):
                yield stage, store.read_table(unit.file("rejects")).to_pylist()


def table_text(reasons: list[Reason], totals: Mapping[str, Manifest], stale: Collection[str]) -> str:
    """Text for a terminal: a line per reason, with its examples below. stale: stages to mark as from an earlier run."""
    lines = []
    latest = max(map(STAGES.index, totals))
    for stage in STAGES[: latest + 1]:
        if stage not in totals:
            lines.append(f"{stage}: no result here; it has not run, or failed before it had one")
            continue
        manifest = totals[stage]
        read = {kind: manifest.counts.get(f"{kind}_in") for kind in ("images", "boxes")}
        text = ", ".join(f"{count} {kind}" for kind, count in read.items() if count is not None)
        dropped = sum(entry.rows for entry in reasons if entry.stage == stage)
        earlier = " (from an earlier run: its input differs from dvc.lock; `dvc repro` updates it)"
        lines.append(f"{stage}: {dropped} rows dropped of {text}{earlier if stage in stale else ''}")
        for entry in reasons:
            if entry.stage == stage:
                note = "  (ingest.retry_rejected retries these)" if entry.reason in TRANSIENT_REASONS else ""
                lines.append(f"  {entry.rows:>9}  {entry.reason}{note}")
                lines += [f"             {printable(row['key'])}: {printable(row['detail'])}" for row in entry.examples]
    return "\n".join(lines)
