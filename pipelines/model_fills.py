"""Fills the bench with other people's models, in Ray Data actors like `edit`; the baseline stage names the parts."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product
from typing import Any

import pyarrow as pa

from pbe.data import images
from pbe.data.masks import hole_of
from pbe.data.rng import row_rng
from pbe.data.schema import EDITS, NO_SEED
from pbe.evaluate.bench.scopes import object_mask_of, scopes_of
from pbe.evaluate.settings import ByModel, EditConfig, HarmoniseBaseline, ModelBaseline
from pbe.store import File, Record, Store, digest
from pipelines.runtime.parts import Unit, run_units, torch_device
from pipelines.runtime.stage import Stage, StageError, training_named

# How the work is split and scheduled, not what an edit is. batch_rows is not included: it changes the last bits.
SPREAD = {"actors", "per_actor", "items_per_unit"}
NAMES = {"model", "clip", "file", "license"}  # where weights come from; the digest of their stored copy names a part
LABEL = "{label_name}"


def stored_weights(stage: Stage, baseline: ByModel, bench: pa.Table) -> dict[str, str]:
    """Check that the bench has what the baseline needs; return the paths of its weights in the storage.

    Raises StageError, WeightsError.
    """
    from pbe.evaluate.rivals.weights import store_rival  # imported here: torch takes seconds

    labels = bench.select(["bench_id", "label_name"]).to_pylist()
    unlabelled = [row["bench_id"] for row in labels if not row["label_name"]]
    if unlabelled and LABEL in getattr(baseline, "prompt", ""):
        raise StageError(
            f"baselines.{stage.variant}.prompt: {len(unlabelled)} of {bench.num_rows} bench items have no class for "
            f"{LABEL}, such as {unlabelled[0]}; write a prompt without it, or a bench with classes"
        )
    return dict(store_rival(stage.store, baseline))


def training_of(stage: Stage, baseline: ByModel) -> dict[str, str]:
    """Return what names the training that a baseline's model came from, if it is a variant's. Raises StageError."""
    return training_named(stage, baseline.model) if isinstance(baseline, ModelBaseline) else {}


def fill_by_model(
    stage: Stage, baseline: ByModel, weights: dict[str, str], bench_file: File, *, version: int
) -> list[Record]:
    """Return the parts, which are made once. Raises StageError if the model withholds every edit."""
    cfg, key = stage.params.edit, f"baselines.{stage.variant}"
    settings = [baseline.identity(without=SPREAD | NAMES), weights, cfg.asked]
    units = []
    for number, start in enumerate(range(0, bench_file.rows, baseline.items_per_unit)):
        rows = tuple(range(start, min(start + baseline.items_per_unit, bench_file.rows)))
        identity = digest(["baseline", version, settings, bench_file.sha256, rows])
        units.append(Unit(f"b{number:04d}", identity, rows))
    worker = partial(_worker, stage.store, cfg, baseline, weights, bench_file)
    records = run_units(stage, "edit", units, worker=worker, each=baseline.per_actor, key=key, actors=baseline.actors)
    withheld = sum(record.counts["withheld"] for record in records)
    if withheld:
        print(
            f"baseline: {stage.variant}: its safety checker withheld {withheld} edits; their "
            f"{sum(record.counts['items_left_out'] for record in records)} items are left out"
        )
    if not any(record.file("edits").rows for record in records):
        raise StageError(f"{key}.model: its safety checker withheld every edit; name a model without one")
    return records


def _worker(
    store: Store, cfg: EditConfig, baseline: ByModel, weights: dict[str, str], bench_file: File
) -> Callable[[Unit], Record]:
    import torch

    from pbe.evaluate.rivals.fill import FillTask
    from pbe.evaluate.rivals.weights import open_rival

    torch.set_num_threads(max(1, int(baseline.per_actor.cpus)))
    rival = open_rival(store, baseline, weights, torch_device(baseline.per_actor))
    bench = store.read_table(bench_file)
    seeds = (NO_SEED,) if isinstance(baseline, HarmoniseBaseline) else cfg.seeds  # it draws no noise

    def work(unit: Unit) -> Record:
        rows = bench.take(list(unit.payload)).to_pylist()
        asked = [
            (row, *scope, seed)
            for row in rows
            for scope, seed in product(scopes_of(row, cfg.holes, cfg.references), seeds)
        ]
        # a model that does not read the reference fills a hole once for all of them
        tasks: dict[tuple[Any, ...], FillTask] = {}
        keys = [
            (row["bench_id"], hole, reference if rival.reads_reference else "", seed)
            for row, hole, reference, seed in asked
        ]
        for key, (row, hole, reference, seed) in zip(keys, asked, strict=True):
            if key not in tasks:
                source = images.decode(row["source"])
                noise = int(row_rng(seed, row["bench_id"], "edit").integers(2**62))
                picture = images.decode(row[reference])
                mask = object_mask_of(row, reference, picture)
                tasks[key] = FillTask(source, hole_of(row, hole, source), picture, row["label_name"], noise, mask)
        filled = [edit for batch in _batches(list(tasks.values()), baseline.batch_rows) for edit in rival(batch)]
        edits = dict(zip(tasks, filled, strict=True))
        # scores need all fills of an item's hole, from every reference and seed
        missing = {key[:2] for key, edit in edits.items() if edit is None}
        out = [
            _edit_row(row["bench_id"], hole, reference, seed, edits[key])
            for key, (row, hole, reference, seed) in zip(keys, asked, strict=True)
            if key[:2] not in missing
        ]
        counts = {
            "items": len(rows),
            "edits": len(out),
            "withheld": sum(edit is None for edit in filled),
            "items_left_out": len({bench_id for bench_id, _ in missing}),
        }
        return store.write_unit("edit", unit.name, {"edits": pa.Table.from_pylist(out, schema=EDITS)}, counts=counts)

    return work


def _batches(tasks: Sequence[Any], rows: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(tasks), rows):
        yield tasks[start : start + rows]


def _edit_row(bench_id: str, hole: str, reference: str, seed: int, edit: Any) -> dict[str, Any]:
    return {
        "bench_id": bench_id,
        "hole_kind": hole,
        "reference_kind": reference,
        "seed": seed,
        "edit": images.encode_png(edit),
    }
