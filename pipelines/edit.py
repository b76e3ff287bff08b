"""edit: fill the bench with a trained model through the public Editor, in Ray Data actors; all metrics read the edits.

Each item is filled for every hole, reference (or caption) and seed that params.yaml names; the noise depends on item
and seed alone.
"""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pbe.data import images
from pbe.data.captions import caption
from pbe.data.masks import hole_of
from pbe.data.rng import row_rng
from pbe.data.schema import BENCH, CAPTION_FORMS, EDITS, CaptionForm, require
from pbe.evaluate.bench.heldout import refuse_what_it_lacks
from pbe.evaluate.bench.scopes import picture_column, scopes_of
from pbe.evaluate.settings import EditConfig
from pbe.store import File, Record, Store, digest, load_manifest, make_manifest, save_manifest
from pipelines.runtime.parts import Unit, run_units, torch_device
from pipelines.runtime.stage import Stage, load_train_manifest

# names the parts, in place of the code: raise it when their bytes change for the same settings and inputs
VERSION = 2
# How the work is split and scheduled, not what an edit is. batch_rows is not included: it changes the last bits.
SPREAD = {"actors", "per_actor", "items_per_unit", "compile"}


@dataclass(frozen=True)
class Request:
    """Row numbers of the bench, and how to fill them."""

    cfg: EditConfig
    rows: tuple[int, ...]


def main(stage: Stage) -> None:
    assert stage.variant is not None
    cfg, trained = stage.params.edit_variant(stage.variant), load_train_manifest(stage, stage.variant)
    of_text = stage.params.train_variant(stage.variant).condition == "text"
    bench_file = load_manifest(stage.input("bench")).files("bench")[0]
    everything = Request(cfg, tuple(range(bench_file.rows)))
    [records] = fill_bench(stage, trained, bench_file, [everything], captions=cfg.captions if of_text else ())
    config = {
        "bench": bench_file.sha256,
        "method": stage.variant,
        "run": trained["run"],
        "export": digest(trained["export"]),
        "mlflow_run_id": trained["mlflow_run_id"],
        **cfg.model_dump(mode="json", exclude=SPREAD | {"references" if of_text else "captions"}),
    }
    save_manifest(stage.outputs / "manifest.json", make_manifest("edit", config=config, version=VERSION, units=records))


def fill_bench(
    stage: Stage,
    trained: Mapping[str, Any],
    bench_file: File,
    requests: Sequence[Request],
    *,
    captions: Sequence[CaptionForm] = (),
) -> list[list[Record]]:
    """Return the parts of each request, in the order given. Any stage that asks uses the VERSION of `edit`.

    captions: those that the bench must have.
    """
    bench = require(stage.store.read_table(bench_file), BENCH, bench_file.path)
    units: list[list[Unit]] = []
    for request in requests:
        cfg = request.cfg
        refuse_what_it_lacks(bench, holes=cfg.holes, references=cfg.references, captions=captions)
        settings = cfg.identity(without=SPREAD)
        units.append([])
        for number, start in enumerate(range(0, len(request.rows), cfg.items_per_unit)):
            part = Request(cfg, request.rows[start : start + cfg.items_per_unit])
            identity = digest(["edit", VERSION, settings, trained["export"], bench_file.sha256, part.rows])
            units[-1].append(Unit(f"e{number:04d}", identity, part))
    cfg = stage.params.edit
    worker = partial(_worker, stage.store, cfg, f"runs/{trained['run']}/export", bench_file)
    flat = [unit for found in units for unit in found]
    records = iter(
        run_units(
            stage,
            "edit",
            flat,
            worker=worker,
            each=cfg.per_actor,
            key="edit",
            actors=cfg.actors,
        )
    )
    return [[next(records) for _ in found] for found in units]


def _worker(store: Store, cfg: EditConfig, export: str, bench_file: File) -> Callable[[Unit], Record]:
    import torch

    from pbe.edit import Editor

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="pbe-model-") as folder:
        store.copy_tree_out(export, Path(folder))
        device = torch_device(cfg.per_actor)
        compile_unet = cfg.compile and device.type == "cuda"
        editor = Editor.load(Path(folder), device=device.type, dtype=cfg.dtype, compile_unet=compile_unet)
    bench = store.read_table(bench_file)

    def work(unit: Unit) -> Record:
        request: Request = unit.payload
        cfg, rows = request.cfg, bench.take(list(request.rows)).to_pylist()
        kinds = cfg.captions if editor.card.condition == "text" else cfg.references
        scopes = [(row, scope) for row in rows for scope in scopes_of(row, cfg.holes, kinds)]
        tasks = [(row, *scope, seed) for (row, scope), seed in product(scopes, cfg.seeds)]
        out: list[dict[str, Any]] = []
        for start in range(0, len(tasks), cfg.batch_rows):
            out += _edited(editor, tasks[start : start + cfg.batch_rows], cfg)
        edits = pa.Table.from_pylist(out, schema=EDITS)
        return store.write_unit("edit", unit.name, {"edits": edits}, counts={"items": len(rows), "edits": len(out)})

    return work


def _reference(row: Mapping[str, Any], kind: str) -> np.ndarray | str:
    """The picture of a kind of reference, or the exemplar's caption of a form."""
    picture, form = images.decode(row[picture_column(kind)]), next((f for f in CAPTION_FORMS if f == kind), None)
    return picture if form is None else caption(row["label_name"], form, picture, written=row.get("exemplar_caption"))


def _edited(editor: Any, tasks: list[tuple[Any, ...]], cfg: EditConfig) -> list[dict[str, Any]]:
    """EDITS rows of tasks (bench row, hole kind, reference kind or form of caption, seed)."""
    from pbe.diffusion.sampling import Sampling
    from pbe.protocol import OURS, UPSTREAM

    sources = np.stack([images.decode(row["source"]) for row, *_ in tasks])
    holes = [hole_of(row, hole, source) for (row, hole, _, _), source in zip(tasks, sources, strict=True)]
    edits = editor.edit_crops(
        sources,
        np.stack(holes),
        [_reference(row, kind) for row, _, kind, _ in tasks],
        seeds=[int(row_rng(seed, row["bench_id"], "edit").integers(2**62)) for row, _, _, seed in tasks],
        sampling=Sampling(cfg.guidance_scale, cfg.steps, cfg.sampler),
        protocol=OURS if cfg.protocol == "ours" else UPSTREAM,
    )
    return [
        {
            "bench_id": row["bench_id"],
            "hole_kind": hole,
            "reference_kind": reference,
            "seed": seed,
            "edit": images.encode_png(edit),
        }
        for (row, hole, reference, seed), edit in zip(tasks, edits, strict=True)
    ]
